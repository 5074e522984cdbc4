"""A plan as a page for a terminal: columns aligned, at most 99 characters wide."""

from __future__ import annotations

from train.engine.gpus import GIB, MEMORY_SIZES
from train.plan.dry_run import Plan
from train.plan.memory import CONTEXT, FRAGMENTS, StrategyMemory, columns, features_are_cached


def plan_text(plan: Plan) -> str:
    """All sections, one below the other."""
    sections = (_head(plan), _parameters(plan), _memory(plan), _batches(plan), _work(plan), _time(plan), _data(plan))
    return "\n\n".join("\n".join(lines) for lines in sections)


def _head(plan: Plan) -> list[str]:
    settings, engine, shape = plan.settings, plan.settings.engine, plan.shape
    fullest = f"{shape.subjects} subjects with {shape.references} references each" if shape.subjects else "plain text"
    return [
        f"{settings.name}: estimate of a run; nothing was trained, no GPU was asked",
        f"  task {settings.task}, {settings.model}, {settings.data.size} px, {settings.steps:,} steps",
        f"  measured on the fullest batch: {fullest}",
        f"  {plan.options.gpus} x {plan.gpu.name}, {engine.strategy}, precision {engine.precision}, "
        f"{settings.optimizer.kind}; {settings.batch_size} a GPU x {settings.accumulate} x {plan.options.gpus} = "
        f"{plan.samples_a_step:,} a step",
    ]


def _parameters(plan: Plan) -> list[str]:
    every = sum(part.total for part in plan.parts)
    trained = sum(part.trained for part in plan.parts)
    lines = ["parameters, millions                          all   trained"]
    lines += [f"  {part.part:38s} {part.total / 1e6:9.2f} {part.trained / 1e6:9.2f}" for part in plan.parts]
    lines.append(f"  {'sum':38s} {every / 1e6:9.2f} {trained / 1e6:9.2f}  {trained / every:.0%} of all")
    lines.append("trained, by pattern")
    for pattern, count in plan.patterns.items():
        lines.append(f"  {pattern:38s} {'':9s} {count / 1e6:9.2f}  {count / trained:.0%}")
    return lines


def _memory(plan: Plan) -> list[str]:
    batch, rows = plan.settings.batch_size, plan.memory
    shown = columns(rows, batch)
    again = ", ".join(plan.settings.engine.checkpoint_activations)
    lines = [
        f"memory of one GPU, GiB, at {batch} a forward pass on {plan.options.gpus} GPUs, "
        + (f"activations of {again} recomputed" if again else "activations kept"),
        f"  {'strategy':14s}" + "".join(f"{heading:>10s}" for heading, _ in shown),
    ]
    for index, row in enumerate(rows):
        mark = " <" if row.strategy == plan.settings.engine.strategy else ""
        lines.append(f"  {row.strategy:14s}" + "".join(f"{values[index] / GIB:10.2f}" for _, values in shown) + mark)
    chosen = next(row for row in rows if row.strategy == plan.settings.engine.strategy)
    fits = chosen.total(batch) <= plan.gpu.memory_gib * GIB
    lines.append(
        f"  < asked for: {'fits' if fits else 'DOES NOT FIT'} {plan.gpu.name} ({plan.gpu.memory_gib:g} GiB)"
        + (f"; main memory a process: {chosen.host / GIB:.1f} GiB" if chosen.host else "")
    )
    lines.append(
        f"  sum: with {CONTEXT / GIB:.0f} GiB for the CUDA context and {FRAGMENTS - 1:.0%} of the activations for the "
        "allocator, both assumed;"
    )
    lines.append(f"  frozen: {_frozen_told(plan)}; validation is not counted")
    lines += [f"  {row.strategy}: {row.note}" for row in rows if row.note]
    return lines


def _frozen_told(plan: Plan) -> str:
    if features_are_cached(plan.settings):
        return "autoencoder, for validation; features are cached"
    return (
        "autoencoder and image tower look at every batch" if plan.shape.subjects else "autoencoder looks at every batch"
    )


def _batches(plan: Plan) -> list[str]:
    """Largest batches by memory, both ways of treating activations."""
    labels = "".join(f"{label:>8s}" for label in MEMORY_SIZES)
    what = " and ".join(plan.recomputed).replace("_", " ")
    lines = [
        f"largest batch a forward pass; right: activations of {what} recomputed",
        f"  {'strategy':14s}{labels}     |{labels}",
    ]
    for kept, again in zip(plan.kept, plan.again, strict=True):
        lines.append(f"  {kept.strategy:14s}{_fitting(kept)}     |{_fitting(again)}")
    chosen = next(row for row in plan.kept if row.strategy == plan.settings.engine.strategy)
    other = next(row for row in plan.again if row.strategy == plan.settings.engine.strategy)
    lines.append(
        f"  activations a sample: {chosen.activations.per_sample / GIB:.3f} GiB, "
        f"recomputed {other.activations.per_sample / GIB:.3f} GiB"
    )
    return lines


def _fitting(row: StrategyMemory) -> str:
    return "".join(f"{row.largest_batch(gib * GIB) or '-':>8}" for gib in MEMORY_SIZES.values())


def _work(plan: Plan) -> list[str]:
    flops = plan.flops
    shares = {
        "forward": flops.forward,
        "backward": flops.backward,
        "recomputed activations": flops.recomputed,
        "autoencoder": flops.autoencoder,
        "image tower": flops.image_tower,
    }
    lines = ["work of one sample, TFLOP"]
    lines += [f"  {name:28s}{value / 1e12:8.3f}" for name, value in shares.items() if value]
    lines.append(f"  {'sum':28s}{flops.total / 1e12:8.3f}")
    return lines


def _time(plan: Plan) -> list[str]:
    took, settings = plan.duration, plan.settings
    peak = plan.gpu.peak_flops(settings.engine.precision, settings.engine.tf32) / 1e12
    lines = [
        f"time at {plan.options.share_of_peak:.0%} of the peak ({peak:g} TFLOP/s; {plan.gpu.source})",
        f"  images a second   {took.samples_per_second:12,.1f}   {took.samples_per_second / took.gpus:,.1f} a GPU",
        f"  seconds a step    {took.seconds_a_step:12,.2f}",
        f"  {settings.steps:,} steps".ljust(20) + f"{_span(took.hours):>12s}   {took.hours * took.gpus:,.0f} GPU hours",
    ]
    if took.dollars is not None:
        lines.append(
            f"  cost              {'$' + format(took.dollars, ',.0f'):>12s}   at ${plan.options.price:g} a GPU hour"
        )
    return lines


def _span(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 72 else f"{hours / 24:.1f} days"


def _data(plan: Plan) -> list[str]:
    seen = plan.settings.steps * plan.samples_a_step
    lines = [f"data: {seen:,} samples are seen"]
    shares = {name: source.weight for name, source in plan.settings.data.shards.items()}
    toybox = plan.settings.data.toybox.weight
    every = sum(shares.values()) + ((0.0 if shares else 1.0) if toybox is None else toybox)
    for name, stored in plan.stored_samples.items():
        part = seen * shares[name] / every if every else 0.0
        epochs = f"{part / stored:,.2f} times over {stored:,} samples" if stored else "shards not here, not counted"
        lines.append(f"  {name}: {part:,.0f}; {epochs}")
    if not plan.stored_samples:
        lines.append("  toybox scenes, rendered on the fly")
    return lines
