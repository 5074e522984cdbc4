"""img2dataset's own Python environment: its pins clash with ours, so it is installed apart, once a machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from data_pipeline.errors import UserError

VERSION = "1.47.0"
REQUIREMENT = f"img2dataset=={VERSION}"
NEWEST_PYTHON = (3, 12)  # img2dataset imports imghdr, which 3.13 no longer has
DEFAULT_FOLDER = "~/.cache/subject-diffusion/img2dataset"
STAMP = "subject-diffusion-installed"  # written last, holds the requirement


def prepare_environment(folder: str | None, interpreter: str | None) -> Path:
    """The Python of an environment that has img2dataset; made if there is none. One process makes it, others wait.

    Args:
        folder: where it is or will be; None: below ~/.cache/subject-diffusion.
        interpreter: the Python that makes it, 3.10 to 3.12; None: this one.
    Raises:
        UserError: it cannot be made; the line says why.
    """
    from filelock import FileLock

    root = Path(folder or DEFAULT_FOLDER).expanduser()
    python = root / "bin" / "python"
    if _is_ready(root, python):
        return python
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f"{root.name}.lock")):
            if not _is_ready(root, python):
                _make(root, python, interpreter or sys.executable)
    except OSError as error:
        raise UserError(
            f"source.environment={root}: cannot be made ({error.strerror}); give a folder that can be written"
        ) from error
    return python


def _is_ready(root: Path, python: Path) -> bool:
    stamp = root / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == REQUIREMENT and python.exists():
        return True
    if not python.exists():
        return False
    # Somebody made it: take it as it is if it is the right one.
    query = "import importlib.metadata as m; print(m.version('img2dataset'))"
    answer = subprocess.run([python, "-c", query], capture_output=True, text=True)
    return answer.returncode == 0 and answer.stdout.strip() == VERSION


def _make(root: Path, python: Path, interpreter: str) -> None:
    if root.exists() and any(root.iterdir()) and not (root / "pyvenv.cfg").exists():
        raise UserError(
            f"source.environment={root}: is neither empty nor a Python environment; give a folder of its own"
        )
    answer = subprocess.run(
        [interpreter, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True
    )
    version = tuple(int(number) for number in answer.stdout.split())
    if answer.returncode != 0 or not (3, 10) <= version <= NEWEST_PYTHON:
        raise UserError(
            f"source.python={interpreter}: {REQUIREMENT} runs on Python 3.10 to 3.12; give the path of such a one"
        )
    _run([interpreter, "-m", "venv", "--clear", str(root)], root)
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", REQUIREMENT], root)
    (root / STAMP).write_text(f"{REQUIREMENT}\n", encoding="utf-8")


def _run(command: list[str], root: Path) -> None:
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        lines = [line.strip() for line in (answer.stderr + answer.stdout).splitlines() if line.strip()]
        told = next((line for line in reversed(lines) if re.match(r"(?i)error", line)), lines[-1] if lines else "")
        raise UserError(
            f"source.environment={root}: cannot install {REQUIREMENT} there ({told[:200]}); a package registry must be "
            f"in reach, or make it elsewhere: python3 -m venv FOLDER && FOLDER/bin/pip install {REQUIREMENT}"
        )
