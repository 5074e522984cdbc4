"""`subject-diffusion train cache`: let the frozen models see every sample once, before training.

subject-diffusion train cache --config configs/train/sd15_24gb.yaml                    # on one GPU
torchrun --nproc_per_node 8 train/run.py cache --config configs/train/sd21.yaml   # process r takes shards r, r + 8 …

Training then reads what was written (`data.cache`). A build that was killed goes on where it stopped; finished shards
are passed over. For toybox scenes (`data.cache_scenes`) the pool is built with which the run begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from data_pipeline.errors import CommandParser, UserError
from data_pipeline.settings import load_settings
from train.data.diffusion_data import DiffusionData, PoolItems
from train.data.encoded_files import write_scenes
from train.data.frozen_encoders import EncodedScene, FrozenEncoders
from train.data.live_scenes import ShardScenes
from train.data.prepared_scenes import PreparedScene
from train.data.shard_cache import ROWS_A_FILE, CachedShard, begin_cache, cache_facts, shard_folder
from train.engine.processes import Processes
from train.settings import DataSettings, TrainSettings
from train.stream import Layout, Stream, StreamShard, open_stream

SCENES_A_PORTION = 32  # that a loading process hands over at once
BYTES_A_GB = 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Build the cache of a configuration from the command line; returns the exit status."""
    parser = CommandParser("train cache", description="Encode all samples once; goes on where it was stopped.")
    parser.add_argument(
        "--config", action="append", type=Path, required=True, help="YAML file; may be repeated, later wins"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="single settings, applied last")
    arguments = parser.parse_args(argv)
    folder = build_cache(load_settings(TrainSettings, arguments.config, arguments.overrides))
    if Processes.from_environment().index == 0:
        print(f"cached in {folder}")
    return 0


def cache_folder(settings: TrainSettings) -> Path:
    """Where the cache of shards lies: `data.cache`, or beside the run."""
    if settings.data.cache is not None:
        return settings.data.cache.expanduser()
    return settings.runs_dir.expanduser() / f"{settings.name}-cache"


def build_cache(settings: TrainSettings) -> Path:
    """Encode all samples of the configured shards, or the first pool of toybox scenes.

    Returns:
        The folder, complete as far as this process's share of the shards goes.
    Raises:
        UserError: nothing to cache; the folder holds another cache; a shard cannot be read; the disk is full.
    """
    from train.tasks import build_task

    if settings.task not in ("base", "subject"):
        raise UserError(f"task={settings.task}: has no frozen models to cache for; only base and subject have")
    processes = Processes.from_environment()
    device = torch.device("cuda", processes.local_index) if torch.cuda.is_available() else torch.device("cpu")
    live = settings.model_copy(update={"data": settings.data.model_copy(update={"cache": None})})
    task_data: DiffusionData = build_task(live, device).data  # type: ignore[attr-defined]
    if isinstance(task_data.dataset, PoolItems):
        return task_data.dataset.scenes.build()
    if task_data.only_toybox:
        raise UserError("data: neither shards nor data.cache_scenes are named; there is nothing to cache")
    folder = cache_folder(settings)
    cache_shards(settings.data, task_data.encoders, folder, processes)
    return folder


def cache_shards(data: DataSettings, encoders: FrozenEncoders, folder: Path, processes: Processes) -> None:
    """Encode this process's share of the shards into a cache.

    Raises:
        UserError: the folder holds another cache; a shard cannot be read; the disk is full.
    """
    begin_cache(folder, cache_facts(data, encoders))
    _CacheBuild(data, encoders, folder, processes).run()


@dataclass(frozen=True)
class Portion:
    """Scenes of one file of a shard, in the order of their rows."""

    shard: int  # number in the list
    first: int  # row with which the file begins
    scenes: list[PreparedScene] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    ends_file: bool = False
    ends_shard: bool = False


