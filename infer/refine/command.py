"""`subject-diffusion refine`: some minutes on one subject, a small file at the end.

subject-diffusion refine --method textual-inversion --images photos --class-word dog --output z.safetensors
subject-diffusion refine --method lasr --images photos --class-word dog --init-words "brown dog" --minutes 5
subject-diffusion refine --method dreambooth --images photos --class-word dog --references 1
subject-diffusion refine --config configs/refine/cd_reg.yaml concepts.z.images=[photos] concepts.z.class_word=dog
subject-diffusion refine --method adapter --pairs captioned --output look.safetensors
subject-diffusion generate --subject z=z.safetensors --prompt "a z on the beach"
subject-diffusion generate --refinement look.safetensors:strength=0.7 --prompt "a dog on the beach"
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import CommandParser, UserError
from data_pipeline.settings import load_settings
from infer.refine.methods import METHODS

if TYPE_CHECKING:
    from train.settings import RunSettings

WORD = "z"  # the placeholder of those who give none


def main(argv: Sequence[str] | None = None) -> int:
    """Refine from the command line; returns the exit status."""
    from infer.refine.settings import RefineSettings
    from train.engine.processes import Processes

    arguments = _parser().parse_intermixed_args(list(sys.argv[1:] if argv is None else argv))
    overrides = [*_overrides(arguments), *arguments.overrides]
    settings = load_settings(RefineSettings, arguments.config, overrides)
    main_process = Processes.from_environment().index == 0
    with nullcontext() if main_process else redirect_stdout(io.StringIO()):
        print(refine(settings))
    return 0


def refine(settings: Any) -> Path:
    """Learn the concepts of `settings` (RefineSettings), from where an interrupted run of the same settings stood.

    Returns:
        The file.
    Raises:
        UserError: any mistake in the settings or the pictures.
        KeyboardInterrupt: a signal came; what was learnt before it stays.
    """
    from infer.refine.task import RefineTask, method_settings
    from train.engine.processes import Processes
    from train.loop import run_loop

    own = method_settings(settings)
    run = run_settings(settings, own)
    tasks: list[RefineTask] = []

    def begin(device: Any) -> RefineTask:
        tasks.append(RefineTask(settings, own, device))
        return tasks[0]

    began = time.monotonic()
    run_loop(run, begin)
    if Processes.from_environment().index > 0:
        return Path(settings.output)
    if not tasks[0].exported:
        # Not an error, which an evaluation would note before it tuned to the next subject.
        raise KeyboardInterrupt(f"{settings.output}: not written, a signal came first; the same command goes on there")
    size = settings.output.stat().st_size / 1e6
    minutes = (time.monotonic() - began) / 60
    print(f"{settings.method}: {minutes:.1f} min, {size:.3g} MB; previews in {run.folder / 'validation'}")
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # the file holds all that counts
    if settings.report.evaluate is not None:
        from infer.refine.report import write_report

        print(f"report: {write_report(settings, settings.output)}")
    return Path(settings.output)


def run_settings(settings: Any, own: Any) -> RunSettings:
    """What the trainer's loop is told of a refinement.

    Args:
        own: the method's settings.
    """
    from train.settings import EmaSettings, OptimizerSettings, ReportSettings, RunSettings

    report = settings.report
    return RunSettings(
        name=f"refine/{settings.output.stem}-{_fingerprint(settings, own)}",
        runs_dir=settings.runs_dir,
        seed=settings.seed,
        steps=own.steps,
        minutes=settings.minutes,
        batch_size=own.batch_size,
        optimizer=OptimizerSettings(
            learning_rate=own.learning_rate * _rate_scale(settings, own),
            groups=own.rate_factors(),
            weight_decay=own.weight_decay,
            beta2=0.999,
            warmup_steps=own.warmup_steps,
            decay=own.decay,
            decay_to=own.decay_to,
        ),
        ema=EmaSettings(decay=0),
        engine=settings.engine,
        report=ReportSettings(
            log_every=report.log_every,
            checkpoint_every=report.checkpoint_every,
            checkpoints_kept=1,
            validate_every=report.preview_every or own.steps,
            trackers=report.trackers,
        ),
    )


def _rate_scale(settings: Any, own: Any) -> int:
    from train.engine.processes import Processes

    return own.batch_size * Processes.from_environment().count if settings.scale_learning_rate else 1


def _fingerprint(settings: Any, own: Any) -> str:
    """What decides the weights; a run of the same goes on where it stood."""
    plain = settings.model_dump(mode="json", exclude={"minutes", "report", "workers", "runs_dir", "device", "output"})
    told = json.dumps([plain, own.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:10]


def _parser() -> CommandParser:
    parser = CommandParser("refine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", type=Path, default=[], help="YAML file; may be repeated")
    parser.add_argument("--method", choices=METHODS, help="how the subject is learnt")
    parser.add_argument("--images", action="append", help="picture or folder of pictures; may be repeated")
    parser.add_argument(
        "--pairs", help="instead of images: folder of pictures with texts, for adapter, lora, dreambooth"
    )
    parser.add_argument("--placeholder", help=f"word that will stand for the subject (default {WORD})")
    parser.add_argument("--class-word", help="what it is: dog")
    parser.add_argument("--kind", choices=("subject", "style"), help="learn a thing or a manner")
    parser.add_argument("--init-words", help="words to start from: 'young dog'")
    parser.add_argument("--identifier", help="token that the placeholder stands for; dreambooth, adapter, lora (auto)")
    parser.add_argument(
        "--references", type=int, help="photos shown to the model besides, learning and drawing (0: none)"
    )
    parser.add_argument("--base", help="model to refine on (default toybox); `plain`: its plain base")
    parser.add_argument("--steps", type=int, help="instead of the method's own number")
    parser.add_argument("--minutes", type=float, help="stop after so long, with what is learnt by then")
    parser.add_argument("--output", help="file to write, NAME.safetensors")
    parser.add_argument("--seed", type=int)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="single settings, applied last")
    return parser


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """The options as `section.key=value`."""
    word = arguments.placeholder or WORD
    if "." in word or "=" in word:
        raise UserError(f"--placeholder {word}: must be one word of letters and digits, like 'z'")
    concept = f"concepts.{word}"
    given: dict[str, Any] = {
        "method": arguments.method,
        f"{concept}.images": arguments.images,
        f"{concept}.class_word": arguments.class_word,
        f"{concept}.kind": arguments.kind,
        "options.init_words": arguments.init_words,
        "options.identifier": arguments.identifier,
        "options.steps": arguments.steps,
        "references": arguments.references,
        "pairs": arguments.pairs,
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "output": arguments.output,
    }
    if not arguments.output and not arguments.config and (arguments.images or arguments.pairs):
        given["output"] = (
            f"{word}.safetensors" if arguments.images else f"{Path(arguments.pairs).resolve().name}.safetensors"
        )
    if arguments.base == "plain":
        given["plain"] = True
    elif arguments.base:
        given["model"] = arguments.base
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]
