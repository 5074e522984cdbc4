"""Finished shards as a source: one stage and those that stand on it run again over what was kept.

What the earlier stages found is taken from the records; what was dropped stays dropped. Each shard is replaced whole.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.engine.output import Output
from data_pipeline.engine.steps import GIVEN, STAGES, Item, Place
from data_pipeline.images import PreparedPicture, decode_stored
from data_pipeline.record import Drop, Sample
from data_pipeline.shards.masks import decode_mask
from data_pipeline.shards.reader import read_drops, read_shard
from data_pipeline.sources import SourceSample, Unit


class FinishedShards:
    """The shards of an output that were finished before."""

    def __init__(self, output: Output, stage: str) -> None:
        self.output, self.stage = output, stage

    def units(self) -> list[Unit]:
        """One a finished shard."""
        return [Unit(name, stats.kept, {}) for name, stats in self.output.finished().items()]

    def samples(self, unit: Unit) -> Iterator[Item | Drop]:
        """Its samples with what the stages before the one that is run again found; and its drops as they were."""
        yield from read_drops(self.output.folder, unit.name)
        for sample in read_shard(self.output.storage.address(f"{unit.name}.tar")):
            yield self._item(sample)

    def _item(self, sample: Sample) -> Item:
        record = sample.record
        known = set(STAGES[: STAGES.index(self.stage)])
        item = Item(
            SourceSample(record.key, b"", record.alt_text, record.url, record.source_scores),
            _picture(sample),
            provenance={k: v for k, v in record.provenance.items() if k in known or k not in STAGES},
        )
        if "caption" in known:
            item.caption = record.caption
        given = {stage for stage, who in record.provenance.items() if who == GIVEN}
        if "detect" in known | given:
            item.places = [
                Place(
                    entity.noun,
                    entity.phrase,
                    entity.caption_span if "caption" in known else None,
                    entity.box_xyxy_px,
                    entity.score,
                    decode_mask(entity.mask) if "segment" in given else None,
                    entity.subject_id,
                    tuple(sample.references[name] for name in entity.references),
                )
                for entity in record.entities
            ]
        return item


def _picture(sample: Sample) -> PreparedPicture:
    """The stored picture, as it was prepared before."""
    pixels = decode_stored(sample.jpeg, sample.record.key)
    height, width = pixels.shape[:2]
    return PreparedPicture(sample.jpeg, pixels, width, height, width, height, sample.record.sha256, 0)
