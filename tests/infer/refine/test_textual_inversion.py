"""Textual Inversion: where the rows start, what is minimised, and files that come back and go to diffusers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from infer.refine.install import install_refinements
from infer.refine.methods.lasr import METHOD as LASR
from infer.refine.methods.textual_inversion import METHOD, TextualInversionSettings, export_embeddings
from infer.refine.refinement import read_refinement
from model.losses import diffusion_target
from model.prompt import encode_ids
from model.reference import prepare_reference
from model.text_fusion import encode_prompt
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


def test_the_defaults_are_the_published_ones() -> None:
    told = TextualInversionSettings()
    assert (told.steps, told.batch_size, told.learning_rate, told.num_vectors) == (6100, 2, 5e-3, 1)


def test_rows_start_as_the_class_word_or_as_init_words(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    rows = METHOD.build(base, [concept("z")], TextualInversionSettings()).tensors()["words.z"]
    assert torch.equal(rows, embedding_of(base, "dog"))
    one_each = settings_of(TextualInversionSettings, {"num_vectors": 2, "init_words": "teddy dog"}, "options")
    rows = METHOD.build(base, [concept("y")], one_each).tensors()["words.y"]
    assert torch.equal(rows, embedding_of(base, "teddy", "dog"))
    mean = settings_of(TextualInversionSettings, {"num_vectors": 3, "init_words": "teddy dog"}, "options")
    rows = METHOD.build(base, [concept("x")], mean).tensors()["words.x"]
    assert torch.allclose(rows, embedding_of(base, "teddy", "dog").mean(dim=0).expand(3, -1))


def test_a_class_word_that_is_spelled_starts_as_the_mean_of_its_pieces(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    ids = base.pipeline.tokenizer.convert_tokens_to_ids(base.pipeline.tokenizer.tokenize("quokka"))
    rows = METHOD.build(base, [concept("z", "quokka")], TextualInversionSettings()).tensors()["words.z"]
    weight = base.pipeline.text_encoder.embeddings.token_embedding.weight
    assert len(ids) > 2 and torch.allclose(rows[0], weight[ids].mean(dim=0), atol=1e-6)
    with pytest.raises(UserError, match="class word '!!': says nothing"):
        METHOD.build(base, [concept("y", "!!")], TextualInversionSettings())


def test_words_and_placeholders_that_cannot_be_are_told_in_one_line(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    with pytest.raises(UserError, match="init word 'quokka': is unknown to this base's tokenizer"):
        METHOD.build(base, [concept()], TextualInversionSettings(init_words=("quokka",)))
    with pytest.raises(UserError, match="placeholder 'accordion': is an ordinary word"):
        METHOD.build(base, [concept("accordion")], TextualInversionSettings())
    with pytest.raises(UserError, match="placeholder 'v1.5': must hold no dot"):
        METHOD.build(base, [concept("v1.5")], TextualInversionSettings())


def test_rows_start_as_the_zero_shot_prediction(tiny_model: TinyModel) -> None:
    base, shown = tiny_base(tiny_model), concept()
    encoder, adapter = base.pipeline.image_encoder, base.pipeline.adapter
    frames = [prepare_reference(picture.rgba, encoder.image_size)[None] for picture in shown.pictures]
    pooled = torch.cat([encoder(frame)[0] for frame in frames]).mean(dim=0)  # (P,)
    rows = METHOD.build(base, [shown], TextualInversionSettings(start="zero_shot", num_vectors=2)).tensors()["words.z"]
    assert torch.allclose(rows, adapter.concept(pooled).expand(2, -1), atol=1e-6)
    with pytest.raises(UserError, match="start=zero_shot: a plain base cannot look at pictures"):
        METHOD.build(tiny_base(tiny_model, plain=True), [shown], TextualInversionSettings(start="zero_shot"))


def test_the_loss_is_the_denoising_error_of_stock_networks_where_it_counts(tiny_model: TinyModel) -> None:
    """Against the text encoder with an enlarged embedding matrix and the UNet, called as diffusers does."""
    base = tiny_base(tiny_model, plain=True)
    stock = copy.deepcopy(base.pipeline.text_encoder)
    module = METHOD.build(base, [concept()], TextualInversionSettings(num_vectors=2))
    with torch.no_grad():
        module.learned.each[0].static.rows.normal_(generator=torch.Generator().manual_seed(1))
    batch = tiny_batch("a z on the beach", "the dog is left of a z")
    loss, metrics = module(batch, SampleDraws(5, 0, batch.numbers), 0)

    first, second = module.learned.ids.tolist()
    stock.resize_token_embeddings(second + 1, mean_resizing=False)
    stock.embeddings.token_embedding.weight.data[[first, second]] = module.tensors()["words.z"]
    ids = torch.stack([encode_ids(base.pipeline.tokenizer, module.learned.expand(text)) for text in batch.prompts])
    assert ids[0, 2:4].tolist() == [first, second]
    draws = SampleDraws(5, 0, batch.numbers)
    timesteps, noise = draws.integers(1000), draws.normal(4, 8, 8)
    noisy = module.schedule.add_noise(batch.latents, noise, timesteps)
    predicted = base.pipeline.unet(noisy, timesteps, stock(ids).last_hidden_state).sample
    target = diffusion_target(module.schedule, batch.latents, noise, timesteps)
    expected = (predicted - target)[..., :4].square().mean()
    assert torch.allclose(loss, expected, rtol=1e-4) and torch.equal(metrics["denoising"], loss.detach())


def test_only_the_rows_are_trained(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    module = METHOD.build(base, [concept()], TextualInversionSettings())
    loss, _ = module(tiny_batch("a z on the beach"), SampleDraws(0, 0, [0]), 0)
    loss.backward()
    assert [name for name, _ in module.named_parameters()] == ["learned.each.0.static.rows"]
    assert module.learned.each[0].static.rows.grad.abs().sum() > 0
    parts = (base.pipeline.unet, base.pipeline.text_encoder, base.pipeline.adapter)
    assert all(parameter.grad is None for part in parts for parameter in part.parameters())


def test_a_word_draws_from_its_file_what_it_drew_in_training(tiny_model: TinyModel, tmp_path: Path) -> None:
    module = METHOD.build(tiny_base(tiny_model), [concept()], TextualInversionSettings(num_vectors=2))
    with torch.no_grad():
        module.learned.each[0].static.rows.normal_(generator=torch.Generator().manual_seed(1))
    file = written_and_read(module, METHOD.name, tmp_path / "z.safetensors")
    again = tiny_base(tiny_model)
    install_refinements(again.pipeline, [file], again.name)
    assert torch.equal(again.pipeline.words.static_rows(), module.learned.static_rows())
    assert torch.equal(drawn(again.pipeline, "a z on the beach"), drawn(module.base.pipeline, "a z on the beach"))


@pytest.mark.parametrize("vectors", [1, 3])
def test_exported_words_say_the_same_in_diffusers(vectors: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_base(tiny_model, plain=True)
    module = METHOD.build(base, [concept("<toy>")], TextualInversionSettings(num_vectors=vectors))
    with torch.no_grad():
        module.learned.each[0].static.rows.normal_(generator=torch.Generator().manual_seed(1))
    [path] = export_embeddings(written_and_read(module, METHOD.name, tmp_path / "toy.safetensors"), tmp_path / "out")
    assert path.name == "learned_embeds.safetensors"
    stock = StableDiffusionPipeline.from_pretrained(tiny_model.base, safety_checker=None)
    stock.load_textual_inversion(path)
    theirs, _ = stock.encode_prompt("a <toy> on the beach", "cpu", 1, False)
    ids = encode_ids(base.pipeline.tokenizer, module.learned.expand("a <toy> on the beach"))[None]
    nowhere = torch.zeros(1, 0, dtype=torch.int64)
    ours = encode_prompt(base.pipeline.text_encoder, ids, None, nowhere, words=module.learned.word_rows())
    assert torch.allclose(theirs, ours, atol=1e-5)
    assert torch.equal(read_refinement(path).tensors["words.<toy>"], module.tensors()["words.<toy>"])


def test_several_words_are_exported_one_a_file_and_layerwise_ones_not(tiny_model: TinyModel, tmp_path: Path) -> None:
    both = METHOD.build(tiny_base(tiny_model), [concept("z"), concept("y")], TextualInversionSettings())
    paths = export_embeddings(written_and_read(both, METHOD.name, tmp_path / "zy.safetensors"), tmp_path)
    assert [path.name for path in paths] == ["learned_embeds-z.safetensors", "learned_embeds-y.safetensors"]
    layerwise = LASR.build(tiny_base(tiny_model), [concept()], LASR.settings())
    with pytest.raises(UserError, match="'z' differs by cross-attention layer, which no textual-inversion file can"):
        export_embeddings(written_and_read(layerwise, "lasr", tmp_path / "l.safetensors"), tmp_path)


def test_a_few_steps_lower_the_loss_on_toybox() -> None:
    shown = toybox_concept("ti")
    module = METHOD.build(toybox_base(), [shown], TextualInversionSettings())
    losses = losses_on_toybox(module, shown, 2e-2, 8)
    assert losses[-1] < 0.99 * losses[0]
