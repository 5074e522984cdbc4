"""`stats.html`: what a built dataset holds and what was dropped, with plots, in one file that needs no network.

    print(write_statistics("datasets/toybox"))

Reads the stats file and the table of every finished unit (`tally.py`), never a picture.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from data_pipeline.people import wording
from data_pipeline.people.page_files import finished_shards, folder_name, settings_text, templates, write_page
from data_pipeline.people.plots import ASPECTS, FINE_ASPECTS, Axis, Figure, histogram_figure
from data_pipeline.people.tally import Tally, count_shards
from data_pipeline.reasons import REASONS
from data_pipeline.shards.storage import storage_of

PAGE = "stats.html"
TOP_NOUNS = 30
UNITS_AT_MOST = 1000  # lines of the table of units


def write_statistics(folder: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> str:
    """Write the statistics of the finished units of `folder` into it, in place of older ones.

    Args:
        folder: path or fsspec URL of a build's output.
        progress: is told (shards read, shards in all) after each.
    Returns:
        Address of the page.
    Raises:
        UserError: no finished unit, a file that is not what the builder wrote, a page that cannot be written.
    """
    storage = storage_of(folder)
    shards = finished_shards(folder)
    tally = count_shards(shards, progress)
    unfinished = {name.removesuffix(".tar") for name in storage.names() if name.endswith(".tar")}
    page = (
        templates()
        .get_template("statistics.html.j2")
        .render(
            name=folder_name(folder),
            tally=tally,
            totals=_totals(tally),
            meanings=REASONS,
            nouns=_top_nouns(tally),
            num_nouns=len(tally.nouns),
            unfinished=len(unfinished - {shard.name for shard in shards}),
            units_at_most=UNITS_AT_MOST,
            provenance=_provenance(tally),
            facts=_facts(tally),
            settings=settings_text(storage),
            **_figures(tally),
        )
    )
    return write_page(storage, PAGE, page)


def _totals(tally: Tally) -> list[tuple[str, str]]:
    per_picture = tally.entities / tally.kept if tally.kept else float("nan")
    return [
        (f"{tally.read:,}", "pictures read"),
        (f"{tally.kept:,}", "kept"),
        (wording.share(tally.kept, tally.read), "share kept"),
        (f"{tally.entities:,}", "entities"),
        (wording.number(per_picture, 2), "entities a picture"),
        (wording.size(sum(unit.num_bytes for unit in tally.units)), "in tars"),
    ]


def _top_nouns(tally: Tally) -> list[tuple[str, int]]:
    """The most frequent ones; equals by the alphabet."""
    return sorted(tally.nouns.items(), key=lambda item: (-item[1], item[0]))[:TOP_NOUNS]


def _figures(tally: Tally) -> dict[str, list[Figure]]:
    """The plots of each section; those without a number are left out."""
    of_things = [(tally.entities_per_picture, Axis("Entities of a picture", "entities", "pictures"))]
    of_boxes = [
        (tally.box_share, Axis("Area of boxes", "share of the picture", "boxes", wording.per_cent)),
        (tally.mask_share, Axis("Area of masks", "share of the box", "masks", wording.per_cent)),
        (tally.score, Axis("Score of boxes", "score", "boxes")),
    ]
    of_pictures = [
        (tally.longer_side_px, Axis("Longer side", "pixels", "pictures", wording.whole)),
        (tally.log2_aspect, Axis("Aspect", "width : height", "pictures", wording.ratio, (ASPECTS, FINE_ASPECTS))),
        (tally.words, Axis("Length of captions", "words", "captions")),
    ]
    of_scores = [(found, Axis(name, name, "pictures")) for name, found in sorted(tally.source_scores.items())]
    sections = {"things": of_things, "boxes": of_boxes, "pictures": of_pictures, "scores": of_scores}
    return {
        name: [figure for found, axis in figures if (figure := histogram_figure(found, axis))]
        for name, figures in sections.items()
    }


def _provenance(tally: Tally) -> list[tuple[str, str, int]]:
    return [
        (stage, who, number) for stage, found in sorted(tally.provenance.items()) for who, number in found.most_common()
    ]


def _facts(tally: Tally) -> list[tuple[str, str]]:
    """What the units say of the build; more than one value means that they were not built by one."""
    several = [(key, values.most_common()) for key, values in sorted(tally.facts.items())]
    return [
        (key, values[0][0] if len(values) == 1 else "; ".join(f"{value} ({units:,} units)" for value, units in values))
        for key, values in several
    ]
