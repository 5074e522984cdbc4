"""model/layer_contexts.py, causal_text.py, lasr/adaptive_prompts.py: contexts by layer, pinned by recomputation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from model.attention_maps import (
    AttentionMapRecorder,
    cross_attention_layers,
    install_layer_contexts,
    install_recording,
    supervised_layers,
)
from model.causal_text import encode_onward
from model.composition import SubjectDiffusionModel
from model.inputs import SubjectInputs
from model.learned_words import LearnedWord, LearnedWords
from model.text_fusion import WordRows, embed_prompt, encode_embeddings
from tests.model.tiny import LATENTS, TEXT_WIDTH, tiny_subject_model, tiny_text_encoder, tiny_unet
from tests.model.tiny_inputs import tiny_inputs
from tests.model.tiny_tokenizer import tiny_tokenizer
from tests.model.tiny_words import lasr_word, plain_word

SIZE = (LATENTS[1], LATENTS[2])
LAYERS = 7
LATENT = torch.randn(3, *LATENTS, generator=torch.Generator().manual_seed(1))
TIMESTEPS = torch.tensor([10, 500, 900])


def prompt_inputs(model: SubjectDiffusionModel, texts: list[str], tokenizer) -> SubjectInputs:
    """Rows of the texts: the first with subjects of its own, the others without."""
    assert model.words is not None
    captions = [(model.words.expand(text), ("mug",) if index == 0 else ()) for index, text in enumerate(texts)]
    return tiny_inputs(tuple(captions), tokenizer=tokenizer)


@pytest.fixture(params=["average", "attention"])
def model(request) -> SubjectDiffusionModel:
    """Two LASR words (one of two vectors) and a plain one."""
    model, tokenizer = tiny_subject_model(), tiny_tokenizer()
    z = lasr_word(model, tokenizer, "z", attention=request.param == "attention")
    y = lasr_word(model, tokenizer, "y", vectors=2, seed=1)
    y.adaptive_weight, y.scale = 0.3, 0.7
    model.words = LearnedWords([z, y, plain_word(model, tokenizer, "v")])
    model.__dict__["tokenizer"] = tokenizer
    return model.requires_grad_(False)


@pytest.fixture
def inputs(model) -> SubjectInputs:
    return prompt_inputs(model, ["a v with a z hugging a y, a mug", "a mug on a v", "a z"], model.__dict__["tokenizer"])


def encode(model: SubjectDiffusionModel, inputs: SubjectInputs, rows: list[torch.Tensor]) -> torch.Tensor:
    """Text states with these rows (B, K, D) of the words, the whole prompt through the stock encoder."""
    words = WordRows(model.words.ids, torch.cat(rows, dim=1))
    concepts = model.adapter.concepts(inputs, model.text_encoder.embeddings.token_embedding)
    fusion = {"fusion": model.adapter.config["fusion"], "scale": model.adapter.config["fusion_scale"]}
    embedded = embed_prompt(
        model.text_encoder, inputs.input_ids, concepts, inputs.placeholder_positions, words=words, **fusion
    )
    return encode_embeddings(model.text_encoder, embedded)


def slow_prediction(model: SubjectDiffusionModel, inputs: SubjectInputs) -> torch.Tensor:
    """The same by hooks: every layer encodes the whole prompt of every row twice, static and adaptive."""
    unet, (z, y, v) = model.unet, model.words
    time = unet.time_embedding(unet.time_proj(TIMESTEPS))
    weights = torch.tensor([(0.5 + 0.3) / 2, 0.0, 0.5])[:, None, None]  # of the words that a row holds
    rows = len(inputs)

    def hook(index):
        def replace_context(attention, args, kwargs):
            adaptive = []
            for word in (z, y):
                pooled = word.adaptive.pool(index, args[0], None, word.static_rows()[index], attention)
                adaptive.append(word.adaptive(index, pooled, time) * word.scale)
            static = [word.static_rows()[index].expand(rows, -1, -1) for word in (z, y)]
            plain = v.static_rows().expand(rows, -1, -1)
            first, second = encode(model, inputs, [*static, plain]), encode(model, inputs, [*adaptive, plain])
            return args, {**kwargs, "encoder_hidden_states": (1 - weights) * first + weights * second}

        return replace_context

    handles = [
        unet.get_submodule(name).register_forward_pre_hook(hook(index), with_kwargs=True)
        for index, name in enumerate(cross_attention_layers(unet))
    ]
    condition = model.adapter.condition(inputs, SIZE)
    context = torch.zeros(rows, inputs.input_ids.shape[1], TEXT_WIDTH)
    prediction = model.denoise(LATENT, TIMESTEPS, context, condition)
    for handle in handles:
        handle.remove()
    return prediction


# --- exact


def test_exact_mode_equals_a_slow_recomputation_layer_by_layer(model, inputs) -> None:
    prediction = model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE))
    torch.testing.assert_close(prediction, slow_prediction(model, inputs), atol=1e-4, rtol=1e-4)


def test_the_adaptive_part_matters(model, inputs) -> None:
    with_it = model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE))
    for word in model.words:
        word.adaptive_weight = 0.0
    static = model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE))
    assert (with_it - static)[[0, 2]].abs().amax() > 1e-3
    torch.testing.assert_close(with_it[1], static[1])


def test_concepts_after_the_encoder_stay_what_they_are() -> None:
    model, tokenizer = tiny_subject_model(fusion="after", fusion_scale=0.4), tiny_tokenizer()
    words = [lasr_word(model, tokenizer, "z"), lasr_word(model, tokenizer, "y", 2, seed=1)]
    words[1].adaptive_weight = 0.3
    model.words = LearnedWords([*words, plain_word(model, tokenizer, "v")])
    model.requires_grad_(False)
    words[1].scale = 0.7
    inputs = prompt_inputs(model, ["a v with a z hugging a y, a mug", "a mug on a v", "a z"], tokenizer)
    prediction = model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE))
    torch.testing.assert_close(prediction, slow_prediction(model, inputs), atol=1e-4, rtol=1e-4)


def test_rows_without_layerwise_words_have_their_plain_context(model, inputs) -> None:
    context, condition = model.encode(inputs, SIZE)
    contexts = condition.layer_contexts
    assert contexts.rows.tolist() == [0, 2] and contexts.static.shape[:2] == (LAYERS, 2)
    alone = encode(
        model, inputs, [torch.zeros(3, 3, TEXT_WIDTH), model.words.word_rows(0).rows[None, 3:].expand(3, -1, -1)]
    )
    torch.testing.assert_close(context[1], alone[1])
    torch.testing.assert_close(contexts.at(torch.zeros(3, 64))(2, torch.zeros(3, 64, 32))[1], context[1])


def test_features_are_pooled_over_the_valid_region_and_the_weight_may_vary(model, inputs) -> None:
    valid = torch.ones(3, 1, *SIZE)
    valid[..., 4:] = 0
    usual = model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE))
    masked = model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE, valid=valid))
    assert (usual - masked)[[0, 2]].abs().amax() > 1e-5
    factor = torch.tensor([1.4, 1.0, 0.0])
    weighted = model.encode(inputs, SIZE, adaptive_factor=factor)[1].layer_contexts.adaptive.weight
    torch.testing.assert_close(weighted.flatten(), torch.tensor([0.4 * 1.4, 0.0]))


def test_adaptive_contexts_need_the_time(model, inputs) -> None:
    contexts = model.encode(inputs, SIZE)[1].layer_contexts
    with pytest.raises(ValueError, match="call `at` before each UNet pass"):
        contexts(0, torch.zeros(3, 64, 16))


def test_the_adaptive_states_of_a_pass_can_be_kept(model, inputs) -> None:
    context, condition = model.encode(inputs, SIZE)
    condition.layer_contexts = replace(condition.layer_contexts, kept={})
    model.denoise(LATENT, TIMESTEPS, context, condition)
    kept = condition.layer_contexts.kept
    assert sorted(kept) == list(range(LAYERS)) and kept[0].shape == (2, *context.shape[1:])


# --- training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_tensor_of_the_words_with_and_without_checkpointing(model, inputs, checkpointing) -> None:
    model.words.requires_grad_(True)
    model.unet.train()
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE)).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.words.named_parameters()}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    if checkpointing:
        model.unet.disable_gradient_checkpointing()
        model.words.zero_grad()
        model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE)).square().mean().backward()
        for name, parameter in model.words.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name])


def test_the_recorder_works_together_with_layer_contexts(model, inputs) -> None:
    plain = model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE))
    install_recording(model.unet)
    recorder = AttentionMapRecorder(torch.eye(inputs.input_ids.shape[1])[None].expand(3, -1, -1))
    kwargs = {"cross_attention_kwargs": {"recorder": recorder}}
    recorded = model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE), **kwargs)
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-4)
    assert list(recorder.maps) == supervised_layers(model.unet)
    assert type(model.unet.get_submodule(supervised_layers(model.unet)[0]).processor).__name__.startswith("Recording")


# --- fast


def test_the_first_pass_of_fast_mode_is_exact_and_later_ones_use_the_features_before(model, inputs) -> None:
    exact = model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE))
    model.words.mode = "fast"
    context, condition = model.encode(inputs, SIZE)
    torch.testing.assert_close(model.denoise(LATENT, TIMESTEPS, context, condition), exact)
    contexts = condition.layer_contexts
    assert sorted(contexts.previous) == list(range(LAYERS))
    again = model.denoise(LATENT, TIMESTEPS, context, condition)  # same features as before, so only padding differs
    assert (again - exact).abs().amax() < 0.5 * (static_prediction(model, inputs) - exact).abs().amax()


def static_prediction(model: SubjectDiffusionModel, inputs: SubjectInputs) -> torch.Tensor:
    weights = [word.adaptive_weight for word in model.words]
    for word in model.words:
        word.adaptive_weight = 0.0
    prediction = model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE))
    for word, weight in zip(model.words, weights, strict=True):
        word.adaptive_weight = weight
    return prediction


def test_fast_states_up_to_the_end_of_the_text_equal_the_exact_ones_for_equal_features(model, inputs) -> None:
    contexts = model.encode(inputs, SIZE)[1].layer_contexts
    adaptive = contexts.adaptive
    time = torch.randn(2, 64, generator=torch.Generator().manual_seed(4))
    pooled = {}
    for layer, attention in enumerate(adaptive.layers):
        pooled[layer] = adaptive.pool(layer, torch.randn(2, 16, attention.to_q.in_features))
    onward = contexts.static[:, :, adaptive.start :]
    fast = adaptive.encode_all(pooled, time, onward)
    used = adaptive.num_used
    for layer in range(LAYERS):
        exact = adaptive.encode(layer, pooled[layer], time)
        torch.testing.assert_close(fast[layer, :, :used], exact[:, :used], atol=1e-5, rtol=1e-4)
        moved = fast[layer, :, used - 1] - onward[layer, :, used - 1]
        torch.testing.assert_close(
            fast[layer, :, used:] - onward[layer, :, used:], moved[:, None].expand_as(exact[:, used:])
        )


# --- parts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("start", [1, 5, 31])
def test_encoding_in_two_parts_equals_the_stock_encoder(attention, start) -> None:
    encoder = tiny_text_encoder()
    encoder.set_attn_implementation(attention)
    ids = torch.randint(0, 500, (3, 32), generator=torch.Generator().manual_seed(0))
    hidden = encoder.embeddings(input_ids=ids)
    before, past = encode_onward(encoder, hidden[:, :start])
    onward, _ = encode_onward(encoder, hidden[:, start:], past)
    torch.testing.assert_close(torch.cat([before, onward], dim=1), encoder(ids).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_layers_are_counted_in_the_order_they_run() -> None:
    unet, order = tiny_unet(), []
    for name in cross_attention_layers(unet):
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    unet(torch.zeros(1, *LATENTS), 1, torch.zeros(1, 4, TEXT_WIDTH))
    assert order == cross_attention_layers(unet) and len(order) == LAYERS


def test_words_of_another_base_and_foreign_processors_are_refused(model, inputs) -> None:
    z = LearnedWord.plain("z", model.words.ids[:1].tolist(), torch.zeros(LAYERS + 1, 1, TEXT_WIDTH))
    words, model.words = model.words, LearnedWords([z])
    inputs = prompt_inputs(model, ["a mug", "a z", "a mug"], model.__dict__["tokenizer"])
    with pytest.raises(ValueError, match="made for 8 cross-attention layers, this UNet has 7"):
        model.encode(inputs, SIZE)
    model.words = words
    model.unet.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="replaces stock processors only"):
        model.encode(inputs, SIZE)


def test_installing_layer_contexts_keeps_the_maps_of_a_recorder() -> None:
    unet = tiny_unet()
    install_recording(unet)
    install_layer_contexts(unet)
    assert unet.get_submodule(supervised_layers(unet)[0]).processor.layer is not None


def test_a_plain_base_without_adapter_draws_words() -> None:
    model, tokenizer = SubjectDiffusionModel(tiny_unet(), tiny_text_encoder(), None), tiny_tokenizer()
    model.words = LearnedWords([lasr_word(model, tokenizer, "z")])
    plain = tiny_inputs(((model.words.expand("a z"), ()),) * 3, tokenizer=tokenizer)
    with torch.no_grad():
        assert model.denoise(LATENT, TIMESTEPS, *model.encode(plain, SIZE)).isfinite().all()
        with pytest.raises(ValueError, match="no subject adapter"):
            model.encode(tiny_inputs(), SIZE)
