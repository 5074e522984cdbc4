"""Two hosts on one machine: torchrun's rendezvous between two network namespaces, one of them killed in mid-run.

sudo .venv/bin/python scripts/two_hosts.py --config configs/train/toybox/vae.yaml steps=40 report.checkpoint_every=10

A run is done undisturbed, then again with SIGKILL to all processes of the second host (`--kill first`: of the first,
which holds the rendezvous) after its first checkpoint; the dead host is started again with the same command. Both runs
must end with the same weights, bit by bit. What the other side does meanwhile: its worker loses the connection and
ends; its torchrun, which has `--max-restarts` left, waits in the rendezvous for a second host and starts a new worker
once it is there; that needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each host (below). Without the host that holds the
rendezvous, the other's torchrun ends too and has to be started again.
Needs root, for `ip netns`. The runs lie in NAME/undisturbed and NAME/disturbed below `runs_dir`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from data_pipeline.errors import CommandParser, UserError, run_command
from data_pipeline.settings import load_settings
from train.engine.checkpoints import list_checkpoints
from train.settings import REPOSITORY, TrainSettings

PORT = 29400
PATIENCE = 900.0  # seconds for one run
# torch 2.15: else a torchrun that outlives another one keeps the store's address of the last round to itself, and the
# one that comes back waits for it in vain.
ON_EACH_HOST = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# For a comparison bit by bit on CPUs: MKL else sums by where in memory the numbers happen to lie.
EXACT = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "AUTO,STRICT"}


class Host:
    """One network namespace with one end of the cable in it, and the torchrun that runs there."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.namespace = f"two-hosts-{os.getpid()}-{number}"
        self.interface = f"th{os.getpid() % 10**7}-{number}"
        self.address = f"10.77.0.{number}"
        self.torchrun: subprocess.Popen[bytes] | None = None

    def start(self, arguments: Sequence[str], log: Path) -> None:
        """The trainer's command, as an engineer gives it on each host."""
        launcher = [
            "ip", "netns", "exec", self.namespace, sys.executable, "-m", "torch.distributed.run",
            "--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"10.77.0.1:{PORT}", "--rdzv-id", "two-hosts", "--local-addr", self.address,
            "--rdzv-conf", f"is_host={int(self.number == 1)}", str(REPOSITORY / "train" / "run.py"),
        ]  # fmt: skip
        environment = os.environ | ON_EACH_HOST | EXACT | {"CUDA_VISIBLE_DEVICES": ""}
        environment["GLOO_SOCKET_IFNAME"] = self.interface
        with open(log, "ab") as handle:
            self.torchrun = subprocess.Popen([*launcher, *arguments], env=environment, stdout=handle, stderr=handle)

    def processes(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        return [int(number) for number in found.stdout.split()]

    def kill(self) -> None:
        """As when the power goes: torchrun, the trainer and its loading processes, all at once."""
        for number in self.processes():
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.torchrun is not None:
            self.torchrun.wait()


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two namespaces that see each other and nothing else.

    Raises:
        UserError: not root, or a machine that does not let namespaces be made.
    """
    if os.geteuid() != 0 or not shutil.which("ip"):
        raise UserError("two hosts: network namespaces need root and the `ip` command; run this with sudo")
    hosts = [Host(1), Host(2)]
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        _ip("link", "add", hosts[0].interface, "type", "veth", "peer", "name", hosts[1].interface)
        for host in hosts:
            _ip("link", "set", host.interface, "netns", host.namespace)
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.namespace, "link", "set", host.interface, "up")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def run_undisturbed(hosts: list[Host], arguments: Sequence[str], folder: Path) -> None:
    for host in hosts:
        host.start(arguments, folder / f"host-{host.number}.log")
    _finish(hosts, folder)


def run_with_a_kill(hosts: list[Host], arguments: Sequence[str], folder: Path, killed: int) -> str:
    """Kill host `killed` (1 or 2) after the first checkpoint, and start again what has ended.

    Returns:
        What the other host did meanwhile, as one line.
    """
    for host in hosts:
        host.start(arguments, folder / f"host-{host.number}.log")
    deadline = time.monotonic() + PATIENCE
    while not list_checkpoints(folder / "checkpoints"):
        if time.monotonic() > deadline or any(host.torchrun and host.torchrun.poll() is not None for host in hosts):
            raise UserError(f"two hosts: ended or hung before the first checkpoint; see {folder}/host-*.log")
        time.sleep(0.05)
    dead, other = hosts[killed - 1], hosts[2 - killed]
    dead.kill()
    at = list_checkpoints(folder / "checkpoints")[-1].name
    if other.torchrun is None:
        raise AssertionError("both were started")
    try:
        status = other.torchrun.wait(timeout=20 if killed == 2 else 120)
        told = f"host {other.number} ended with status {status} and was started again"
    except subprocess.TimeoutExpired:
        told = f"host {other.number} waited in the rendezvous"
    dead.start(arguments, folder / f"host-{dead.number}.log")
    if other.torchrun.poll() is not None:
        other.start(arguments, folder / f"host-{other.number}.log")
    _finish(hosts, folder)
    return f"host {killed} killed after {at}; {told}"


def _finish(hosts: list[Host], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    for host in hosts:
        if host.torchrun is None:
            raise AssertionError("not started")
        try:
            status: int | str = host.torchrun.wait(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = "hung"
        if status:
            raise UserError(f"two hosts: host {host.number}: status {status}; see {folder}/host-*.log")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"two hosts: ip {' '.join(arguments)}: {done.stderr.strip()}; this machine has no namespaces")


def differing_weights(first: Path, second: Path) -> list[str]:
    """Names of the weights, averages and moments in which the last checkpoints of two runs differ."""
    ends = [list_checkpoints(run / "checkpoints")[-1] for run in (first, second)]
    differing = [] if ends[0].name == ends[1].name else [f"{ends[0].name} is not {ends[1].name}"]
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, two = (load_file(end / file) for end in ends)
        equal = {name for name in one.keys() & two.keys() if torch.equal(one[name], two[name])}
        differing += sorted(f"{file} {name}" for name in (one.keys() | two.keys()) - equal)
    return differing


def main(argv: Sequence[str] | None = None) -> int:
    """Both runs, and the comparison; returns the exit status."""
    parser = CommandParser("two hosts", description="Kill one of two hosts in mid-run and compare.")
    parser.add_argument("--config", action="append", type=Path, required=True, help="YAML file of a training run")
    parser.add_argument("--kill", choices=("first", "second"), default="second", help="the host that dies")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="single settings, applied last")
    given = parser.parse_args(argv)
    settings = load_settings(TrainSettings, given.config, given.overrides)
    runs = {kind: settings.runs_dir.expanduser() / settings.name / kind for kind in ("undisturbed", "disturbed")}
    plain = [text for path in given.config for text in ("--config", str(path.resolve()))]
    arguments = {kind: [*plain, *given.overrides, f"name={settings.name}/{kind}"] for kind in runs}
    for folder in runs.values():
        if folder.exists():
            raise UserError(f"{folder}: is there from an earlier try; remove it")
        folder.mkdir(parents=True)
    with two_hosts() as hosts:
        run_undisturbed(hosts, arguments["undisturbed"], runs["undisturbed"])
        told = run_with_a_kill(hosts, arguments["disturbed"], runs["disturbed"], 1 if given.kill == "first" else 2)
    differing = differing_weights(runs["undisturbed"], runs["disturbed"])
    print(f"{told}; the runs end {'with the same weights' if not differing else 'differently: ' + differing[0]}")
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
