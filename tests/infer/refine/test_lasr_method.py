"""LASR put together: how a word starts, what is minimised at which step, and files that come back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from infer.refine.install import install_refinements
from infer.refine.method import denoising_error
from infer.refine.methods.lasr import METHOD, LasrModule, LasrSettings, compositions, spread
from infer.refine.prompts import composed
from infer.refine.words import fitting, noised, prompt_inputs
from infer.refine.zero_shot_start import zero_shot_vector
from model.lasr.composition_delta import composition_delta_loss
from model.lasr.regulariser import lasr_regulariser
from model.prompt import encode_ids
from model.text_fusion import WordRows, encode_prompt
from tests.infer.refine.tiny_base import (
    SIZE,
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
from tests.model.tiny import wake
from train.draws import SampleDraws

PROMPTS = ["a z on", "the z is"]


def built(model: TinyModel, **options: object) -> LasrModule:
    """A word of the tiny base, moved at random from its start."""
    torch.manual_seed(0)
    module = METHOD.build(tiny_base(model), [concept()], settings_of(LasrSettings, dict(options), "options"))
    wake(module.learned.each[0])
    return module


def step_of(module: LasrModule, step: int, prompts: list[str] = PROMPTS) -> tuple[Tensor, dict[str, Tensor]]:
    batch = tiny_batch(*prompts)
    loss, metrics = module(batch, SampleDraws(0, 0, batch.numbers), step)
    return loss, metrics


def test_the_defaults_are_the_published_ones() -> None:
    told = LasrSettings()
    assert (told.steps, told.batch_size, told.learning_rate, told.warmup_steps) == (4000, 2, 1e-3, 500)
    assert (told.decay, told.decay_to) == ("cosine", 0.2)
    assert (told.rank_ratio, told.adaptive_weight, told.mode, told.pooling) == (2, 0.5, "exact", "average")
    assert (told.delta_weight, told.regulariser_weight, told.compositions) == (0.005, 0.05, 2)
    assert (told.adaptive_delta_every, told.adaptive_delta_boost) == (5, 5)
    assert (told.variation.flip, told.variation.shrink, told.variation.shrink_to) == (0.5, 0.5, 0.7)


def test_a_word_starts_from_init_words_weights_and_negative_words(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    options = {"init_words": "teddy dog", "init_word_weights": [1, 3], "negative_words": "mug", "num_vectors": 2}
    module = METHOD.build(base, [concept()], settings_of(LasrSettings, options, "options"))
    [word] = module.learned
    for basis in (word.static.basis, word.adaptive.basis):
        assert torch.equal(basis.init_vectors, embedding_of(base, "teddy", "dog").expand(2, -1, -1))
        assert torch.equal(basis.extra_vectors[:, 0], -embedding_of(base, "mug").expand(2, -1))
        assert (basis.rank, basis.num_layers) == (2 * 2 + 1 + 1, 7)
    shares = word.static.common_coefficients
    assert torch.allclose(shares, torch.tensor([0.25, 0.75, 0.2, 0.2, 0.2, 0.2]).expand(2, -1))
    assert word.adaptive_weight == 0.5 and word.num_vectors == 2


def test_without_init_words_it_starts_from_the_class_word(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    [word] = METHOD.build(base, [concept()], LasrSettings()).learned
    assert torch.equal(word.static.basis.init_vectors[0], embedding_of(base, "dog"))
    both = [concept("x"), concept("y")]
    with pytest.raises(UserError, match="init_words: 2 concepts are learnt; leave them out"):
        METHOD.build(base, both, LasrSettings(init_words=("dog",)))
    assert len(list(METHOD.build(base, both, LasrSettings()).learned)) == 2


def test_started_from_zero_shot_its_rows_are_the_prediction(tiny_model: TinyModel) -> None:
    base, shown = tiny_base(tiny_model), concept()
    [word] = METHOD.build(base, [shown], LasrSettings(start="zero_shot")).learned
    with torch.no_grad():  # all that parts the layers at the start is small and random
        word.static.layer_coefficients.zero_()
        word.static.common_coefficients[:, 1:] = 0
    vector = zero_shot_vector(base, shown)
    assert torch.allclose(word.static_rows(), vector.expand(7, 1, -1), atol=1e-3)


def test_unknown_negative_words_and_weights_that_do_not_fit_are_told_in_one_line(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    with pytest.raises(UserError, match="init word 'quokka': is unknown"):
        METHOD.build(base, [concept()], LasrSettings(negative_words=("quokka",)))
    with pytest.raises(UserError, match="init word weights: 1 for 2 words"):
        METHOD.build(base, [concept()], LasrSettings(init_words=("teddy", "dog"), init_word_weights=(1.0,)))


def test_class_tokens_take_as_many_places_as_the_word_has() -> None:
    rows = torch.tensor([[1.0], [2.0], [4.0]])
    assert torch.equal(spread(rows, 3), rows)
    assert torch.allclose(spread(rows, 1), torch.tensor([[7 / 3]]))
    assert torch.equal(spread(rows[:1], 2), torch.tensor([[1.0], [1.0]]))


def test_phrases_follow_the_samples_and_pass_the_regularisation_over() -> None:
    batch = tiny_batch("a z on", "a dog", "the z is", prior=[False, True, False])
    found = compositions(batch, SampleDraws(0, 0, batch.numbers), 3)
    assert found.samples.tolist() == [0, 2, 0] and found.held.tolist() == [0, 1, 0]
    seeds = SampleDraws(0, 0, batch.numbers).integers(2**31 - 1).tolist()
    expected = [
        composed("a z on", np.random.default_rng((seeds[0], 0))),
        composed("the z is", np.random.default_rng((seeds[2], 0))),
        composed("a z on", np.random.default_rng((seeds[0], 1))),
    ]
    assert list(found.texts) == expected and all(len(text) > 6 for text in expected)
    none = compositions(tiny_batch("a dog", prior=[True]), SampleDraws(0, 0, [0]), 2)
    assert none.texts == () and len(none.samples) == 0


def test_long_compositions_lose_words_at_their_end(tiny_model: TinyModel) -> None:
    pipeline = built(tiny_model).base.pipeline
    short = fitting(pipeline, "a z on the beach " + "by the sea " * 20)
    assert short.startswith("a z on the beach by") and len(short) < 80
    prompt_inputs(pipeline, [short])
    assert fitting(pipeline, "a z on the beach") == "a z on the beach"


def test_the_loss_is_its_four_parts_and_the_adaptive_delta_comes_every_fifth_step(tiny_model: TinyModel) -> None:
    module = built(tiny_model)
    [word] = module.learned
    for step in range(7):
        loss, found = step_of(module, step)
        adaptive = torch.nan_to_num(found["adaptive_delta"])
        assert (adaptive > 0) == (step in (0, 5))
        expected = found["denoising"] + 0.005 * (found["delta"] + 5 * adaptive) + 0.05 * found["regulariser"]
        assert torch.allclose(loss, expected, rtol=1e-6)
        assert torch.allclose(found["regulariser"], lasr_regulariser(word.static, word.adaptive))


def test_the_static_delta_compares_with_the_class_words_prompts(tiny_model: TinyModel) -> None:
    """Against prompts encoded one layer at a time, the class prompts by the stock text encoder."""
    module = built(tiny_model)
    pipeline, batch = module.base.pipeline, tiny_batch(*PROMPTS)
    draws = SampleDraws(0, 0, batch.numbers)
    noised(module.schedule, batch.latents, draws)
    draws.uniform()  # the factor on the adaptive weight comes before the phrases
    texts = [fitting(pipeline, text) for text in compositions(batch, draws, 2).texts]

    def ids_of(prompts: list[str]) -> Tensor:
        return torch.stack([encode_ids(pipeline.tokenizer, module.learned.expand(text)) for text in prompts])

    def layerwise(prompts: list[str]) -> Tensor:
        nowhere = torch.zeros(len(prompts), 0, dtype=torch.int64)
        rows = module.learned.static_rows()
        table = [WordRows(module.learned.ids, rows[layer]) for layer in range(7)]
        ids = ids_of(prompts)
        found = [encode_prompt(pipeline.text_encoder, ids, None, nowhere, words=words) for words in table]
        return torch.stack(found, dim=1)

    def of_class(prompts: list[str]) -> Tensor:
        states: Tensor = pipeline.text_encoder(ids_of([p.replace(" z ", " dog ") for p in prompts])).last_hidden_state
        return states[:, None]

    expected = composition_delta_loss(layerwise(PROMPTS), layerwise(texts), of_class(PROMPTS), of_class(texts))
    for step in (0, 1):  # with and without the adaptive delta beside it
        assert torch.allclose(step_of(module, step)[1]["delta"], expected, atol=1e-5)


def test_composed_prompts_beside_them_do_not_change_what_the_samples_see(tiny_model: TinyModel) -> None:
    module = built(tiny_model)
    together, alone = step_of(module, 0)[1], step_of(module, 1)[1]
    assert torch.allclose(together["denoising"], alone["denoising"], rtol=1e-4)


def test_the_adaptive_weight_varies_with_the_sample_and_features_are_those_of_the_valid_region(
    tiny_model: TinyModel,
) -> None:
    module, batch = built(tiny_model), tiny_batch(*PROMPTS)
    pipeline = module.base.pipeline
    draws = SampleDraws(0, 0, batch.numbers)
    noisy = noised(module.schedule, batch.latents, draws)
    factor = 0.8 + 0.6 * draws.uniform()

    def error(**options: Tensor) -> Tensor:
        model = pipeline.subject_model
        context, condition = model.encode(prompt_inputs(pipeline, PROMPTS), SIZE, **options)
        prediction = model.denoise(noisy.noisy, noisy.timesteps, context, condition)
        return denoising_error(module.schedule, prediction, batch, noisy.noise, noisy.timesteps).mean()

    found = step_of(module, 1)[1]["denoising"]
    assert torch.allclose(found, error(valid=batch.valid, adaptive_factor=factor), rtol=1e-5)
    for other in (error(adaptive_factor=factor), error(valid=batch.valid)):
        assert not torch.allclose(found, other, rtol=1e-6)


@pytest.mark.parametrize("pooling", ["average", "attention"])
def test_gradients_reach_every_tensor(pooling: str, tiny_model: TinyModel) -> None:
    module = built(tiny_model, pooling=pooling, num_vectors=2)
    step_of(module, 0)[0].backward()
    silent = [name for name, parameter in module.named_parameters() if not parameter.grad.abs().sum() > 0]
    # A softmax over places does not change when every key is worth the same: with one place in a layer it has no say.
    assert [name for name in silent if ".pools." not in name] == []


def test_without_adaptive_weight_or_delta_only_the_static_word_is_learnt(tiny_model: TinyModel) -> None:
    module = built(tiny_model, adaptive_weight=0, delta_weight=0)
    [word] = module.learned
    loss, found = step_of(module, 0)
    assert word.adaptive is None and math.isnan(found["delta"]) and math.isnan(found["adaptive_delta"])
    assert torch.allclose(loss, found["denoising"] + 0.05 * lasr_regulariser(word.static))


def test_a_batch_of_regularisation_alone_has_no_delta(tiny_model: TinyModel) -> None:
    module, batch = built(tiny_model), tiny_batch("a dog", prior=[True])
    loss, found = module(batch, SampleDraws(0, 0, [0]), 0)
    assert loss.isfinite() and math.isnan(found["delta"])


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_word_draws_from_its_file_what_it_drew_in_training(mode: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    module = built(tiny_model, mode=mode, num_vectors=2, scale=1.5)
    file = written_and_read(module, METHOD.name, tmp_path / "z.safetensors", mode=mode)
    again = tiny_base(tiny_model)
    install_refinements(again.pipeline, [file], again.name)
    assert again.pipeline.words.mode == mode
    assert torch.equal(again.pipeline.words.static_rows(), module.learned.static_rows())
    assert torch.equal(drawn(again.pipeline, "a z on the beach"), drawn(module.base.pipeline, "a z on the beach"))


def test_a_few_steps_lower_the_loss_on_toybox() -> None:
    shown = toybox_concept("la")
    torch.manual_seed(0)
    module = METHOD.build(toybox_base(), [shown], LasrSettings())
    losses = losses_on_toybox(module, shown, 1e-2, 8)
    assert losses[-1] < 0.99 * losses[0]
