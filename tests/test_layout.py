"""The house rules that a machine can check: import order, names, sizes, nothing of this machine in the files."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_pipeline", "model", "train", "infer")
MAY_IMPORT = {
    "data_pipeline": {"data_pipeline"},
    "model": {"model"},
    "train": {"train", "model", "data_pipeline"},
    "infer": {"infer", "train", "model", "data_pipeline"},
    "scripts": {"scripts", "infer", "train", "model", "data_pipeline"},
}
INSTALLED_APART = {
    "groundingdino",  # by the Makefile, after torch
    "img2dataset",  # by the program itself, in an environment of its own
    "guard",  # our file, by its name alone, in that environment
}
FILES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def tracked() -> list[Path]:
    """Files that belong to the tree: those git tracks or, where there is no git (an sdist), all that is not ignored."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        # The checkout may belong to another user than the one who tests, which git refuses without `safe.directory`.
        command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]
    ignored = [*(ROOT / ".gitignore").read_text().split(), ".git"]
    found: list[Path] = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not any(fnmatch(name, pattern.strip("/")) for pattern in ignored)]
        found += [Path(folder, name) for name in names]
    return found


def text_of(path: Path) -> str | None:
    """Content of a text file, None for pictures, weights and archives."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def read_setup() -> ConfigParser:
    setup = ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    return setup


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
    bad = [path for path in FILES if path.stem in taken or path.with_suffix("").is_dir()]
    assert not bad


def test_every_library_that_is_imported_is_required() -> None:
    setup = read_setup()
    lists = "\n".join([setup["options"]["install_requires"], *setup["options.extras_require"].values()])
    required = {re.split(r"[<>=\[]", line)[0].lower().replace("_", "-") for line in lists.split()}
    distributions = packages_distributions()
    for path in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]:
        for name in imported(path) - set(sys.stdlib_module_names) - set(MAY_IMPORT) - INSTALLED_APART - {"tests"}:
            owners = {owner.lower().replace("_", "-") for owner in distributions.get(name, [name])}
            assert owners & required, f"{path.relative_to(ROOT)} imports {name}, which setup.cfg does not require"


def test_every_folder_of_code_and_every_file_of_data_is_packaged() -> None:
    setup = read_setup()
    find = setup["options.packages.find"]
    packages = find_namespace_packages(
        str(ROOT), include=re.split(r",\s*", find["include"]), exclude=re.split(r",\s*", find["exclude"])
    )
    patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, listed in setup["options.package_data"].items()
        for pattern in re.split(r",\s*", listed)
    ]
    for path in tracked():
        inside = path.relative_to(ROOT)
        if inside.parts[0] not in PACKAGES:
            continue
        if path.suffix == ".py":
            assert ".".join(inside.parts[:-1]) in packages, f"{inside} would be missing from a wheel"
        else:
            assert any(fnmatch(str(inside), pattern) for pattern in patterns), f"{inside}: add it to package_data"


def test_file_names_are_good_on_every_system() -> None:
    names = [str(path.relative_to(ROOT)) for path in tracked()]
    assert not [name for name in names if not re.fullmatch(r"[\w.\-/]+", name, re.ASCII)]
    assert len({name.lower() for name in names}) == len(names), "two names differ in case only"


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
        text = text_of(path) or ""
        if path != Path(__file__).resolve():
            assert not [word for word in ("/root/", "/home/") if word in text], path


def test_the_first_screen_of_the_readme_has_both_commands_and_a_picture() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert "make demo" in first and "make test" in first and "docs/images/heldout.png" in first


def test_every_picture_and_file_that_the_documents_link_exists() -> None:
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+?)\)|src=\"([^\"]+)\"", document.read_text()):
            link = next(part for part in target if part)
            assert link.startswith("http") or (ROOT / link).exists(), f"{document.name}: {link}"
