"""Units through the steps on one device: reading, decoding, every stage and writing at the same time.

    source -> reader -> decoders (processes) -> check -> caption -> nouns -> detect -> segment -> writer

Each arrow between threads is a queue of one window, so memory is bounded: at most `prefetch` pictures are being decoded
and 2 x (steps + 1) windows of `window` pictures are on their way, whatever the size of a unit.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from data_pipeline.build_settings import DataSettings
from data_pipeline.engine.decoding import Decoders, Refusal, prepare
from data_pipeline.engine.steps import Item, Step, finished
from data_pipeline.images import PreparedPicture
from data_pipeline.record import Drop
from data_pipeline.shards.writer import SampleRefused, ShardWriter
from data_pipeline.sources import SourceSample, Unit

PATIENCE_S = 0.2  # how often a waiting thread looks whether the work was called off


class Stopped(Exception):
    """Another thread failed, or the work was called off."""


class Channel:
    """A queue of one message between two threads that both give up when `stop` is set."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop, self._queue = stop, queue.Queue[Any](maxsize=1)

    def put(self, message: Any) -> None:
        while not self.stop.is_set():
            try:
                return self._queue.put(message, timeout=PATIENCE_S)
            except queue.Full:
                continue
        raise Stopped

    def get(self) -> Any:
        while not self.stop.is_set():
            try:
                return self._queue.get(timeout=PATIENCE_S)
            except queue.Empty:
                continue
        raise Stopped


@dataclass
class Clock:
    """Seconds that each step worked, and that none of the steps did."""

    busy: Counter[str] = field(default_factory=Counter)
    idle: float = 0.0
    _working: int = 0
    _since: float | None = None  # when the last one stopped working
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, name: str) -> Working:
        """A context in which step `name` works."""
        return Working(self, name)

    def enter(self) -> None:
        with self._lock:
            if self._working == 0 and self._since is not None:
                self.idle += time.perf_counter() - self._since
            self._working += 1

    def leave(self, name: str, seconds: float) -> None:
        with self._lock:
            self._working -= 1
            self.busy[name] += seconds  # type: ignore[assignment]  # a Counter of floats
            self._since = time.perf_counter()


@dataclass
class Working:
    """See `Clock.work`."""

    clock: Clock
    name: str
    start: float = 0.0

    def __enter__(self) -> None:
        self.clock.enter()
        self.start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.clock.leave(self.name, time.perf_counter() - self.start)


@dataclass(frozen=True)
class Window:
    """Neighbours of one unit on their way; the last one of a unit says so."""

    unit: Unit
    items: list[Item]
    last: bool = False


class Flow:
    """The threads of one worker."""

    def __init__(
        self,
        read: Callable[[Unit], Iterator[SourceSample | Drop | Item]],
        steps: Sequence[Step],
        open_writer: Callable[[Unit], ShardWriter],
        settings: DataSettings,
    ) -> None:
        """
        Args:
            read: the unit's samples in order; an `Item` is one that has been decoded before.
            open_writer: the writer of a unit's shard.
        """
        self.read, self.steps, self.open_writer, self.settings = read, steps, open_writer, settings
        self.clock = Clock()
        self._stop = threading.Event()
        self._errors: list[BaseException] = []

    def run(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, dict[str, Any]]]:
        """Build units in their order; yields each with its statistics when its shard is complete.

        Raises:
            The first error of any of the threads; shards that are complete stay.
        """
        channels = [Channel(self._stop) for _ in range(len(self.steps) + 1)]
        done = Channel(self._stop)
        threads = [threading.Thread(target=self._guard, args=(self._read_all, units, channels[0]), daemon=True)]
        for step, before, after in zip(self.steps, channels[:-1], channels[1:], strict=True):
            threads.append(threading.Thread(target=self._guard, args=(self._step, step, before, after), daemon=True))
        threads.append(threading.Thread(target=self._guard, args=(self._write, channels[-1], done), daemon=True))
        for thread in threads:
            thread.start()
        try:
            while (message := done.get()) is not None:
                yield message
        except Stopped:
            pass
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self._errors:
            raise self._errors[0]

    def _guard(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Stopped:
            pass
        except BaseException as error:
            self._errors.append(error)
            self._stop.set()

    def _read_all(self, units: Iterable[Unit], after: Channel) -> None:
        with Decoders(self.settings) as decoders:
            for unit in units:
                items: list[Item] = []
                for entry, answer in decoders.ordered(self._with_bytes(unit), prepare):
                    items.append(decoded(entry, answer))
                    if len(items) == self.settings.engine.window:
                        after.put(Window(unit, items))
                        items = []
                after.put(Window(unit, items, last=True))
        after.put(None)

    def _with_bytes(self, unit: Unit) -> Iterator[tuple[SourceSample | Drop | Item, bytes | None]]:
        for entry in self.read(unit):
            if self._stop.is_set():
                raise Stopped
            yield entry, entry.image if isinstance(entry, SourceSample) else None

    def _step(self, step: Step, before: Channel, after: Channel) -> None:
        while (window := before.get()) is not None:
            if any(item.drop is None for item in window.items):
                with self.clock.work(step.name):
                    step.run([item for item in window.items if item.drop is None])
            after.put(window)
        after.put(None)

    def _write(self, before: Channel, done: Channel) -> None:
        while (window := before.get()) is not None:
            unit = window.unit
            with self.open_writer(unit) as writer:
                while True:
                    for item in window.items:
                        add(writer, item)
                    if window.last:
                        break
                    window = before.get()
                statistics = writer.finish()
            done.put((unit, statistics))
        done.put(None)


def add(writer: ShardWriter, item: Item) -> None:
    """Write an item; a sample that readers would not take becomes a drop that says why."""
    if item.drop is None:
        try:
            return writer.add(finished(item))
        except SampleRefused as refusal:
            item.refuse("sample_refused", str(refusal))
    assert item.drop is not None
    writer.add(item.drop)


def decoded(entry: SourceSample | Drop | Item, answer: PreparedPicture | Refusal | None) -> Item:
    """What was read, as an item that is in or out."""
    if isinstance(entry, Item):
        return entry
    if isinstance(entry, Drop):
        return Item(SourceSample(entry.key, b""), drop=entry)
    item = Item(entry)
    if isinstance(answer, Refusal):
        item.refuse(answer.reason, answer.detail)
    else:
        item.picture = answer
    return item
