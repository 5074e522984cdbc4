"""Shards from a folder, an object store and a command are the same; failures are tried again, then told in one line."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from s3fs import S3FileSystem
from torch.utils.data import DataLoader

from data_pipeline.errors import UserError
from tests.data_pipeline.conftest import bucket as bucket  # noqa: F401
from tests.data_pipeline.conftest import server as server  # noqa: F401
from tests.train.stream.stream_shards import data_of, keys, stream_of, write_shards
from train.stream import Layout, Stream, open_stream, shard_places

SIZES = [10, 4, 7, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), SIZES)


@pytest.fixture
def store(folder: str) -> str:
    """The folder's shards behind memory://."""
    url = f"memory://{uuid4().hex}"
    fsspec.filesystem("memory").put(f"{folder}/", f"{url}/", recursive=True)
    return url


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_places, "RETRY_WAITS_S", (0.01, 0.01))


def piped(command: str, scratch: Path, names: str = "{00000..00003}") -> Stream:
    return open_stream(data_of(scratch, shards={"pictures": {"pipe": command, "names": names}}), "train", Layout())


def test_local_shards_and_those_of_stores_and_commands_are_the_same(folder: str, store: str, tmp_path: Path) -> None:
    local = stream_of(folder, tmp_path, Layout())
    expected = [local[n] for n in range(90)]
    for stream in (stream_of(store, tmp_path, Layout()), piped(f"cat {folder}/{{file}}", tmp_path)):
        assert [stream[n] for n in range(90)] == expected
        assert stream.contents == local.contents


def test_shards_on_s3_are_the_same_too(folder: str, bucket: str, tmp_path: Path) -> None:  # noqa: F811
    S3FileSystem().put(f"{folder}/", f"{bucket}/", recursive=True)
    assert keys(stream_of(bucket, tmp_path, Layout()), range(60)) == keys(
        stream_of(folder, tmp_path, Layout()), range(60)
    )


def test_fetched_shards_have_no_names_and_only_some_are_kept(store: str, tmp_path: Path) -> None:
    stream = stream_of(store, tmp_path, Layout(), shuffle_shards=1)
    reader = stream.sources["pictures"].reader
    for number in range(60):
        stream[number]
        assert len(reader._open) <= 2
    index, lock = sorted(path.name for path in tmp_path.iterdir())
    assert index.startswith("index-") and lock == f"{index}.lock", "nothing that a killed run would leave"


def test_the_next_window_is_fetched_while_this_one_is_read(store: str, tmp_path: Path) -> None:
    stream = stream_of(store, tmp_path, Layout(), shuffle_shards=1)
    source = stream.sources["pictures"]
    stream[0]
    window = source.order.window(0, 0)
    following = source.order.following(0, window).parts[0].shard
    assert source.reader._open[following].result(5).where.endswith(source.entries[following].tar)


def test_workers_that_are_forked_during_a_fetch_do_not_wait_for_it(folder: str, tmp_path: Path) -> None:
    stream = piped(f"case {{file}} in *.tar) sleep 0.5;; esac; cat {folder}/{{file}}", tmp_path)
    stream.sources["pictures"].ahead(0, 0)  # by threads that a forked process does not have
    loader = DataLoader(stream, batch_sampler=[[0, 1]], num_workers=1, collate_fn=list, timeout=20)  # type: ignore[arg-type]
    assert [item.key for item in next(iter(loader))] == keys(stream_of(folder, tmp_path, Layout()), range(2))


