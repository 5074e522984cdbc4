"""model/base_loading.py: names become places; what is not there is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.base_loading import SHIPPED, ModelLoadingError, load_base, load_base_networks, locate, one_line_errors


def test_a_folder_comes_before_a_shipped_model_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate("toybox", "base") == SHIPPED / "toybox" / "base"
    assert locate("toybox", "subject") == SHIPPED / "toybox" / "subject"
    (tmp_path / "toybox").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("toybox", "base") == Path("toybox")


def test_the_base_of_trained_parts_is_the_one_they_name(tmp_path: Path) -> None:
    (tmp_path / "subject_model.json").write_text('{"base": "toybox"}', encoding="utf-8")
    assert locate(tmp_path, "base") == SHIPPED / "toybox" / "base"
    assert locate(tmp_path, "subject") == tmp_path


def test_a_base_and_its_networks_alone_are_the_same_weights() -> None:
    whole = load_base("toybox")
    unet, text_encoder = load_base_networks("toybox", torch.float32)
    for ours, theirs in ((unet, whole.unet), (text_encoder, whole.text_encoder)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert next(ours.parameters()).dtype == torch.float32


def test_an_unknown_name_says_what_is_shipped_and_how_hub_ids_look() -> None:
    with pytest.raises(ModelLoadingError, match="base toybix: no such folder, .*shipped: toybox, a hub id looks like"):
        load_base("toybix")
    with pytest.raises(ModelLoadingError, match="^model toybix: no such folder"):
        locate("toybix", "subject")


def test_a_hub_that_cannot_be_reached_is_one_line_that_names_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **named: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("model.base_loading.HfApi.model_info", unreachable)
    with pytest.raises(ModelLoadingError, match="^base nobody/nothing: no such folder, and the hub cannot be reached"):
        load_base("nobody/nothing")


def test_a_folder_that_is_no_base_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadingError) as raised:
        load_base_networks(tmp_path, torch.float32)
    assert str(raised.value).startswith(f"base {tmp_path}: cannot be loaded (") and "\n" not in str(raised.value)


def test_the_caller_chooses_the_class_of_error_and_a_line_that_is_told_stays_as_it_is() -> None:
    class Mistake(Exception):
        pass

    with pytest.raises(Mistake, match=r"^base x: cannot be loaded \(a b\)$"), one_line_errors("base x", Mistake):
        raise OSError("a\n  b")
    with pytest.raises(Mistake, match="^base x: gone$"), one_line_errors("base x", Mistake):
        raise ValueError("base x: gone")
    with pytest.raises(Mistake, match="^base y: gone$"), one_line_errors("inputs", Mistake):
        raise ModelLoadingError("base y: gone")
