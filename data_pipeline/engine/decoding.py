"""Processes that turn bytes into pictures; one that takes too long or dies costs one picture, not the build.

Each process has a pipe of its own and a thread that waits for it, so one that is killed in the middle of a word takes
nothing else with it. (Pools that share a pipe, as the standard one and pebble's, do not survive that.)
"""

from __future__ import annotations

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.images import ImageSettings, PictureRefused, PreparedPicture, prepare_picture

if TYPE_CHECKING:  # decoding processes import this file, and start quickly without all settings
    from data_pipeline.build_settings import DataSettings


@dataclass(frozen=True)
class Refusal:
    """Why a picture could not be used."""

    reason: str
    detail: str


Task = Callable[[bytes, ImageSettings, int], Any]


def prepare(data: bytes, limits: ImageSettings, min_longer_side_px: int) -> PreparedPicture | Refusal:
    """`prepare_picture` in a decoding process."""
    try:
        return prepare_picture(data, limits, min_longer_side_px)
    except PictureRefused as refusal:
        return Refusal(refusal.reason, refusal.detail)


def hashes(data: bytes, limits: ImageSettings, min_longer_side_px: int) -> tuple[str, int] | Refusal:
    """sha256 and perceptual hash only: pixels do not travel between processes."""
    picture = prepare(data, limits, min_longer_side_px)
    return picture if isinstance(picture, Refusal) else (picture.sha256, picture.perceptual_hash)


class DecoderProcess:
    """One process, started when it is first asked, and again after each death."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._process: Any = None
        self._pipe: Connection | None = None

    def ask(self, task: Task, *arguments: Any) -> Any:
        """The task's answer, or a `Refusal` if there is none in time or the process dies."""
        if self._pipe is None:
            # Spawned, not forked: this process has threads and may hold an accelerator.
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_answer, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            try:
                self._pipe.recv()  # it is ready: starting does not count as decoding
            except EOFError as error:
                raise UserError("a decoding process ended before its first picture; see what it said above") from error
        try:
            self._pipe.send((task, arguments))
            if self._pipe.poll(self.timeout_s):
                return self._pipe.recv()
        except (EOFError, OSError):
            self.end()
            return Refusal("decoder_died", "its process ended")
        self.end()
        return Refusal("too_slow", f"not decoded within {self.timeout_s:g} s")

    def end(self) -> None:
        """Kill the process, if there is one."""
        if self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._pipe = None


def _answer(pipe: Connection) -> None:
    """The life of a decoding process: it ends when nobody is at the other end of its pipe."""
    pipe.send(None)
    try:
        while True:
            task, arguments = pipe.recv()
            pipe.send(task(*arguments))
    except (EOFError, OSError, KeyboardInterrupt):
        pass


class Decoders:
    """Several decoding processes."""

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings
        self._threads = ThreadPoolExecutor(settings.engine.decoders, "decoder")
        self._own = threading.local()  # the process of a thread
        self._processes: list[DecoderProcess] = []

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)  # what is being decoded is finished first, or times out
        for process in self._processes:
            process.end()

    def ordered(self, samples: Iterable[tuple[Any, bytes | None]], task: Task) -> Iterator[tuple[Any, Any]]:
        """Run `task` on the bytes of each sample, `engine.prefetch` ahead; answers come in the order of the samples.

        Args:
            samples: anything, with its bytes; None: there is nothing to decode, the answer is None.
        """
        ahead: deque[tuple[Any, Future[Any] | None]] = deque()
        for sample, data in samples:
            ahead.append((sample, None if data is None else self._threads.submit(self._ask, task, data)))
            if len(ahead) >= self.settings.engine.prefetch:
                yield _oldest(ahead)
        while ahead:
            yield _oldest(ahead)

    def _ask(self, task: Task, data: bytes) -> Any:
        if not hasattr(self._own, "process"):
            self._own.process = DecoderProcess(self.settings.engine.decode_timeout_s)
            self._processes.append(self._own.process)
        return self._own.process.ask(task, data, self.settings.images, self.settings.rules.min_longer_side_px)


def _oldest(ahead: deque[tuple[Any, Future[Any] | None]]) -> tuple[Any, Any]:
    sample, future = ahead.popleft()
    return sample, future.result() if future else None
