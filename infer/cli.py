"""The `subject-diffusion` command: picks the sub-command."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from data_pipeline.errors import run_command

# Name -> module with `main(argv) -> int`, and a line of help. Modules load when called, so that help is quick.
COMMANDS = {
    "data": ("data_pipeline.command", "build a dataset: pictures in, captioned, detected, segmented shards out"),
    "train": ("train.command", "train one model from a configuration; resumes by itself"),
    "generate": ("infer.generate", "draw pictures of given subjects"),
    "refine": ("infer.refine.command", "spend minutes on one subject, write a small file that generate takes"),
    "evaluate": ("infer.evaluate.command", "compare methods under one protocol, write the report"),
}


def usage() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: subject-diffusion COMMAND [options]", "", "commands:", *lines, "", "COMMAND --help tells its options."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status (see `run_command`; 2 for an unknown command)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
        print(f"error: unknown command {name}; {hint}", file=sys.stderr)
        return 2
    return run_command(import_module(COMMANDS[name][0]).main, rest)


if __name__ == "__main__":
    sys.exit(main())
