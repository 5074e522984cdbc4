"""The same shards from a Ray cluster of two nodes on this machine, a worker of which is killed on the way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.engine.build import build
from data_pipeline.errors import UserError
from tests.data_pipeline.engine.builds import files_of, small_settings, wait_for

RAY = ("engine.kind=ray", "engine.ray_gpus=0", "engine.ray_cpus=1", "duplicates.remove=false")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """Address of a cluster of two nodes with a core each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def actors() -> list[int]:
    """Processes that hold an actor of ours."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes().split(b"\0")[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith(b"ray::UnitBuilder"):
            found.append(int(folder.name))
    return found


def test_two_nodes_build_the_same_and_a_killed_worker_is_replaced(
    two_nodes: str, tmp_path: Path, undisturbed: Path
) -> None:
    output, killed = tmp_path / "shards", list[int]()

    def kill_one() -> None:
        wait_for(lambda: any(output.glob("*_stats.json")))
        killed.append(actors()[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    totals = build(small_settings(output, *RAY, f"engine.ray_address={two_nodes}", "source.scenes=48"))
    killer.join()
    assert killed and totals.read == 48
    built, expected = files_of(output), files_of(undisturbed)
    for number in range(4):  # the stats differ: they name the settings
        assert built[f"{number:05d}.tar"] == expected[f"{number:05d}.tar"]


def test_a_cluster_without_room_is_told(two_nodes: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ray_cpus=64.*no room for one worker"):
        build(small_settings(tmp_path, *RAY, f"engine.ray_address={two_nodes}", "engine.ray_cpus=64"))
