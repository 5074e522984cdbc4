"""What a pipeline call is checked for before anything is computed; a mistake is a `UserError` naming the argument."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.errors import UserError
from infer.subjects import Subject, check_box, check_strength, match_nouns, visible_size


def one_each(value: str | Sequence[str], count: int, name: str) -> list[str]:
    """One text for all prompts, or as many as there are prompts."""
    values = [value] * count if isinstance(value, str) else list(value)
    if len(values) != count:
        raise UserError(f"{name}: {len(values)} texts for {count} prompts; give one for all, or one each")
    return values


def subjects_each(
    subjects: Sequence[Subject] | Sequence[Sequence[Subject]] | None, count: int
) -> list[tuple[Subject, ...]]:
    """One list of subjects for all prompts, or as many lists as there are prompts."""
    given: list[Subject | Sequence[Subject]] = list(subjects or ())
    flat = tuple(entry for entry in given if isinstance(entry, Subject))
    if len(flat) == len(given):
        return [flat] * count
    groups = [tuple(entry) for entry in given if not isinstance(entry, Subject)]
    if flat or len(groups) != count:
        raise UserError(f"subjects: expected a list of Subject for all prompts, or {count} such lists, one a prompt")
    return groups


def check_subjects(prompts: Sequence[str], groups: Sequence[Sequence[Subject]], layout: str) -> None:
    """Every subject has a reference, a possible box and strength, and a place in its prompt."""
    for prompt, group in zip(prompts, groups, strict=True):
        for subject in group:
            where = f"subject {subject.label}"
            if not subject.references:
                raise UserError(f"{where}: has no reference; give at least one picture")
            for reference in subject.references:
                visible_size(reference, where)
            check_strength(subject.strength, where)
            if subject.box is not None:
                check_box(subject.box, where)
                if layout == "none":
                    raise UserError(f"{where}: has a box, but layout is none; give no box at all, or use layout seeded")
        match_nouns(prompt, group)


def check_size(height: int, width: int, factor: int) -> None:
    """Width and height must be multiples of the VAE's factor."""
    if height % factor or width % factor or min(height, width) < factor:
        raise UserError(f"size {width}x{height}: width and height must be multiples of {factor} pixels")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """The value is one of those allowed."""
    if value not in allowed:
        raise UserError(f"{name} {value!r}: expected one of {', '.join(allowed)}")


def check_counts(num_prompts: int, num_images_per_prompt: int, steps: int) -> None:
    """There is something to draw, in 1 to 1000 steps."""
    if num_prompts < 1 or num_images_per_prompt < 1:
        raise UserError("nothing to draw: give at least one prompt and num_images_per_prompt of 1 or more")
    if not 1 <= steps <= 1000:
        raise UserError(f"num_inference_steps {steps}: expected 1 to 1000")


def check_scales(**scales: float) -> None:
    """Each scale is a finite number of 0 or more."""
    for name, value in scales.items():
        if not 0 <= value < 1000:  # also refuses nan
            raise UserError(f"{name} {value}: expected a number from 0 to 1000")


def check_shares(start: float, end: float, until: float) -> None:
    """Shares of the steps: 0 <= start < end <= 1, and 0 <= until <= 1."""
    if not 0 <= start < end <= 1:
        raise UserError(f"subject_start {start}, subject_end {end}: expected shares with 0 <= start < end <= 1")
    if not 0 <= until <= 1:
        raise UserError(f"subject_until {until}: expected a share of the steps, 0 to 1")
