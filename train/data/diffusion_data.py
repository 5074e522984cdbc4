"""The data of tasks base and subject: samples live or cached, from the loading process to the batch on the device.

Toybox scenes alone, with `data.cache_scenes`: pools of encoded scenes. Otherwise the stream of shards and toybox
scenes, whose shards come from `data.cache` where one is named. Collating is the loading processes' work; only the
frozen models run in the training process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from data_pipeline.errors import UserError
from model.image_encoder import SubjectImageEncoder
from model.prompt import PromptError, SubjectPrompt, encode_ids
from train.data.diffusion_batch import CollatedScenes, DiffusionBatch, assemble_batch, collate_scenes, prompt_of
from train.data.entity_filters import Reason
from train.data.feature_cache import CachedScenes
from train.data.frozen_encoders import EncodedScene, FrozenEncoders
from train.data.live_scenes import ShardScenes, ToyboxScenes
from train.data.prepared_scenes import PreparedScene
from train.data.shard_cache import ShardCache, cache_facts
from train.engine.processes import Processes
from train.settings import DataSettings, TrainSettings
from train.stream import Layout, SamplePlace, Stream, StreamSample, ToyboxNumber, open_stream

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNSEEN = 64  # samples for validation, always the same


class Item(NamedTuple):
    """A sample as a loading process hands it on."""

    scene: EncodedScene | PreparedScene
    prompt: SubjectPrompt


class PoolItems(Dataset[Item]):
    """Toybox scenes from pools. Under another layout a run goes on where the old one stood in its pool."""

    def __init__(self, scenes: CachedScenes, tokenizer: CLIPTokenizer, layout: Layout) -> None:
        self.scenes, self.tokenizer, self.layout = scenes, tokenizer, layout
        self.offset = 0  # samples
        # A pool is passed over many times: its prompts are tokenised in the first pass only.
        self.prompts: dict[str, SubjectPrompt] = {}
        self.prompts_of = -1  # number of the pool

    def __getitem__(self, number: int) -> Item:
        scene = self.scenes[number + self.offset]
        if self.prompts_of != self.scenes.pool_number:
            self.prompts, self.prompts_of = {}, self.scenes.pool_number
        if scene.key not in self.prompts:
            self.prompts[scene.key] = prompt_of(scene, self.tokenizer)
        return Item(scene, self.prompts[scene.key])

    def position(self, passes: int) -> dict[str, Any]:
        """See `train.stream.position.Resumable`."""
        return {"pool_samples": passes * self.layout.samples_a_pass + self.offset}

    def resume(self, position: Mapping[str, Any], passes: int) -> None:
        """See `train.stream.position.Resumable`.

        Raises:
            UserError: `position` is that of other data.
        """
        if "pool_samples" not in position:
            raise UserError("the checkpoint's position is none of toybox pools; give the run another name")
        self.offset = int(position["pool_samples"]) - passes * self.layout.samples_a_pass


class StreamItems(Dataset[Item | UserError]):
    """Samples of the stream. What ends the run is handed on as an item: the training process tells it in one line."""

    def __init__(
        self,
        stream: Stream,
        data: DataSettings,
        image_size: int,
        tokenizer: CLIPTokenizer,
        cache: ShardCache | None = None,
        *,
        toybox_split: str | None = None,
    ) -> None:
        self.stream, self.tokenizer, self.cache = stream, tokenizer, cache
        self.shards = ShardScenes(stream, data, image_size)
        self.toybox = ToyboxScenes(data, image_size, split=toybox_split)

    def __getitem__(self, number: int) -> Item | UserError:
        try:
            return self._live(number) if self.cache is None else self._cached(number, self.cache)
        except UserError as error:
            return error

    def position(self, passes: int) -> dict[str, Any]:
        """See `train.stream.position.Resumable`."""
        return self.stream.position(passes)

    def resume(self, position: Mapping[str, Any], passes: int) -> None:
        """See `train.stream.position.Resumable`."""
        self.stream.resume(position, passes)

    def _live(self, number: int) -> Item:
        place = next(self.stream.places(number))
        if isinstance(place, SamplePlace):
            self.shards.check_references(place)
        return self.stream.decoded(number, self._decode)

    def _decode(self, sample: StreamSample | ToyboxNumber) -> Item:
        if isinstance(sample, ToyboxNumber):
            return self._item(self.toybox[sample.number])
        return self._item(self.shards.of(sample))

    def _cached(self, number: int, cache: ShardCache) -> Item:
        for place in self.stream.places(number):
            if isinstance(place, ToyboxNumber):
                return self._item(self.toybox[place.number])
            scene = cache.scene(place)
            if scene is not None:
                return self._item(scene)
        raise UserError(f"data.cache={cache.folder}: holds no sample of a source; write it again")

    def _item(self, scene: EncodedScene | PreparedScene) -> Item:
        try:
            return Item(scene, prompt_of(scene, self.tokenizer))
        except PromptError as error:
            raise UserError(f"{scene.key}: {error}") from error


class DiffusionData:
    """What a task asks of its data, and the samples that are validated on."""

    dataset: PoolItems | StreamItems
    loader_workers: int

    def __init__(
        self,
        settings: TrainSettings,
        vae: AutoencoderKL,
        image_encoder: SubjectImageEncoder,
        tokenizer: CLIPTokenizer,
        device: torch.device,
    ) -> None:
        """
        Args:
            vae, image_encoder: frozen here, and moved to the device.
            tokenizer: after `add_placeholder`.
        Raises:
            UserError: the sources of `settings.data` cannot be used.
        """
        data = settings.data
        self.settings, self.device, self.vae, self.tokenizer = settings, device, vae, tokenizer
        self.image_encoder = image_encoder
        self.only_toybox = not any(source.weight for source in data.shards.values())
        toybox_is_live = self.only_toybox or bool(data.toybox.weight)
        self.encoders = FrozenEncoders(
            vae, image_encoder, device, precision=PRECISIONS[settings.engine.precision],
            tower_stays=data.cache is None or toybox_is_live,
        )  # fmt: skip
        self.empty_ids = encode_ids(tokenizer, "")
        self.loader_workers = 0 if self.only_toybox and data.cache_scenes else data.workers
        layout = Layout(Processes.from_environment().count, self.loader_workers, settings.batch_size)
        if self.only_toybox and data.cache_scenes:
            self.dataset = PoolItems(self._pool(data), tokenizer, layout)
        else:
            self.dataset = self._stream_items(layout)
        self._unseen: list[EncodedScene] = []

    def collate(self, items: list[Item | UserError]) -> CollatedScenes | UserError:
        """Items of one batch -> tensors on the CPU."""
        good = []
        for item in items:
            if isinstance(item, UserError):
                return item
            good.append(item)
        scenes, prompts = [item.scene for item in good], [item.prompt for item in good]
        return collate_scenes(scenes, prompts, self.empty_ids, self.settings.diffusion.supervise)

    def batch(self, collated: CollatedScenes | UserError) -> DiffusionBatch:
        """The batch on the device, seen by the frozen models where it is live.

        Raises:
            UserError: what a loading process met.
        """
        if isinstance(collated, UserError):
            raise collated
        return assemble_batch(collated, self.device, self.encoders)

    def keys(self, collated: CollatedScenes | UserError) -> list[str]:
        """shard/key or toybox/number of each sample."""
        return [] if isinstance(collated, UserError) else list(collated.keys)

    def counts(self, collated: CollatedScenes | UserError) -> dict[str, int]:
        """Entities of the batch, for the log: the same names in every batch and process of a run."""
        if isinstance(collated, UserError):
            return {}
        kept = {"entities": collated.counts.get("kept", 0)}
        if self.settings.data.cache is not None or self.only_toybox:
            return kept  # nothing is left out at this step; `train cache` told what was
        return kept | {f"left_out_{reason}": collated.counts.get(reason, 0) for reason in get_args(Reason)}

    def validation_batch(self, first: int, count: int) -> DiffusionBatch:
        """Samples first … of the fixed ones that are never trained on; `first + count` is at most 64."""
        scenes = self.unseen()[first : first + count]
        prompts = [prompt_of(scene, self.tokenizer) for scene in scenes]
        return assemble_batch(
            collate_scenes(scenes, prompts, self.empty_ids, self.settings.diffusion.supervise), self.device
        )

    def captions(self, first: int, count: int) -> list[str]:
        """Of `validation_batch(first, count)`."""
        return [scene.caption for scene in self.unseen()[first : first + count]]

    def unseen(self) -> list[EncodedScene]:
        """The samples for validation, encoded once: toybox scenes of the val split, or held samples of the shards."""
        if not self._unseen:
            self._unseen = self._unseen_toybox() if self.only_toybox else self._unseen_of_stream()
        return self._unseen

    @torch.no_grad()
    def draw(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W) in 0..1."""
        return self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample / 2 + 0.5

    def _pool(self, data: DataSettings, split: str | None = None) -> CachedScenes:
        return CachedScenes(data, self.encoders, self.settings.folder.parent, split=split, shuffle=split is None)

    def _stream_items(self, layout: Layout) -> StreamItems:
        data = self.settings.data
        stream, cache = open_stream(data, "train", layout), None
        if data.cache is not None and not self.only_toybox:
            folder = data.cache.expanduser()
            cache = ShardCache(folder, stream, cache_facts(data, self.encoders), kept_open=4 * data.shuffle_shards)
        return StreamItems(stream, data, self.encoders.image_size, self.tokenizer, cache)

    def _unseen_toybox(self) -> list[EncodedScene]:
        data = self.settings.data
        small = data.model_copy(update={"cache_scenes": UNSEEN, "seed": data.seed + 1})
        scenes = self._pool(small, "val")
        return [scenes[number] for number in range(UNSEEN)]

    def _unseen_of_stream(self) -> list[EncodedScene]:
        data = self.settings.data.model_copy(update={"crop": "middle"})
        stream = open_stream(data, "val", Layout())
        items = StreamItems(stream, data, self.encoders.image_size, self.tokenizer, toybox_split="val")
        prepared: list[PreparedScene] = []
        for number in range(UNSEEN):
            item = items[number]
            if isinstance(item, UserError):
                raise item
            assert isinstance(item.scene, PreparedScene), "nothing is cached here"
            prepared.append(item.scene)
        return self.encoders.encode(prepared, keep_std=False)
