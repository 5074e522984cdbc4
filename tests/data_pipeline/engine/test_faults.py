"""Whatever happens to a build, starting it again gives the set that an undisturbed one gives, to the last byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from data_pipeline.engine.build import build
from data_pipeline.errors import UserError
from data_pipeline.shards.verify import verify
from tests.data_pipeline.engine.builds import files_of, small_settings, start, wait_for

TOTAL_S = 2.0, 4.0, 6.0  # a small build takes two seconds at least; the first kill always falls into it


def killed_at_random(output: Path, seed: int, *overrides: str) -> int:
    """Start, kill (SIGKILL) at a random moment, start again … until a build ends by itself; returns the kills."""
    rng, kills = random.Random(seed), 0
    while True:
        process = start(output, *overrides)
        try:
            text, _ = process.communicate(timeout=rng.uniform(0.3, TOTAL_S[kills]) if kills < 3 else 120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, text
        return kills


@pytest.mark.parametrize("seed", range(5))
def test_a_build_killed_at_random_moments_ends_as_an_undisturbed_one(
    seed: int, tmp_path: Path, undisturbed: Path
) -> None:
    output = tmp_path / "shards"
    assert killed_at_random(output, seed, *(["engine.workers=2"] if seed % 2 else [])) > 0
    assert files_of(output).keys() == files_of(undisturbed).keys()
    told = {name for name, value in files_of(output).items() if value != files_of(undisturbed)[name]}
    assert told <= {"settings.yaml"}  # it names its output


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_fifty_more_kills(seed: int, tmp_path: Path, undisturbed: Path) -> None:
    test_a_build_killed_at_random_moments_ends_as_an_undisturbed_one(seed, tmp_path, undisturbed)


def test_a_killed_build_leaves_no_process_behind(tmp_path: Path) -> None:
    process = start(tmp_path / "shards", "engine.workers=2", "source.scenes=600", "duplicates.remove=false")
    wait_for(lambda: len(children(process.pid)) >= 4)  # two workers, each with a decoder
    family = children(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 20)


def test_a_worker_that_dies_is_replaced(tmp_path: Path, undisturbed: Path) -> None:
    output = tmp_path / "shards"
    process = start(output, "engine.workers=2")
    wait_for(lambda: any(output.glob("*_stats.json")))
    workers = [pid for pid in children(process.pid, 1) if "spawn_main" in command_of(pid)]
    os.kill(workers[0], signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    shards = {name: value for name, value in files_of(undisturbed).items() if name != "settings.yaml"}
    assert shards.items() <= files_of(output).items()


def test_a_decoder_that_dies_costs_one_picture(tmp_path: Path) -> None:
    output = tmp_path / "shards"
    process = start(output, "source.scenes=400", "source.shard_size=400", "duplicates.remove=false")
    wait_for(lambda: any(path.stat().st_size > 0 for path in output.glob(".*.tar.*.tmp")))
    os.kill(decoders(process.pid)[0], signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    report = verify(str(output))
    assert report.ok, report.lines()


def test_an_interrupted_build_says_so_and_goes_on(tmp_path: Path, undisturbed: Path) -> None:
    output = tmp_path / "shards"
    process = start(output, "source.scenes=240", "duplicates.remove=false")
    wait_for(lambda: any(output.glob("*_stats.json")))
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in text, text
    assert not list(output.glob(".*.tmp")), "temporary files were left"
    assert verify(str(output)).ok


def test_two_builds_of_one_output_are_refused_and_slices_are_not(tmp_path: Path, undisturbed: Path) -> None:
    output = tmp_path / "shards"
    first = start(output, "engine.slice=0/2")
    wait_for(lambda: (output / "settings.yaml").exists())
    second = start(output, "engine.slice=0/2")
    text, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and "another process is building it" in text, text
    other = start(output, "engine.slice=1/2")
    for process in (first, other):
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text
    shards = {name: value for name, value in files_of(undisturbed).items() if name != "settings.yaml"}
    assert shards.items() <= files_of(output).items()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="a small tmpfs needs the rights to mount")
def test_a_full_disk_is_one_line_and_finished_shards_stay(tmp_path: Path, undisturbed: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    size = sum(path.stat().st_size for path in undisturbed.glob("0000[01].*")) + 40_000
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)]).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(UserError, match="No space left on device.*make room"):
            build(small_settings(small / "shards", "duplicates.remove=false"))
        left = verify(str(small / "shards"))
        assert not list((small / "shards").glob(".*.tmp")) and list((small / "shards").glob("*_stats.json"))
        assert left.ok or all("unfinished" in line for line in left.lines()[1:-1])
    finally:
        subprocess.run(["umount", str(small)], check=True)


def children(pid: int, depth: int = 9) -> list[int]:
    """Processes below `pid`."""
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            own = [int(word) for word in listed.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += own + [inner for child in own if depth > 1 for inner in children(child, depth - 1)]
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def decoders(pid: int) -> list[int]:
    """Spawned processes right below `pid`: with one worker these are its decoders."""
    return [child for child in children(pid, 1) if "spawn_main" in command_of(child)]
