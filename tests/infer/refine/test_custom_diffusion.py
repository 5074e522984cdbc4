"""Custom Diffusion trains cross-attention and a word; its file is what changed, in full or compressed."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import UNet2DConditionModel

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from infer.refine.install import install_refinements
from infer.refine.methods import load_method
from infer.refine.methods.custom_diffusion import METHOD, CustomDiffusionModule, CustomDiffusionSettings, tuned_parts
from infer.refine.rare_token import choose_tokens, rare_tokens
from infer.refine.weight_deltas import base_weights, low_rank, packed_half, packed_low_rank, restored
from model.attention_maps import cross_attention_layers
from tests.infer.refine.tiny_base import concept, drawn, loss_of, refinement_of, tiny_base, tiny_batch, tune
from tests.infer.tiny_model import TinyModel

SAMPLES = tiny_batch("a photo of a z dog", "a close view of a z dog")


def module_of(base, *concepts, **options) -> CustomDiffusionModule:
    settings = settings_of(CustomDiffusionSettings, options, "options")
    return METHOD.build(base, concepts or [concept()], settings)


def test_keys_values_and_the_word_are_trained_and_nothing_else_moves(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    before = {name: value.clone() for name, value in base_weights(base.pipeline).items()}
    module = module_of(base)
    losses = tune(module, SAMPLES)
    assert losses[-1] < losses[0]
    moved = {name for name, value in base_weights(base.pipeline).items() if not torch.equal(value, before[name])}
    layers = cross_attention_layers(base.pipeline.unet)
    assert moved == {f"unet.{layer}.to_{part}.weight" for layer in layers for part in "kv"}
    assert set(module.tensors()) == moved | {"words.z"}
    assert all(value.dtype == torch.float32 for value in module.tensors().values())


def test_whole_trains_all_of_cross_attention(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    names = {name for name in base_weights(base.pipeline) if ".attn2." in name}
    assert set(module_of(base, parts="whole").weights()) == names
    assert any("to_out.0.bias" in name for name in names) and any("to_q" in name for name in names)


def test_the_word_starts_from_a_rare_token_with_one_vector(tiny_model: TinyModel, capsys) -> None:
    base = tiny_base(tiny_model)
    module = module_of(base, token="dog")
    row = base.pipeline.text_encoder.embeddings.token_embedding.weight[
        base.pipeline.tokenizer.convert_tokens_to_ids("dog</w>")
    ]
    assert torch.equal(module.learned.static_rows()[0], row) and module.words() == {"z": {"vectors": 1}}
    assert "z: its vector starts from 'dog' (as asked)" in capsys.readouterr().out
    assert METHOD.thing(concept(), None) == "z dog"


def test_rare_tokens_are_the_latest_short_pieces_without_vowels(tiny_model: TinyModel) -> None:
    tokenizer = tiny_base(tiny_model).pipeline.tokenizer
    vocabulary = tokenizer.get_vocab()
    fitting = [p for p in vocabulary if re.fullmatch("[bcdfghjklmnpqrstvwxz]{2,3}</w>", p)]
    first = rare_tokens(tokenizer, 1)[0]
    assert f"{first.word}</w>" == max(fitting, key=vocabulary.__getitem__)
    assert first.reason.startswith(f"token {first.ids[0]} of {len(vocabulary)}") and "no word" in first.reason
    with pytest.raises(UserError, match="rare tokens that are no words, 9999 are needed"):
        rare_tokens(tokenizer, 9999)
    with pytest.raises(UserError, match="1 given for 2 concepts; give one each, joined by"):
        choose_tokens(tokenizer, "dog", 2)
    with pytest.raises(UserError, match="must be one word without blanks"):
        choose_tokens(tokenizer, "a dog", 1)
    assert "3 tokens" in choose_tokens(tokenizer, "xyq", 1)[0].reason


def test_regularisation_has_its_own_weight(tiny_model: TinyModel) -> None:
    samples = tiny_batch("a z dog", "a dog", prior=(False, True))
    losses = {}
    for weight in (0.0, 1.0, 3.0):
        losses[weight], metrics = loss_of(module_of(tiny_base(tiny_model), prior_weight=weight), samples)
    assert torch.allclose(losses[0.0], metrics["denoising"])
    assert torch.allclose(losses[3.0], metrics["denoising"] + 3 * metrics["prior"])
    assert torch.allclose(losses[1.0], metrics["denoising"] + metrics["prior"])


def test_published_defaults_and_the_faces_preset() -> None:
    usual = CustomDiffusionSettings()
    assert (usual.steps, usual.learning_rate, usual.batch_size, usual.parts) == (250, 1e-5, 2, "kv")
    assert usual.variation.say_size and usual.variation.enlarge_to == (1.2, 1.4)
    assert (usual.variation.shrink, usual.variation.shrink_to, usual.variation.enlarge) == (2 / 3, 1 / 3, 1 / 3)
    faces = settings_of(CustomDiffusionSettings, {"preset": "faces", "steps": 9}, "options")
    assert (faces.steps, faces.learning_rate, faces.parts) == (9, 5e-6, "whole")
    assert settings_of(CustomDiffusionSettings, faces.model_dump(mode="json"), "options") == faces


def test_the_file_is_75_mb_at_sd_15_shape() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    numbers = sum(p.numel() for part in tuned_parts(unet, "kv").values() for p in part.parameters())
    assert len(cross_attention_layers(unet)) == 16
    assert numbers * 4 / 1e6 == pytest.approx(76.7, abs=0.1) and numbers * 4 / 2**20 == pytest.approx(73.1, abs=0.1)


def test_compression_keeps_the_largest_singular_values_up_to_the_share() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 4, generator=generator))[0] for size in (7, 5))
    spectrum = torch.tensor([4.0, 3.0, 2.0, 1.0])
    delta = left @ torch.diag(spectrum) @ right.T
    for share, rank in ((0.3, 1), (0.6, 1), (0.7, 2), (0.95, 3), (1.0, 4)):
        up, down = low_rank(delta, share)
        assert up.shape == (7, rank) and down.shape == (rank, 5)
        best = left[:, :rank] @ torch.diag(spectrum[:rank]) @ right[:, :rank].T
        assert torch.allclose(up @ down, best, atol=1e-5)
        assert torch.allclose(up.norm(dim=0), spectrum[:rank], atol=1e-5)  # U diag(s)
    assert low_rank(torch.zeros(3, 2), 0.6)[0].shape == (3, 1)


def test_changes_in_fp16_are_exact_to_a_two_thousandth_of_the_largest(tiny_model: TinyModel) -> None:
    generator = torch.Generator().manual_seed(0)
    start = {"unet.a": torch.randn(50, 50, generator=generator)}
    now = {"unet.a": start["unet.a"] + 1e-6 * torch.randn(50, 50, generator=generator)}
    packed = packed_half(start, now)
    delta = packed["unet.a.delta"].float() * packed["unet.a.scale"]
    change = now["unet.a"] - start["unet.a"]
    assert packed["unet.a.delta"].dtype == torch.float16
    assert (delta - change).abs().max() <= change.abs().max() / 2048
    assert (now["unet.a"].half().float() - now["unet.a"]).abs().max() > change.abs().max()  # the weight in fp16


@pytest.mark.parametrize("options", [{}, {"parts": "whole"}, {"compress": 1.0}])
def test_a_file_draws_as_the_module_that_it_was_saved_from(tiny_model: TinyModel, options) -> None:
    base = tiny_base(tiny_model)
    module = module_of(base, **options)
    tune(module, SAMPLES)
    wanted = drawn(base.pipeline, "a z dog on the beach")
    saved = refinement_of("custom-diffusion", module, concept())
    fresh = tiny_base(tiny_model)
    plain = drawn(fresh.pipeline, "a dog on the beach")
    install_refinements(fresh.pipeline, [saved], "tiny")
    assert torch.allclose(drawn(fresh.pipeline, "a z dog on the beach"), wanted, atol=1e-4)
    assert not torch.allclose(plain, wanted, atol=1e-2)


def test_compression_shrinks_the_file(tiny_model: TinyModel) -> None:
    module = module_of(tiny_base(tiny_model), compress=0.3)
    tune(module, SAMPLES)
    held = sum(v.numel() for n, v in module.tensors().items() if n.startswith("unet."))
    assert held < 0.5 * sum(v.numel() for v in module.weights().values())
    assert {name.rpartition(".")[2] for name in module.tensors() if name.startswith("unet.")} == {"up", "down"}
    biases = packed_low_rank({"unet.b": torch.zeros(3)}, {"unet.b": torch.ones(3)}, 0.5)
    assert set(biases) == {"unet.b"}


def test_several_concepts_are_learnt_in_one_run(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    concepts = [concept(), concept("y", "mug")]
    module = module_of(base, *concepts, token="dog+mug")
    losses = tune(module, tiny_batch("a z dog", "a y mug"))
    assert losses[-1] < losses[0] and set(module.words()) == {"z", "y"}
    fresh = tiny_base(tiny_model)
    install_refinements(fresh.pipeline, [refinement_of("custom-diffusion", module, *concepts)], "tiny")
    assert drawn(fresh.pipeline, "a z dog and a y mug").isfinite().all()


def test_weights_that_do_not_fit_are_refused(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    saved = refinement_of("custom-diffusion", module_of(base), concept())
    name = next(name for name in saved.tensors if name.startswith("unet."))
    weights = base_weights(base.pipeline)
    value = saved.tensors.pop(name)
    saved.tensors["unet.nowhere.weight"] = value
    with pytest.raises(UserError, match="unet.nowhere.weight has no place in this base"):
        restored(saved, weights)
    del saved.tensors["unet.nowhere.weight"]
    saved.tensors[name] = value[1:]
    with pytest.raises(UserError, match="this base has"):
        restored(saved, weights)


def test_cross_initialization_gives_the_same_tuning_another_start(tiny_model: TinyModel) -> None:
    method = load_method("cross-init-custom-diffusion")
    base = tiny_base(tiny_model)
    settings = settings_of(method.settings, {"init_words": "dog mug", "preset": "faces"}, "options")
    assert settings.parts == "whole" and method.thing(concept(), settings) == "z dog"
    module = method.build(base, [concept()], settings)
    assert module.words() == {"z": {"vectors": 2}}
    tune(module, SAMPLES)
    wanted = drawn(base.pipeline, "a z dog on the beach")
    fresh = tiny_base(tiny_model)
    install_refinements(
        fresh.pipeline, [refinement_of("cross-init-custom-diffusion", module, concept())], "tiny"
    )  # fmt: skip
    assert torch.allclose(drawn(fresh.pipeline, "a z dog on the beach"), wanted, atol=1e-4)


def test_a_plain_base_is_tuned_too(tiny_model: TinyModel) -> None:
    losses = tune(module_of(tiny_base(tiny_model, plain=True)), SAMPLES)
    assert losses[-1] < losses[0]
