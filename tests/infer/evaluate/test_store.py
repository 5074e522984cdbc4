"""The files of a run: whole or not there, with all that made them, and never mixed with other settings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.errors import UserError
from infer.evaluate.cases import Case, EvaluatedSubject, Photo
from infer.evaluate.methods import Answer, MethodPlan, Prepared
from infer.evaluate.methods.copied_reference import MethodSettings
from infer.evaluate.store import Made, Store

MADE = Made(seconds=0.5, memory_bytes=7, prepared=Prepared(4, 1.5, 8, 9), model="abc", boxes=((0.0, 0.0, 0.5, 1.0),))


@pytest.fixture
def case(cutout: Callable[..., Image.Image]) -> Case:
    cat = EvaluatedSubject("cat", "cat", (Photo("cat", cutout),))
    return Case("cat--0--0", "cat", "single", "a cat in the snow", "new scene", 4, (cat,), ("cat",))


@pytest.fixture
def plan() -> MethodPlan:
    return MethodPlan("the first, of two", "copied_reference", True, MethodSettings(size=32))


@pytest.fixture
def store(tmp_path: Path, plan: MethodPlan, case: Case) -> Store:
    """A store that holds one picture."""
    store = Store(tmp_path)
    store.write_picture(plan, case, Answer(Image.new("RGB", (32, 32), "red"), MADE.boxes), MADE)
    return store


def test_a_picture_comes_back_with_all_that_is_known_of_its_making(store: Store, plan: MethodPlan, case: Case) -> None:
    assert store.picture(plan, case) == MADE
    path = store.picture_path(plan, case)
    assert path.relative_to(store.folder) == Path("pictures/the_first_of_two/cat/cat--0--0.png")
    assert Image.open(path).convert("RGB").getpixel((3, 3)) == (255, 0, 0)


def test_what_is_missing_or_half_a_file_is_not_there(store: Store, plan: MethodPlan, case: Case) -> None:
    assert store.picture(plan, replace(case, id="cat--1--0")) is None
    path = store.picture_path(plan, case)
    for kept in (0, 30, 200):
        path.write_bytes(path.read_bytes()[:kept])
        assert store.picture(plan, case) is None


def test_pictures_of_other_settings_are_refused_by_the_keys_that_differ(
    store: Store, plan: MethodPlan, case: Case
) -> None:
    with pytest.raises(UserError, match="another size than 'the first, of two' has now; give another output="):
        store.picture(replace(plan, settings=MethodSettings(size=64)), case)
    with pytest.raises(UserError, match="another prompt or seed than"):
        store.picture(plan, replace(case, seed=5))


def test_scores_come_back_and_a_half_written_file_is_named(store: Store, plan: MethodPlan) -> None:
    assert store.scores(plan, "cat") == {}
    store.write_scores(plan, "cat", {"clip": {"cat--0--0": {"clip_t": 0.25}}})
    assert store.scores(plan, "cat") == {"clip": {"cat--0--0": {"clip_t": 0.25}}}
    path = store.scores_path(plan, "cat")
    for content in (path.read_text()[:20], "[]", json.dumps({"clip": 3}), ""):
        path.write_text(content)
        with pytest.raises(UserError, match=r"cat\.json: a half-written score file"):
            store.scores(plan, "cat")


def test_a_full_disk_is_one_line_and_leaves_no_partial_file(
    tmp_path: Path, plan: MethodPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        Store(tmp_path).write_scores(plan, "cat", {})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


HOLD = """
import sys, time
from pathlib import Path
from infer.evaluate.methods import MethodPlan
from infer.evaluate.methods.copied_reference import MethodSettings
from infer.evaluate.store import Store
plan = MethodPlan("the first, of two", "copied_reference", True, MethodSettings(size=32))
with Store(Path(sys.argv[1])).claim(plan, "cat") as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


def test_only_one_process_works_on_a_group_and_a_killed_one_lets_it_go(tmp_path: Path, plan: MethodPlan) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        store = Store(tmp_path)
        with store.claim(plan, "cat") as mine, store.claim(plan, "dog") as free:
            assert not mine and free
        other.kill()
        other.wait()
        with store.claim(plan, "cat") as mine:
            assert mine
