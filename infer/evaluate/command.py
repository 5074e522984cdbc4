"""`subject-diffusion evaluate`: compare methods and their bounds on one protocol, and write the report.

subject-diffusion evaluate --config configs/eval/toybox.yaml                     # draws, scores, reports; resumes
subject-diffusion evaluate --config configs/eval/toybox.yaml --only ours --limit 4
subject-diffusion evaluate --config configs/eval/toybox.yaml --dry-run           # what it would take
subject-diffusion evaluate --config configs/eval/toybox.yaml --report            # from what is stored, draws nothing
subject-diffusion evaluate --config configs/eval/toybox.yaml --human             # a page of blinded pairs
subject-diffusion evaluate --config configs/eval/toybox.yaml --answers anna.json bo.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.arguments import positive
from data_pipeline.errors import CommandParser, UserError
from data_pipeline.settings import load_settings, write_settings

if TYPE_CHECKING:
    from infer.evaluate.settings import EvaluateSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from the command line; returns the exit status, 1 if the report has a hole."""
    options = _parser().parse_intermixed_args(argv)
    from infer.evaluate.settings import EvaluateSettings  # torch and its libraries load only when they are needed

    run = load_settings(EvaluateSettings, options.config, options.overrides)
    if options.processes:
        run = run.model_copy(update={"processes": options.processes})
    return _read_answers(run, options.answers) if options.answers else _evaluate(run, options)


def _parser() -> CommandParser:
    parser = CommandParser(
        "evaluate",
        description="Compare methods and their bounds on one protocol; restartable, writes report.html and tables.",
        epilog="Exit status 1: finished, but the report has holes. infer/evaluate/settings.py documents every setting.",
    )
    add = parser.add_argument
    add("--config", action="append", type=Path, required=True, help="YAML file; may be repeated, later wins")
    add(
        "--only",
        action="append",
        default=[],
        metavar="METHOD,…",
        help="only these methods and their sweeps; with --human: who is compared",
    )
    add("--limit", type=positive, metavar="N", help="only the first N subjects (and pairs)")
    add("--processes", type=positive, metavar="N", help="side by side (as many as the cores hold; one a GPU)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="tell pictures and hours, do nothing")
    what.add_argument("--report", action="store_true", help="write the report from what is stored, draw nothing")
    what.add_argument(
        "--human", nargs="?", const=60, type=positive, metavar="N", help="also a page of N blinded pairs (60)"
    )
    what.add_argument("--answers", nargs="+", type=Path, metavar="FILE", help="read answers back: win rates")
    add("overrides", nargs="*", metavar="section.key=value", help="single settings, applied last")
    return parser


def _evaluate(run: EvaluateSettings, options: argparse.Namespace) -> int:
    _check_installed()
    from infer.evaluate.gather import gather
    from infer.evaluate.report import write_report
    from infer.evaluate.runner import Plan, Scope, estimate, execute, missing_pictures, process_count
    from infer.loading import hush_libraries
    from infer.picture_file import open_output_folder

    hush_libraries()
    # A method's own name may hold a comma.
    only = [name for text in options.only for name in ([text] if text in run.methods else text.split(","))]
    scope = Scope(tuple(only), options.limit)
    plan = Plan.of(run, scope)
    asked, missing = missing_pictures(plan)
    processes = process_count(run)
    told = f"evaluate {run.name}: {len(plan.methods)} rows, {asked:,} pictures, {asked - missing:,} of them there"
    if missing and not options.report:
        told += f"; about {estimate(plan, processes):.2g} hours on {processes} process(es)"
        tuned = sum(method.kind == "refined" for method in plan.methods)
        told += f", and the time for {tuned} rows to be tuned to each subject" if tuned else ""
    print(told, flush=True)
    if options.dry_run:
        _tell(plan.protocol.holes)
        return 0
    write_settings(run, open_output_folder(run.output) / "settings.yaml")
    holes = [] if options.report else execute(plan, scope, processes, missing)
    results = gather(plan, holes)
    for path in write_report(results):
        print(path)
    if options.human is not None:
        from infer.evaluate.human import write_kit

        print(write_kit(results, run.output / "human", pairs=options.human, methods=scope.only or None))
    _tell(results.holes)
    return 1 if results.holes else 0


def _tell(holes: Sequence[str]) -> None:
    for hole in holes:
        print(f"hole: {hole}")


def _check_installed() -> None:
    for name in ("pandas", "pyarrow", "scipy", "jinja2"):
        if find_spec(name) is None:
            raise UserError(f"evaluate: needs {name}; pip install --editable '.[evaluate]' brings all of its libraries")


def _read_answers(run: EvaluateSettings, files: Sequence[Path]) -> int:
    _check_installed()
    from infer.evaluate.human import as_markdown, read_answers

    print(as_markdown(read_answers(run.output / "human", files)))
    return 0