def test_stats_are_read_once_and_again_where_they_changed(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stream_of(store, tmp_path, Layout())
    fetched: list[str] = []
    chunks = shard_places.StoredShards.chunks
    monkeypatch.setattr(
        shard_places.StoredShards, "chunks", lambda place, file: fetched.append(file) or chunks(place, file)
    )
    assert stream_of(store, tmp_path, Layout()).contents == first.contents and fetched == []
    write_shards(store, [6], first=2)  # built anew with six samples instead of seven
    second = stream_of(store, tmp_path, Layout())
    assert fetched == ["00002_stats.json"] and second.contents != first.contents
    assert second.samples_an_epoch == {"pictures": 29}
    next(tmp_path.glob("index-*.json")).write_text("{damaged")
    assert stream_of(store, tmp_path, Layout()).contents == second.contents and len(fetched) == 5


def test_a_failing_command_is_tried_again_then_told_with_what_it_said(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"echo no route to {{file}} >&2; case {{file}} in *.tar) exit 7;; esac; cat {folder}/{{file}}"
    stream = piped(command, tmp_path)
    with pytest.raises(UserError) as caught:
        stream[0]
    told = str(caught.value)
    assert "cannot be read in 3 attempts (exit status 7: no route to 0000" in told and "\n" not in told
    again = [line for line in capsys.readouterr().err.splitlines() if "tried again in 0.01 s" in line]
    assert len(again) >= 2


def test_a_passing_failure_is_not_seen(folder: str, tmp_path: Path) -> None:
    flag = tmp_path / "failed-"
    command = (  # each tar's first transfer breaks off in the middle
        f"case {{file}} in *.tar) [ -e {flag}{{file}} ] || {{ touch {flag}{{file}}; head -c 1000 {folder}/{{file}}; "
        f"exit 1; }};; esac; cat {folder}/{{file}}"
    )
    assert keys(piped(command, tmp_path), range(30)) == keys(stream_of(folder, tmp_path, Layout()), range(30))
    assert len(list(tmp_path.glob("failed-*"))) == 4


def test_a_transfer_that_stays_short_is_a_damaged_shard(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"case {{file}} in 00002.tar) head -c 1000 {folder}/{{file}};; *) cat {folder}/{{file}};; esac"
    stream = piped(command, tmp_path)
    assert {key[:6] for key in keys(stream, range(60))} == {"s00000", "s00001", "s00003"}
    assert stream.damage.shards == 1 and "00002.tar" in capsys.readouterr().err


def test_a_copy_that_is_not_what_was_written_is_a_damaged_shard(folder: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = bytearray((copy / "00001.tar").read_bytes())
    data[600] ^= 1  # inside of a picture: only the hash can tell
    (copy / "00001.tar").write_bytes(data)
    stream = piped(f"cat {copy}/{{file}}", tmp_path)
    assert "s00001" not in {key[:6] for key in keys(stream, range(60))} and stream.damage.shards == 1


def test_a_command_that_hangs_is_ended(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_places, "STALL_S", 0.2)
    mark = f"61{uuid4().int % 10**6}"  # seconds, and how to find the process
    command = f"case {{file}} in *.tar) sleep {mark};; *) cat {folder}/{{file}};; esac"
    with pytest.raises(UserError, match="gave nothing for 0 s"):
        piped(command, tmp_path)[0]
    for _ in range(100):  # those of the other shards are tried for a moment longer
        if subprocess.run(["pgrep", "-f", f"^sleep {mark}"], capture_output=True).returncode:
            return
        time.sleep(0.1)
    pytest.fail("a command is left")


def test_a_scratch_folder_that_cannot_be_written_is_one_line(store: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^data.scratch=.*/file/below: cannot be written"):
        stream_of(store, tmp_path / "file" / "below", Layout())
    stream = stream_of(store, tmp_path / "scratch", Layout())
    stream.sources["pictures"].reader.scratch = Path("/proc/nothing")
    with pytest.raises(UserError, match=r"^data.scratch=/proc/nothing: cannot be written \(No such file"):
        stream[0]


def test_a_full_scratch_disk_is_one_line(store: str, tmp_path: Path) -> None:
    class Full:
        local = None

        def address(self, file: str) -> str:
            return file

        def chunks(self, file: str):  # type: ignore[no-untyped-def]
            yield b"x"
            raise AssertionError("not read on")

        def stamps(self) -> dict[str, str]:
            return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_places.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "wb", buffering=0))
        with pytest.raises(UserError, match=r"data.scratch=.*: cannot be written \(No space left on device\); make"):
            shard_places.fetched(Full(), "a.tar", 10, "", tmp_path)
