"""How fast the dataset builder is: pictures a second by stage and whole, against one picture at a time; and its memory.

    python scripts/bench_pipeline.py                                                # configs/data/toybox.yaml
    python scripts/bench_pipeline.py --config configs/data/folder.yaml source.path=PHOTOS  # real models
    python scripts/bench_pipeline.py --memory 10000                                 # one unit of 10,000 pictures

The plain loop runs the same models over the same pictures, one after the other: read, decode, every stage, write, with
all threads for each. The builder gets as many in all: one for torch and OpenCV, one decoding process. Both build the
same shards in turn, models loaded before the clock starts; the ratio is that of medians. `models idle` is the share of
the time in which no stage worked, from the first window on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.arguments import positive
from data_pipeline.build_settings import DataSettings
from data_pipeline.engine.decoding import prepare
from data_pipeline.engine.flow import add, decoded
from data_pipeline.engine.steps import Item
from data_pipeline.engine.worker import Worker, devices_of
from data_pipeline.errors import run_command
from data_pipeline.machine import processor_name
from data_pipeline.settings import load_settings

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "data"
THREADS = 2


def plain_loop(worker: Worker) -> Counter[str]:
    """Build all units one picture at a time; returns the seconds by step."""
    seconds = Counter[str]()

    def timed(name: str, work: Callable[[], object]) -> object:
        start = time.perf_counter()
        answer = work()
        seconds[name] += time.perf_counter() - start  # type: ignore[assignment]  # a Counter of floats
        return answer

    limits = worker.settings.images, worker.settings.rules.min_longer_side_px
    for unit in worker.source.units():
        with worker.output.open_writer(unit) as writer:
            for sample in worker.source.samples(unit):
                item = sample if isinstance(sample, Item) else None
                if item is None:
                    data = getattr(sample, "image", None)
                    answer = timed("decode", lambda d=data: prepare(d, *limits) if d else None)  # type: ignore[misc]
                    item = decoded(sample, answer)  # type: ignore[arg-type]
                for step in worker.steps:
                    if item.drop is None:
                        timed(step.name, lambda s=step, i=item: s.run([i]))  # type: ignore[misc]
                timed("write", lambda i=item: add(writer, i))  # type: ignore[misc]
    return seconds


def measure(settings: DataSettings, plain: bool) -> tuple[float, Counter[str], float]:
    """Seconds of one build, by step, and those in which no stage worked."""
    import cv2
    import torch

    with tempfile.TemporaryDirectory() as folder:
        settings = settings.model_copy(update={"output": folder})
        with Worker(settings, None, devices_of(settings.engine)[0], workers=1) as worker:
            threads = THREADS if plain else 1
            torch.set_num_threads(threads)
            cv2.setNumThreads(threads)
            start = time.perf_counter()
            if plain:
                by_step, idle = plain_loop(worker), 0.0
            else:
                for _ in worker.run(worker.source.units()):
                    pass
                by_step, idle = worker.clock.busy, worker.clock.idle
            return time.perf_counter() - start, by_step, idle


def compare(settings: DataSettings, repeats: int) -> None:
    """Print the table."""
    count = sum(unit.count or 0 for unit in settings.source.open().units())
    runs: dict[bool, list[tuple[float, Counter[str], float]]] = {True: [], False: []}
    measure(settings, plain=False)  # warm up: rendered backgrounds, file caches
    for _ in range(repeats):
        for plain in (True, False):
            runs[plain].append(measure(settings, plain))
    times = {plain: statistics.median(run[0] for run in found) for plain, found in runs.items()}
    print(f"{count} pictures, {repeats} runs of each in turn, {THREADS} threads, {processor_name()}\n")
    print("| | plain loop, ms a picture | builder, ms a picture |\n|---|---|---|")
    steps = dict.fromkeys(name for found in runs.values() for run in found for name in run[1])
    for name in steps:
        cells = [
            f"{1000 * statistics.median(run[1][name] for run in runs[plain]) / count:.1f}" for plain in (True, False)
        ]
        print(f"| {name} | {cells[0]} | {'in a process of its own' if name in ('decode', 'write') else cells[1]} |")
    print(f"| whole | {1000 * times[True] / count:.1f} | {1000 * times[False] / count:.1f} |")
    idle = statistics.median(run[2] / run[0] for run in runs[False])
    ratio = times[True] / times[False]
    print(f"\nbuilder: {count / times[False]:.1f} pictures/s, plain loop {count / times[True]:.1f} pictures/s")
    print(f"- bar: builder >= 1.3 x plain loop: {ratio:.2f} ({'met' if ratio >= 1.3 else 'not met'})")
    print(f"- bar: models idle < 5 %: {idle:.1%} ({'met' if idle < 0.05 else 'not met'})")


def memory(pictures: int) -> None:
    """Build one unit of many pictures in a process of its own and watch what it and its children hold."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"output={folder}",
            f"source.scenes={pictures}",
            f"source.shard_size={pictures}",
            "source.size=128",
            "source.procedural_share=0",  # the renderer keeps what it made up, which would look like growth
        ]
        command = [
            sys.executable,
            "-m",
            "data_pipeline.run",
            "--config",
            str(CONFIGS / "toybox_pairs.yaml"),
            "gallery=0",
        ]
        process = subprocess.Popen([*command, *overrides, "duplicates.remove=false"])
        held: list[tuple[float, int]] = []
        watcher = threading.Thread(target=_watch, args=(process, held))
        start = time.monotonic()
        watcher.start()
        status = process.wait()
        watcher.join()
        if status:
            raise SystemExit(status)
        end = time.monotonic() - start
        early = max(size for when, size in held if when - start < end / 4)
        late = max(size for when, size in held if when - start >= end / 4)
        print(
            f"{pictures:,} pictures in one unit: {late / 1e6:.0f} MB at most, {early / 1e6:.0f} MB in the first quarter"
        )


def _watch(process: subprocess.Popen[bytes], held: list[tuple[float, int]]) -> None:
    while process.poll() is None:
        held.append((time.monotonic(), sum(_resident(pid) for pid in _family(process.pid))))
        time.sleep(0.5)


def _family(pid: int) -> list[int]:
    found = [pid]
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [inner for word in listed.read_text().split() for inner in _family(int(word))]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, action="append", help="default: configs/data/toybox.yaml")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--memory", type=positive, metavar="PICTURES", help="watch the memory of a unit of so many")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(argv)
    if options.memory:
        memory(options.memory)
        return 0
    engine = ["engine.workers=1", "engine.threads=1", "engine.decoders=1", "duplicates.remove=false", "output=."]
    files = options.config or [CONFIGS / "toybox.yaml"]
    compare(load_settings(DataSettings, files, [*engine, *options.overrides]), options.repeats)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
