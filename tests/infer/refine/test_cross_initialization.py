"""Cross Initialization: names averaged by position, their states as the start, and the pull back to it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from data_pipeline.toybox.archive import SubjectArchive
from infer.refine.install import install_refinements
from infer.refine.methods.cross_initialization import METHOD, CrossInitSettings, mean_names, settings_names
from model.prompt import encode_ids
from tests.infer.refine.tiny_base import (
    concept,
    drawn,
    embedding_of,
    losses_on_toybox,
    tiny_base,
    tiny_batch,
    toybox_base,
    toybox_concept,
    written_and_read,
)
from tests.infer.tiny_model import TinyModel
from train.draws import SampleDraws

NAMES = ("dog", "teddy bear", "red teddy dog")


def names_file(folder: Path) -> Path:
    file = folder / "names.txt"
    file.write_text("\n".join(NAMES) + "\n\n")
    return file


def test_presets_are_320_and_25_steps_unless_steps_are_given() -> None:
    told = [settings_of(CrossInitSettings, values, "options") for values in ({}, {"preset": "fast"})]
    assert [one.steps for one in told] == [320, 25]
    assert settings_of(CrossInitSettings, {"preset": "fast", "steps": 40}, "options").steps == 40
    assert (told[0].learning_rate, told[0].batch_size, told[0].num_vectors) == (6.25e-4 * 8, 8, 2)
    assert told[0].distance_weight == 1e-5
    with pytest.raises(UserError, match="options: preset='quick'"):
        settings_of(CrossInitSettings, {"preset": "quick"}, "options")


def test_names_are_averaged_by_position(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    first = embedding_of(base, "dog", "teddy", "red").mean(dim=0)
    last = embedding_of(base, "dog", "bear", "dog").mean(dim=0)
    assert torch.allclose(mean_names(base, NAMES, 2), torch.stack([first, last]))
    middle = embedding_of(base, "dog", "teddy", "teddy").mean(dim=0)  # half way lies between: the even place
    assert torch.allclose(mean_names(base, NAMES, 3), torch.stack([first, middle, last]))


def test_the_word_starts_as_the_text_encoders_states_of_the_mean_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Against the stock text encoder, the mean name put into an enlarged embedding matrix."""
    base = tiny_base(tiny_model)
    stock = copy.deepcopy(base.pipeline.text_encoder)
    module = METHOD.build(base, [concept()], CrossInitSettings(names=names_file(tmp_path)))
    ids = encode_ids(base.pipeline.tokenizer, module.learned.expand("z"))[None]
    first, second = module.learned.ids.tolist()
    assert ids[0, :4].tolist() == [base.pipeline.tokenizer.bos_token_id, first, second, ids.where(ids < first, 0).max()]
    stock.resize_token_embeddings(second + 1, mean_resizing=False)
    stock.embeddings.token_embedding.weight.data[[first, second]] = mean_names(base, NAMES, 2)
    states = stock(ids).last_hidden_state[0, 1:3]
    assert torch.allclose(module.tensors()["words.z"], states, atol=1e-5)


def test_a_given_word_stands_in_for_the_names(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_base(tiny_model)
    given = METHOD.build(base, [concept("y")], settings_of(CrossInitSettings, {"init_words": "teddy dog"}, "options"))
    file = tmp_path / "one.txt"
    file.write_text("teddy dog")
    as_name = METHOD.build(base, [concept("x")], CrossInitSettings(names=file))
    assert torch.equal(given.tensors()["words.y"], as_name.tensors()["words.x"])
    with pytest.raises(UserError, match="init word 'quokka': is unknown"):
        METHOD.build(base, [concept()], CrossInitSettings(init_words=("quokka",)))


def test_without_a_list_names_are_the_nouns_that_toybox_models_were_trained_with() -> None:
    names, subjects = settings_names(None), SubjectArchive().subjects
    assert set(names) == {subject.noun for subject in subjects if subject.split == "train"}
    assert {subject.noun for subject in subjects if subject.split == "heldout"} - set(names)


def test_lists_that_hold_no_name_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n - \n")
    with pytest.raises(UserError, match="empty.txt: holds no name; expected one a line"):
        settings_names(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="none.txt: cannot be read as text"):
        settings_names(tmp_path / "none.txt")
    with pytest.raises(UserError, match="names and init_words: a word starts from one of them"):
        settings_names(tmp_path / "empty.txt", ["dog"])


def test_the_loss_pulls_back_to_the_start(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Rows 3 and 1 away from their start: mean distance 2."""
    base, names = tiny_base(tiny_model), names_file(tmp_path)
    module = METHOD.build(base, [concept()], CrossInitSettings(names=names, distance_weight=0.5))
    batch = tiny_batch("a z on the beach")
    loss, metrics = module(batch, SampleDraws(0, 0, [0]), 0)
    assert torch.equal(loss, metrics["denoising"]) and metrics["distance"] == 0
    loss.backward()
    rows = module.learned.each[0].static.rows
    assert rows.grad.isfinite().all()
    with torch.no_grad():
        rows[0, 0] += 3
        rows[1, 5] -= 1
    loss, metrics = module(batch, SampleDraws(0, 0, [0]), 0)
    assert torch.allclose(metrics["distance"], torch.tensor(2.0))
    assert torch.allclose(loss - metrics["denoising"], torch.tensor(1.0))


def test_a_word_draws_from_its_file_what_it_drew_in_training(tiny_model: TinyModel, tmp_path: Path) -> None:
    module = METHOD.build(tiny_base(tiny_model), [concept()], CrossInitSettings(names=names_file(tmp_path)))
    file = written_and_read(module, METHOD.name, tmp_path / "z.safetensors")
    again = tiny_base(tiny_model)
    install_refinements(again.pipeline, [file], again.name)
    assert set(file.tensors) == {"words.z"} and file.words == {"z": {"vectors": 2}}
    assert torch.equal(drawn(again.pipeline, "a z on the beach"), drawn(module.base.pipeline, "a z on the beach"))


def test_a_few_steps_lower_the_loss_on_toybox() -> None:
    shown = toybox_concept("ci")
    module = METHOD.build(toybox_base(), [shown], CrossInitSettings())
    losses = losses_on_toybox(module, shown, 5e-2, 8)
    assert losses[-1] < 0.99 * losses[0]
