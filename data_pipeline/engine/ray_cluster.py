"""The same units on an existing Ray cluster: actors hold the models, Ray restarts those that die (docs.ray.io, actors).

subject-diffusion data --config FILE engine.kind=ray engine.ray_address=auto output=s3://bucket/folder
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipeline.build_settings import DataSettings
from data_pipeline.errors import UserError
from data_pipeline.sources import Unit


class UnitBuilder:
    """What an actor does: the models of one worker, one unit a call."""

    def __init__(self, settings: DataSettings, redo: str | None) -> None:
        from data_pipeline.engine.worker import Worker, devices_of

        self.worker = Worker(settings, redo, devices_of(settings.engine)[0], workers=1)

    def build(self, unit: Unit) -> Mapping[str, Any]:
        """Build one unit; idempotent, so Ray may call it again elsewhere."""
        return next(statistics for _, statistics in self.worker.run([unit]))


def run_units(
    settings: DataSettings, redo: str | None, units: Sequence[Unit]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Build all units on the cluster; yields each as its shard is complete, in any order.

    Raises:
        UserError: ray is not installed, the cluster cannot be reached, or a unit fails again and again.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("engine.kind=ray: ray is not installed; pip install 'subject-diffusion[ray]'") from error
    engine = settings.engine
    try:
        ray.init(address=engine.ray_address, ignore_reinit_error=True, log_to_driver=False)
    except ConnectionError as error:
        raise UserError(f"engine.ray_address={engine.ray_address}: no Ray cluster answers there ({error})") from error
    room = ray.cluster_resources()
    fit = int(room.get("CPU", 0) // engine.ray_cpus)
    if engine.ray_gpus:
        fit = min(fit, int(room.get("GPU", 0) / engine.ray_gpus))
    if not fit:
        raise UserError(
            f"engine.ray_cpus={engine.ray_cpus}, engine.ray_gpus={engine.ray_gpus}: the cluster has "
            f"{room.get('CPU', 0):g} cores and {room.get('GPU', 0):g} GPUs, no room for one worker"
        )
    actor: Any = ray.remote(
        num_cpus=engine.ray_cpus,
        num_gpus=engine.ray_gpus,
        max_restarts=engine.attempts,
        max_task_retries=engine.attempts,
    )(UnitBuilder)
    workers = [actor.remote(settings, redo) for _ in range(min(engine.ray_workers or fit, len(units)))]
    waiting, running = list(reversed(units)), dict[Any, tuple[Any, Unit]]()
    try:
        for worker in workers:
            if waiting:
                unit = waiting.pop()
                running[worker.build.remote(unit)] = worker, unit
        while running:
            (ready, *_), _ = ray.wait(list(running))
            worker, unit = running.pop(ready)
            try:
                statistics = ray.get(ready)
            except ray.exceptions.RayActorError as error:
                raise UserError(f"{unit.name}: {engine.attempts} workers died over it ({error})") from error
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise
            if waiting:
                following = waiting.pop()
                running[worker.build.remote(following)] = worker, following
            yield unit.name, statistics
    finally:
        for worker in workers:
            ray.kill(worker)
