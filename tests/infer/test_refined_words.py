"""Learned words through the pipeline: placeholders in prompts and negative prompts, beside subjects from references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipeline.errors import UserError
from infer.conditions import PictureRequest, ReferenceFeatures, build_inputs
from infer.pipeline import SubjectDiffusionPipeline
from infer.subjects import Subject
from model.learned_words import LearnedWords
from tests.infer.tiny_model import TinyModel
from tests.model.tiny_words import lasr_word, plain_word

Cutout = Callable[..., Image.Image]


def draw(pipeline: SubjectDiffusionPipeline, prompt: str, subjects: Any = None, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": generator, **options}
    return pipeline(prompt, subjects, **options).images


@pytest.fixture(scope="module")
def words(tiny_model: TinyModel) -> SubjectDiffusionPipeline:
    """A pipeline with an adaptive word z, another y of two vectors, and a plain word v."""
    pipeline = SubjectDiffusionPipeline.from_pretrained(tiny_model.subject)
    pipeline.set_progress_bar_config(disable=True)
    model, tokenizer = pipeline.subject_model, pipeline.tokenizer
    pipeline.words = LearnedWords(
        [
            lasr_word(model, tokenizer, "z"),
            lasr_word(model, tokenizer, "y", 2, seed=1),
            plain_word(model, tokenizer, "v"),
        ]
    )
    pipeline.words.requires_grad_(False)
    return pipeline


def test_several_words_and_a_subject_from_a_photo_meet_in_one_picture(words, cutout: Cutout) -> None:
    prompt, dog = "a z hugging a y beside a dog", [Subject("dog", [cutout()])]
    whole = draw(words, prompt, dog)
    without = [draw(words, prompt.replace(f"a {word}", "a mug"), dog) for word in ("z", "y")] + [draw(words, prompt)]
    assert whole.isfinite().all()
    assert all(not torch.allclose(whole, other, atol=1e-3) for other in without)
    assert torch.equal(whole, draw(words, prompt, dog))


@pytest.mark.parametrize("guidance", ["separate", "joint", "none"])
def test_every_guidance_takes_words_in_prompts_and_negative_prompts(words, cutout: Cutout, guidance) -> None:
    subjects = [Subject("dog", [cutout()])]
    usual = draw(words, "a dog with a v", subjects, guidance=guidance)
    negative = draw(words, "a dog with a v", subjects, guidance=guidance, negative_prompt="a Z")
    assert usual.isfinite().all() and torch.equal(usual, negative) == (guidance == "none")


def test_fast_mode_draws_nearly_what_exact_mode_draws(words) -> None:
    exact = draw(words, "a z on the beach", num_inference_steps=4)
    words.words.mode = "fast"
    fast = draw(words, "a z on the beach", num_inference_steps=4)
    words.words.mode = "exact"
    assert not torch.equal(fast, exact)
    assert (fast - exact).norm() < 0.5 * (draw(words, "a mug on the beach", num_inference_steps=4) - exact).norm()


def test_the_plain_base_takes_the_words_over(words) -> None:
    prompt = "a z on the beach"
    assert draw(words, prompt, subject_until=0.5).isfinite().all()
    assert not torch.allclose(
        draw(words, prompt, subject_until=0.0), draw(words, "a mug", subject_until=0.0), atol=1e-3
    )


def test_prompts_without_words_draw_as_before_bit_for_bit(words, cutout: Cutout) -> None:
    subjects = [Subject("dog", [cutout()])]
    kept, with_words = words.words, draw(words, "a dog", subjects)
    words.words = None
    without = draw(words, "a dog", subjects)
    words.words = kept
    assert torch.equal(with_words, without)


def test_words_belong_to_the_pipelines_fingerprint(words) -> None:
    kept, fingerprint = words.words, words.fingerprint()
    words.words = None
    assert words.fingerprint() != fingerprint
    words.words = kept


def test_noun_positions_are_those_of_the_expanded_prompt(words, cutout: Cutout) -> None:
    request = PictureRequest("a y and a dog", subjects=(Subject("dog", [cutout()]),))
    features = ReferenceFeatures()
    inputs = build_inputs([request], words.tokenizer, words.image_encoder, features, words.words)
    dog = words.tokenizer.convert_tokens_to_ids("dog</w>")
    assert inputs.input_ids[0, :7].tolist()[2:4] == list(words.words.ids[1:3])
    assert inputs.input_ids[0, 6] == dog and inputs.noun_ids[0, 0, 0] == dog


def test_a_subject_named_by_a_refined_word_is_refused(words, cutout: Cutout) -> None:
    with pytest.raises(UserError, match="subject z: 'z' is a refined word, which needs no reference"):
        draw(words, "a z", [Subject("z", [cutout()])])


def test_a_prompt_that_is_too_long_is_told_as_the_person_wrote_it(words) -> None:
    with pytest.raises(UserError, match="prompt 'y y"):
        draw(words, " ".join(["y"] * 20))


def test_a_plain_base_draws_words_but_no_photos(words, cutout: Cutout) -> None:
    parts = {name: getattr(words, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    plain = SubjectDiffusionPipeline(**parts, unet=words._plain_base()[0], adapter=None, image_encoder=None)
    plain.set_progress_bar_config(disable=True)
    plain.words = words.words
    assert draw(plain, "a z").isfinite().all()
    with pytest.raises(UserError, match="subject dog: a plain base draws none from photos"):
        draw(plain, "a dog", [Subject("dog", [cutout()])])