class _Portions(IterableDataset[Portion | UserError]):
    """Shard by shard; each worker has shards of its own, so that none is fetched twice."""

    def __init__(
        self, stream: Stream, shards: list[StreamShard], data: DataSettings, image_size: int, cache: Path
    ) -> None:
        self.stream, self.shards, self.cache = stream, shards, cache
        self.scenes = ShardScenes(stream, data, image_size)

    def __iter__(self) -> Iterator[Portion | UserError]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        numbers = list(range(first, len(self.shards), step))
        try:
            for number, following in zip(numbers, [*numbers[1:], None], strict=True):
                yield from self._of_shard(number, following)
        except UserError as error:  # told by the main process, in one line
            yield error

    def _of_shard(self, number: int, following: int | None) -> Iterator[Portion]:
        shard, done = self.shards[number], CachedShard(shard_folder(self.cache, self.shards[number]))
        first, scenes, rows = 0, [], []  # type: int, list[PreparedScene], list[int]
        for sample in self.stream.samples_in_order(shard, None if following is None else self.shards[following]):
            start = sample.row - sample.row % ROWS_A_FILE
            if start != first or len(scenes) == SCENES_A_PORTION:
                yield Portion(number, first, scenes, rows, ends_file=start != first)
                first, scenes, rows = start, [], []
            if done.file(start).exists():
                continue
            try:
                scenes.append(self.scenes.of(sample))
                rows.append(sample.row)
            except UserError as error:
                self.stream.damage.damaged_sample(sample.source, sample.shard, sample.row, error)
        yield Portion(number, first, scenes, rows, ends_file=True, ends_shard=True)


class _CacheBuild:
    """The work of one process: its share of the shards."""

    def __init__(self, data: DataSettings, encoders: FrozenEncoders, folder: Path, processes: Processes) -> None:
        self.data, self.encoders, self.folder = data.model_copy(update={"crop": "middle"}), encoders, folder
        self.stream = open_stream(self.data, "train", Layout(workers=data.workers))
        mine = self.stream.shards[processes.index :: processes.count]
        self.todo = [shard for shard in mine if not CachedShard(shard_folder(folder, shard)).is_complete]
        self.counts: Counter[str] = Counter()
        for shard in mine:
            if shard not in self.todo:
                self.counts.update(CachedShard(shard_folder(folder, shard)).counts())
        self.buffers: dict[int, list[EncodedScene]] = {}  # by shard
        self.rows: dict[int, list[int]] = {}
        self.drops: dict[int, Counter[str]] = {}
        self.is_main = processes.index == 0

    def run(self) -> None:
        """Encode what is missing, and say what was kept and left out."""
        if self.todo:
            self._encode_all()
        if self.is_main:
            kept = self.counts.pop("kept", 0)
            left_out = ", ".join(f"{reason} {count:,}" for reason, count in self.counts.most_common()) or "none"
            size = sum(path.stat().st_size for path in self.folder.rglob("*.safetensors")) / BYTES_A_GB
            print(f"entities kept: {kept:,}; left out: {left_out}; {size:.1f} GB; train with data.cache={self.folder}")

    def _encode_all(self) -> None:
        workers = min(self.data.workers, len(self.todo))
        portions = _Portions(self.stream, self.todo, self.data, self.encoders.image_size, self.folder)
        loader = DataLoader(portions, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
        total = sum(shard.entry.samples for shard in self.todo)
        with tqdm(total=total, unit="image", mininterval=10, desc="cache", disable=not self.is_main) as progress:
            for portion in loader:
                if isinstance(portion, UserError):
                    raise portion
                self._take(portion)
                progress.update(len(portion.scenes))

    def _take(self, portion: Portion) -> None:
        buffer = self.buffers.setdefault(portion.shard, [])
        drops = self.drops.setdefault(portion.shard, Counter())
        if portion.scenes:
            buffer += self.encoders.encode(portion.scenes, keep_std=True)
            self.rows.setdefault(portion.shard, []).extend(portion.rows)
            for scene in portion.scenes:
                drops["kept"] += len(scene.nouns)
                drops.update(scene.drops)
        shard = CachedShard(shard_folder(self.folder, self.todo[portion.shard]))
        try:
            shard.folder.mkdir(parents=True, exist_ok=True)
            if portion.ends_file and buffer:
                target = shard.file(portion.first)
                facts = {"rows": self.rows.pop(portion.shard), "counts": dict(drops)}
                write_scenes(buffer, target, target.with_suffix(".part"), facts)
                self.buffers[portion.shard] = []
                self.drops[portion.shard] = Counter()
            if portion.ends_shard:
                self.counts.update(shard.complete())
        except OSError as error:
            raise UserError(
                f"{shard.folder}: cannot be written ({error.strerror}); make room and run again: it goes on"
            ) from error
