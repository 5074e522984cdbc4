"""`subject-diffusion data`: pictures in, grounded shards out; `verify`, `pages`, `remove` work on what came out.

subject-diffusion data --config configs/data/toybox.yaml output=outputs/data/toybox
subject-diffusion data --config configs/data/laion.yaml output=s3://bucket/shards engine.slice=3/16
subject-diffusion data --config configs/data/toybox.yaml output=outputs/data/toybox --redo segment
subject-diffusion data verify outputs/data/toybox
subject-diffusion data pages outputs/data/toybox --limit 100
subject-diffusion data remove outputs/data/toybox --list take_downs.txt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.arguments import positive
from data_pipeline.errors import CommandParser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `data`, or one of the commands under it; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"verify": _verify, "pages": _pages, "remove": _remove}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return _build(arguments)


def _build(argv: Sequence[str]) -> int:
    from data_pipeline.build_settings import DataSettings
    from data_pipeline.engine.build import build, dry_run
    from data_pipeline.engine.steps import STAGES
    from data_pipeline.settings import load_settings

    parser = CommandParser("data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, action="append", required=True, help="YAML file; may be repeated")
    parser.add_argument("--redo", choices=STAGES, help="run this stage and those after it again over finished shards")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, in hours, bytes and money")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(argv)
    settings = load_settings(DataSettings, options.config, options.overrides)
    if options.dry_run:
        print(dry_run(settings))
        return 0
    build(settings, redo=options.redo)
    return 0


def _verify(argv: Sequence[str]) -> int:
    from data_pipeline.shards.verify import verify

    parser = CommandParser("data verify", description="Read everything of a built dataset and say what is not right.")
    parser.add_argument("folder", help="path or URL of the shards")
    report = verify(parser.parse_args(argv).folder)
    print("\n".join(report.lines()))
    return 0 if report.ok else 1


def _pages(argv: Sequence[str]) -> int:
    from data_pipeline.people.gallery import write_gallery
    from data_pipeline.people.statistics_page import write_statistics

    parser = CommandParser("data pages", description="Write stats.html and gallery.html of a built dataset again.")
    parser.add_argument("folder", help="path of the shards")
    parser.add_argument("--limit", type=positive, default=60, help="pictures in the gallery")
    parser.add_argument("--draw", type=int, metavar="SEED", help="a seeded draw instead of the first ones")
    options = parser.parse_args(argv)
    for page in (
        write_statistics(options.folder),
        write_gallery(options.folder, limit=options.limit, seed=options.draw),
    ):
        print(page)
    return 0


def _remove(argv: Sequence[str]) -> int:
    from data_pipeline.shards.removal import read_list, remove_samples

    parser = CommandParser("data remove", description="Take pictures out of finished shards, as their owners ask.")
    parser.add_argument("folder", help="path or URL of the shards")
    parser.add_argument("--list", type=Path, required=True, help="text file: a url or sha256 on each line")
    options = parser.parse_args(argv)
    removed = remove_samples(options.folder, read_list(options.list))
    for name, count in removed.items():
        print(f"{name}: {count} removed")
    print(f"{options.folder}: {sum(removed.values())} samples removed from {len(removed)} shards")
    return 0
