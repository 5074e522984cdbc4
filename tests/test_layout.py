"""The house rules that a machine can check: import order, names, sizes, nothing of this machine in the files."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_pipeline", "model", "train", "infer")
MAY_IMPORT = {
    "data_pipeline": {"data_pipeline"},
    "model": {"model"},
    "train": {"train", "model", "data_pipeline"},
    "infer": {"infer", "train", "model", "data_pipeline"},
    "scripts": {"scripts", "infer", "train", "model", "data_pipeline"},
}
FILES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def tracked() -> list[Path]:
    """Files of the repository (in an unpacked source archive: all files but the environment)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).exists()]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = imported(path) & {*PACKAGES, "scripts"}
    assert ours <= MAY_IMPORT[package], f"{package} must not import {sorted(ours - MAY_IMPORT[package])}"


def test_no_file_is_called_like_a_standard_module_or_a_sibling_folder() -> None:
    taken = set(sys.stdlib_module_names) | set(PACKAGES) | {"utils", "helpers", "misc", "manager"}
    bad = [path for path in FILES if path.stem in taken and path.name != "__init__.py"]
    assert not bad


def test_every_file_tells_its_story_first_and_stays_readable() -> None:
    for path in FILES:
        text = path.read_text()
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), f"{path}: no module docstring"
        assert len(text.splitlines()) <= 450, f"{path}: look for the second subject hiding in there"


def test_the_tree_stays_small() -> None:
    sizes = {path: path.stat().st_size for path in tracked()}
    assert sum(sizes.values()) < 48e6
    assert not [path for path, size in sizes.items() if size > 16e6]


def test_no_path_of_a_machine_stands_in_a_text_file() -> None:
    for path in tracked():
        if path.suffix in {".py", ".md", ".yaml", ".cfg", ".toml", ".json"} and path != Path(__file__):
            text = path.read_text()
            assert not [word for word in ("/work/", "/root/", "/home/") if word in text], path


def test_the_first_screen_of_the_readme_has_both_commands_and_a_picture() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert "make demo" in first and "make test" in first and "docs/images/demo.png" in first


def test_every_picture_and_file_that_the_documents_link_exists() -> None:
    import re

    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+?)\)|src=\"([^\"]+)\"", document.read_text()):
            link = next(part for part in target if part)
            assert link.startswith("http") or (ROOT / link).exists(), f"{document.name}: {link}"
