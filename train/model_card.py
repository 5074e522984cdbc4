"""The model card that is saved beside trained parts: what it is, what it saw, what was measured, what it cannot do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from train.settings import TrainSettings

_CARD = """---
license: {license}
base_model: {base}
pipeline_tag: text-to-image
tags: [subject-driven-generation, diffusers]
---

# Subject model on `{base}`

Draws subjects from one or more photos of them in a single denoising pass (`subject-diffusion generate`). This folder
holds only what was trained, {parameters:,} parameters; the base is loaded by name and checked by fingerprint.

| | |
|---|---|
| data | {data} |
| steps | {steps:,} of {batch} samples ({samples:,} samples){start} |
| time | {hours:.2f} h on {device}, checkpoints and validation not counted |
| settings | `settings.yaml` of the run: learning rate {rate:g}, EMA {ema:g}, attention-map loss {attention:g} |

## Measures

Denoising loss on 32 scenes of families that no training step saw, fixed noise and timesteps, EMA weights
(`validation.jsonl` of the run):

| step | with subjects | subjects dropped |
|---|---|---|
{measures}

## Limits

{limits}

## Licence

{licence_text}
"""

_TOYBOX_LIMITS = (
    "64 px pictures of emoji-like things on drawn backgrounds; nothing of the real world. Unseen subjects come with "
    "their colours and their arrangement, in the place asked for; outlines are rough, faces and thin parts are lost, "
    "small subjects (two in a picture) more so. Captions outside the toybox's vocabulary mean nothing to it."
)
_BASE_LIMITS = (
    "Those of the base; attributes and accessories of a subject are hard to change; more than two subjects mix."
)


def write_card(settings: TrainSettings, base: str, parameters: int, device: str) -> str:
    """Markdown of the card, from the run's settings and its logs."""
    toybox = base == "toybox"
    log = _rows(settings.folder / "log.jsonl")
    validation = _rows(settings.folder / "validation.jsonl")
    last = max((int(row["step"]) for row in log), default=0)
    samples = max((int(row["samples"]) for row in log), default=0)
    each = samples / last if last else 0
    before = [0.0, *(row["samples"] for row in log)]
    seconds = sum((row["samples"] - b) / row["samples_per_second"] for row, b in zip(log, before, strict=False))
    measures = [f"| {row['step']:,} | {row['loss']:.4f} | {row['loss_without_subjects']:.4f} |" for row in validation]
    return _CARD.format(
        license="apache-2.0" if toybox else "openrail++",
        base=base,
        parameters=parameters,
        data=_data(settings),
        steps=last,
        batch=f"{each:g}",
        samples=samples,
        start=_start(settings.inputs.get("subject")),
        hours=seconds / 3600,
        device=device,
        rate=settings.optimizer.learning_rate,
        ema=settings.ema.decay,
        attention=settings.diffusion.attention_loss_weight,
        measures="\n".join(measures[-8:]),
        limits=_TOYBOX_LIMITS if toybox else _BASE_LIMITS,
        licence_text="Apache-2.0; the toybox art is MIT (see NOTICE)."
        if toybox
        else "The base's licence (OpenRAIL-M) and its use restrictions carry over to these weights.",
    )


def _start(subject: str | None) -> str:
    """What its own steps came on top of."""
    if subject is None:
        return ""
    return f", gone on from the subject model `{Path(subject).name if Path(subject).is_absolute() else subject}`"


def _data(settings: TrainSettings) -> str:
    data = settings.data
    names = [f"shards `{name}`" for name, source in data.shards.items() if source.weight]
    weight = data.toybox.weight
    if weight or (weight is None and not names):
        names.append(f"toybox scenes, split {data.toybox.split} (held-out families never seen)")
    return f"{', '.join(names)}; seed {data.seed}"


def replace_section(card: Path, title: str, text: str) -> None:
    """Put `text` under the heading `## title` of a card, before its limits if there is no such heading yet."""
    before, *rest = re.split(r"(?m)^(?=## )", card.read_text(encoding="utf-8"))
    section = f"## {title}\n\n{text.strip()}\n\n"
    titles = [part.splitlines()[0].removeprefix("## ") for part in rest]
    if title in titles:
        rest[titles.index(title)] = section
    else:
        rest.insert(titles.index("Limits") if "Limits" in titles else len(rest), section)
    card.write_text("".join([before, *rest]), encoding="utf-8")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
