"""Samples of the stream as prepared scenes: decoded, filtered and rendered in the loading processes, at every step.

Shards and toybox scenes come out alike. What cannot be decoded is passed over by the stream, which counts it and takes
the next sample of the same window.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from data_pipeline.errors import UserError
from train.data.entity_filters import read_nouns
from train.data.prepared_scenes import PreparedScene, ScenePreparation
from train.data.reference_augmentation import BackgroundSource, FolderPictures, PaintedBackgrounds
from train.data.scenes import toybox_world
from train.data.shard_scenes import reduced_picture, scene_of
from train.settings import DataSettings
from train.stream import SamplePlace, Stream, StreamSample
from train.stream.shard_places import Damaged

LOOKED_AT = 200  # samples of a shard that are searched for references before a source is trained on
FAR = 1000  # samples away from which a background may come
BACKGROUND_TRIES = 3


def folder_backgrounds(folder: Path | None, image_size: int) -> FolderPictures | None:
    """The folder that `data.references.backgrounds` names, if it does."""
    return None if folder is None else FolderPictures(folder, image_size)


class ToyboxScenes(Dataset[PreparedScene]):
    """Scene i of the toybox, prepared; `toybox/i` is its key."""

    def __init__(self, data: DataSettings, image_size: int, *, split: str | None = None) -> None:
        self.world, self.seed = toybox_world(data, split=split), data.seed
        self.prepare = ScenePreparation(data, image_size)
        self.behind: BackgroundSource = folder_backgrounds(data.references.backgrounds, image_size) or (
            PaintedBackgrounds(image_size)
        )

    def __getitem__(self, number: int) -> PreparedScene:
        scene = self.world.scene(number)
        return self.prepare(scene, f"toybox/{number}", (self.seed, number), self.behind)


class ShardScenes:
    """Samples of the stream's shards, prepared; `shard/key` is their key."""

    def __init__(self, stream: Stream, data: DataSettings, image_size: int) -> None:
        """
        Raises:
            UserError: a file of nouns or a folder of backgrounds cannot be used.
        """
        self.stream, self.data = stream, data
        self.prepare = ScenePreparation(data, image_size)
        self.nouns = {
            name: None if source.nouns is None else read_nouns(source.nouns) for name, source in data.shards.items()
        }
        self.folder = folder_backgrounds(data.references.backgrounds, image_size)
        self.checked: set[str] = set()  # sources in which references were found

    def of(self, sample: StreamSample) -> PreparedScene:
        """The sample as a scene.

        Raises:
            UserError: it is damaged.
        """
        scene = scene_of(sample, self.data, self.data.shards[sample.source].filters, self.nouns[sample.source])
        return self.prepare(scene, scene.key, sample.seed, self.folder or self._behind(sample))

    def check_references(self, place: SamplePlace) -> None:
        """Look for references in a shard that is read anyway, once for each source.

        Raises:
            UserError: they are to come from other pictures, and there are none.
        """
        if self.data.references.source == "same_image" or place.source in self.checked:
            return
        try:
            sample = self.stream.read(place)
        except Damaged:
            return  # the next sample will do
        for number in range(LOOKED_AT):
            try:
                near = self.stream.another(sample, number) if number else sample
            except Damaged:
                continue
            if any(entity.references for entity in near.sample.record.entities):
                self.checked.add(place.source)
                return
        raise UserError(
            f"data.shards.{place.source}: no entity has pictures of its own (searched: {LOOKED_AT} samples of shard "
            f"{place.shard}); set data.references.source=same_image, or build shards with references"
        )

    def _behind(self, sample: StreamSample) -> BackgroundSource:
        """Backgrounds from other samples of the same shard."""

        def draw(rng: np.random.Generator) -> np.ndarray | None:
            for number in rng.integers(1, FAR, size=BACKGROUND_TRIES):
                try:
                    jpeg = self.stream.another(sample, int(number)).sample.jpeg
                    return reduced_picture(jpeg, self.prepare.image_size)
                except UserError:
                    continue
            return None

        return draw
