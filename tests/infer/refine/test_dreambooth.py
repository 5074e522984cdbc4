"""DreamBooth trains the whole UNet for a rare token that the placeholder stands for; its files do not mix."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from infer.refine.install import install_refinements
from infer.refine.methods.custom_diffusion import METHOD as CUSTOM_DIFFUSION
from infer.refine.methods.dreambooth import METHOD, DreamBoothModule, DreamBoothSettings
from infer.refine.rare_token import rare_tokens
from infer.refine.weight_deltas import base_weights
from infer.refine.words import prompt_inputs
from tests.infer.refine.tiny_base import concept, drawn, refinement_of, tiny_base, tiny_batch, tune
from tests.infer.tiny_model import TinyModel

SAMPLES = tiny_batch("a z dog", "a dog", prior=(False, True))


def module_of(base, *concepts, **options) -> DreamBoothModule:
    return METHOD.build(base, concepts or [concept()], settings_of(DreamBoothSettings, options, "options"))


@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_whole_unet_is_trained_and_the_text_encoder_on_request(tiny_model: TinyModel, text_encoder: bool) -> None:
    base = tiny_base(tiny_model)
    before = {name: value.clone() for name, value in base_weights(base.pipeline).items()}
    module = module_of(base, text_encoder=text_encoder)
    row = module.learned.static_rows().clone()
    losses = tune(module, SAMPLES)
    assert losses[-1] < losses[0]
    moved = {name for name, value in base_weights(base.pipeline).items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == ({"unet", "text_encoder"} if text_encoder else {"unet"})
    assert {name for name in before if name.startswith("unet.")} <= moved
    assert torch.equal(module.learned.static_rows(), row) != text_encoder  # [V]'s own embedding goes with the encoder
    assert {name.rpartition(".")[2] for name in module.tensors()} == {"delta", "scale", "z"}


def test_the_placeholder_reads_as_the_identifier(tiny_model: TinyModel, capsys) -> None:
    base = tiny_base(tiny_model)
    plain = tiny_base(tiny_model).pipeline
    word = rare_tokens(plain.tokenizer, 1)[0].word
    module = module_of(base)
    assert module.words() == {"z": {"vectors": 1, "identifier": word}}
    assert f"z: stands for the identifier {word!r} (token " in capsys.readouterr().out
    ids = prompt_inputs(base.pipeline, ["a z dog"]).input_ids
    own = prompt_inputs(plain, [f"a {word} dog"]).input_ids
    assert (ids != own).sum() == 1
    assert torch.equal(drawn(base.pipeline, "a z dog"), drawn(plain, f"a {word} dog"))
    assert METHOD.thing(concept(), None) == "z dog"


def test_a_given_identifier_is_taken_and_may_be_several_tokens(tiny_model: TinyModel, capsys) -> None:
    assert module_of(tiny_base(tiny_model), identifier="mug").words()["z"]["identifier"] == "mug"
    assert module_of(tiny_base(tiny_model), identifier="xyq").words()["z"]["vectors"] == 3
    assert "3 tokens, a single rare one is learnt better" in capsys.readouterr().out


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_file_draws_as_the_module_that_it_was_saved_from(tiny_model: TinyModel, text_encoder: bool) -> None:
    base = tiny_base(tiny_model)
    module = module_of(base, text_encoder=text_encoder)
    tune(module, SAMPLES)
    wanted = drawn(base.pipeline, "a z dog on the beach")
    fresh = tiny_base(tiny_model)
    before = drawn(fresh.pipeline, "a dog on the beach")
    install_refinements(fresh.pipeline, [refinement_of("dreambooth", module, concept())], "tiny")
    found = drawn(fresh.pipeline, "a z dog on the beach")
    assert (found - wanted).abs().max() < 0.02 * (wanted - before).abs().max()
    installed, trained = base_weights(fresh.pipeline), module.weights()
    assert all((installed[n] - v).abs().max() < 1e-4 for n, v in trained.items())


def test_two_files_and_one_beside_custom_diffusion_are_refused(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    first = refinement_of("dreambooth", module_of(base), concept())
    other = refinement_of("dreambooth", module_of(base, concept("y")), concept("y"))
    third = tiny_base(tiny_model)
    tuned = CUSTOM_DIFFUSION.build(third, [concept("q")], CUSTOM_DIFFUSION.settings())
    custom = refinement_of("custom-diffusion", tuned, concept("q"))
    pipeline = tiny_base(tiny_model).pipeline
    before = {name: value.clone() for name, value in base_weights(pipeline).items()}
    with pytest.raises(UserError, match="each replaces the whole UNet, and nothing tells how to join two"):
        METHOD.install(pipeline, [first, other])
    for pair in ((first, other), (custom, first)):
        with pytest.raises(UserError, match="DreamBooth moves every weight of the UNet"):
            install_refinements(pipeline, pair, "tiny")
    assert all(torch.equal(value, before[name]) for name, value in base_weights(pipeline).items())


def test_published_defaults() -> None:
    settings = DreamBoothSettings()
    assert (settings.steps, settings.learning_rate, settings.prior_weight) == (1000, 5e-6, 1.0)
    assert settings.identifier == "auto" and not settings.text_encoder
