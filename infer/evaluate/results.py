"""The outcome of a run, as reports and tables read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas

from infer.evaluate.metrics import Column


@dataclass(frozen=True)
class MethodFacts:
    """What is known of one row of the tables besides its pictures."""

    name: str
    kind: str  # zero_shot, plain_base, …
    bound: bool  # a bound (real render, copied reference, plain base), not a contender
    settings: dict[str, Any]  # resolved, JSON values
    model: str = ""  # fingerprint of the weights
    sweep: tuple[str, str, Any] | None = None  # sweep's name, key, value; None: a row of its own
    # Of getting ready for a subject (tuning it) before its first picture, medians over groups:
    pictures_per_subject: float = 0.0  # that the method sees
    seconds_per_subject: float = 0.0
    memory_per_subject: float = 0.0  # bytes at the peak
    bytes_per_subject: float = 0.0  # kept on disk


@dataclass(frozen=True)
class Results:
    """All that a report tells."""

    name: str
    folder: Path  # the run's output folder; `picture` paths are relative to it
    # One row a picture: method, part, group, case, prompt, words, kind, seed, picture, seconds, memory_bytes, then one
    # column a metric (NaN where it does not apply).
    table: pandas.DataFrame
    columns: tuple[Column, ...]  # of the metrics, in the order of the tables
    methods: tuple[MethodFacts, ...]  # in the configuration's order, then those of sweeps
    references: dict[str, tuple[str, ...]]  # group: relative paths of the PNGs of what the methods were given
    holes: tuple[str, ...] = ()  # one line for each thing that is missing
    class_drift: dict[str, float] = field(default_factory=dict)  # method: KID of its class pictures
    facts: dict[str, str] = field(default_factory=dict)  # versions, device, processor, time, command
    settings_yaml: str = ""
