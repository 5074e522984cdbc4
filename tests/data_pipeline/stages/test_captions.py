"""Captions: tidied alt texts, and BLIP-2 and BLIP as real classes with tiny random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import GenerationConfig

from data_pipeline.errors import UserError
from data_pipeline.record import Provenance
from data_pipeline.stages.caption import first_line, plain_generation, tidy
from data_pipeline.stages.caption.alt_text import AltTextSettings
from data_pipeline.stages.caption.blip import BlipSettings
from data_pipeline.stages.caption.blip2 import Blip2Settings
from tests.data_pipeline.stages.tiny_networks import LINE_BREAK, save_tiny_blip, save_tiny_blip2

KINDS = ["blip2", "blip2-t5", "blip"]


def pictures() -> list[np.ndarray]:
    """Four of different sizes; a flat one, a very wide one, a very high one, a black one."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((3, 90), (100, 30))]
    return [np.full((40, 60, 3), (255, 0, 0), np.uint8), *noise, np.zeros((28, 28, 3), np.uint8)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("captioners")
    return {
        "blip2": save_tiny_blip2(folder / "blip2"),
        "blip2-t5": save_tiny_blip2(folder / "blip2-t5", "t5"),
        "blip": save_tiny_blip(folder / "blip"),
    }


def load(kind: str, folder: Path, **options: object) -> Any:
    settings = BlipSettings if kind == "blip" else Blip2Settings
    return settings.model_validate({"model": str(folder), "max_new_tokens": 8, **options}).load("cpu")


def write(captioner: Any, shown: list[np.ndarray]) -> list[str]:
    return captioner.caption(shown, [""] * len(shown))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("prompt", ["", "a photo of"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_the_same_alone_and_in_a_batch_of_other_sizes(
    folders: dict[str, Path], kind: str, prompt: str, num_beams: int
) -> None:
    captioner = load(kind, folders[kind], prompt=prompt, num_beams=num_beams)
    together = write(captioner, pictures())
    assert together == [write(captioner, [picture])[0] for picture in pictures()]
    assert len(set(together)) > 1  # the pictures are looked at
    assert together == write(captioner, pictures())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_words_scores_are_the_same_alone_and_in_a_batch(folders: dict[str, Path], kind: str) -> None:
    captioner = load(kind, folders[kind], prompt="a photo of")
    pixels = captioner.pixels(pictures())
    prompt = captioner.prompt.repeat(4, 1)
    network = captioner.network
    more = {"decoder_input_ids": torch.ones(1, 1, dtype=torch.long)} if kind == "blip2-t5" else {}
    together = network(
        pixel_values=pixels, input_ids=prompt, **{name: value.repeat(4, 1) for name, value in more.items()}
    ).logits  # (4, T, V)
    alone = [
        network(pixel_values=captioner.pixels([picture]), input_ids=prompt[:1], **more).logits for picture in pictures()
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)
    assert (together[0] - together[3]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_steers_the_caption_and_is_not_in_it(folders: dict[str, Path], kind: str) -> None:
    without, steered = (write(load(kind, folders[kind], prompt=prompt), pictures()) for prompt in ("", "a photo of"))
    assert without != steered
    assert not any(caption.startswith("a photo of") for caption in steered)
    assert all(len(caption.split()) <= 8 for caption in steered)


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_has_at_most_as_many_tokens_as_asked_for(folders: dict[str, Path], kind: str) -> None:
    long, short = (write(load(kind, folders[kind], max_new_tokens=count), pictures()) for count in (8, 2))
    assert max(len(caption.split()) for caption in short) == 2
    assert max(len(caption.split()) for caption in long) in range(3, 9)
    assert all(more.startswith(few) for more, few in zip(long, short, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_reaches_the_language_model(folders: dict[str, Path], kind: str, dtype: str) -> None:
    captioner = load(kind, folders[kind], dtype=dtype)
    network = captioner.network
    language = network.text_decoder if kind == "blip" else network.language_model
    assert {language.dtype, network.vision_model.dtype} == {getattr(torch, dtype)}
    assert len(write(captioner, pictures())) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_and_penalties_in_the_folder_change_nothing(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    wild = shutil.copytree(folders[kind], tmp_path / kind)
    rules = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "num_beams": 4, "min_length": 8}
    config = json.loads((wild / "config.json").read_text())
    config["text_config"].update(rules)
    (wild / "config.json").write_text(json.dumps(config))
    own = json.loads((wild / "generation_config.json").read_text())
    (wild / "generation_config.json").write_text(json.dumps({**own, **rules}))
    captioner = load(kind, wild)
    assert write(captioner, pictures()) == write(load(kind, folders[kind]), pictures())


def test_only_the_numbers_of_special_tokens_are_taken_from_the_models_own_rules() -> None:
    outer = GenerationConfig(eos_token_id=[50118, 2], do_sample=True, temperature=3.0, length_penalty=2.0)
    inner = GenerationConfig(eos_token_id=2, bos_token_id=2, pad_token_id=1, repetition_penalty=2.0)
    plain = plain_generation((outer, inner), num_beams=5, max_new_tokens=30)
    assert (
        plain.to_diff_dict().items()
        >= {
            "bos_token_id": 2,
            "eos_token_id": [50118, 2],
            "pad_token_id": 1,
            "max_new_tokens": 30,
            "num_beams": 5,
        }.items()
    )
    assert (plain.do_sample, plain.temperature, plain.length_penalty, plain.repetition_penalty) == (False, *[None] * 3)


def test_a_line_break_ends_a_caption_of_blip2(folders: dict[str, Path]) -> None:
    captioner = load("blip2", folders["blip2"])
    number = captioner.processor.tokenizer.convert_tokens_to_ids(LINE_BREAK)
    assert number in captioner.network.language_model.generation_config.eos_token_id
    assert any(len(caption.split()) < 8 for caption in write(captioner, pictures()))


def test_an_older_processor_that_does_not_count_its_places_is_told_how_many(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    older = shutil.copytree(folders["blip2"], tmp_path / "older")
    said = json.loads((older / "processor_config.json").read_text())
    said.pop("num_query_tokens")
    (older / "processor_config.json").write_text(json.dumps(said))
    assert write(load("blip2", older), pictures()) == write(load("blip2", folders["blip2"]), pictures())


def test_files_of_an_older_transformers_are_refused_instead_of_captioning_nothing(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    older = shutil.copytree(folders["blip2"], tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    config["image_token_index"] = None
    (older / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^caption\.model=.*image_token_index=None.*take the model's newest revision$"):
        load("blip2", older)


def test_one_captioner_does_not_take_the_others_model(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="holds a network of type 'blip-2'; expected blip$"):
        load("blip", folders["blip2"])
    with pytest.raises(UserError, match="holds a network of type 'blip'; expected blip-2$"):
        load("blip2", folders["blip"])


@pytest.mark.parametrize("kind", KINDS)
def test_provenance_names_backend_folder_and_content(folders: dict[str, Path], kind: str) -> None:
    provenance = load(kind, folders[kind]).provenance
    assert (provenance.backend, provenance.model) == (kind.removesuffix("-t5"), kind)
    assert provenance.revision.startswith("sha256:")


@pytest.mark.parametrize("kind", KINDS)
def test_no_pictures_give_no_captions(folders: dict[str, Path], kind: str) -> None:
    assert write(load(kind, folders[kind]), []) == []


def test_alt_texts_are_tidied_and_may_be_empty() -> None:
    captioner = AltTextSettings().load("cpu")
    given = ["  a\tdog \r\n on the\u00a0grass\x00 ", "\u200b \ufeff\n", "", "me\u0301nage \u202eleft", "\ud800 half"]
    assert captioner.caption([np.zeros((1, 1, 3), np.uint8)] * 5, given) == [
        "a dog on the grass",
        "",
        "",
        "me\u0301nage left",
        "half",
    ]
    assert captioner.provenance == Provenance("alt_text")


def test_joiners_that_belong_to_words_and_emoji_stay() -> None:
    assert tidy("\u0645\u06cc\u200c\u0631\u0648\u0645 \U0001f468\u200d\U0001f469") == (
        "\u0645\u06cc\u200c\u0631\u0648\u0645 \U0001f468\u200d\U0001f469"
    )


def test_a_caption_is_the_first_line_that_says_something() -> None:
    assert first_line("\n  a dog   on grass \nQuestion: what?\n") == "a dog on grass"
    assert first_line(" \n") == ""


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"max_new_tokens": 0}, {"num_beams": 0}, {"dtype": "int8"}])
def test_settings_that_cannot_work_are_refused(bad: dict[str, object]) -> None:
    for settings in (Blip2Settings, BlipSettings):
        with pytest.raises(ValidationError):
            settings.model_validate(bad)
