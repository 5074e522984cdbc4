"""The LoRA method: where it stands, its file as other programs read it, and several files with weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.base import open_base
from infer.refine.method import Concept, RefineBase, RefineBatch
from infer.refine.methods.lora import METHOD, LoraModule, LoraSettings, export_lora
from infer.refine.prompts import SUBJECT_TEMPLATES
from infer.refine.refinement import Refinement, read_refinement, write_refinement
from infer.refine.words import install_words
from model.efficient_adapters import AdapterDesign, EfficientAdapters, attach, detach
from model.saving import base_fingerprint
from tests.infer.tiny_model import TinyModel
from tests.model.tiny import wake
from train.draws import SampleDraws

PROMPT = "a z dog on the beach"
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"


def options(**values: Any) -> LoraSettings:
    return settings_of(LoraSettings, values, "options")


def open_tiny(tiny_model: TinyModel, plain: bool = False) -> RefineBase:
    return open_base(str(tiny_model.base if plain else tiny_model.subject), plain, "cpu", SUBJECT_TEMPLATES)


@pytest.fixture
def base(tiny_model: TinyModel) -> RefineBase:
    return open_tiny(tiny_model)


def trained(base: RefineBase, steps: int = 3, word: str = "z", **values: Any) -> tuple[LoraModule, list[float]]:
    """A loop by hand; every step draws the same noise, so that the loss must fall."""
    torch.manual_seed(ord(word))
    module = METHOD.build(base, [Concept(word, "dog", "subject", ())], options(**{"identifier": "sks"} | values))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = (f"a {word} dog", f"the {word} dog")
    prior = torch.zeros(2, dtype=torch.bool)
    batch = RefineBatch(latents, torch.ones(2, 1, 8, 8), prompts, prompts, prior, (0, 1), (None, None))
    optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], 3e-2)
    losses = []
    for _ in range(steps):
        loss, _ = module(batch, SampleDraws(0, 0, batch.numbers), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return module, losses


def kept(module: LoraModule, base: RefineBase, file: Path, word: str = "z") -> Refinement:
    told = {word: {"class_word": "dog", "kind": "subject", "thing": f"{word} dog"} | module.words()[word]}
    write_refinement(Refinement("lora", base.name, base.fingerprint, told, module.tensors()), file)
    return read_refinement(file)


def draw(pipeline: Any, prompt: str = PROMPT) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = {"num_inference_steps": 2, "output_type": "latent", "generator": generator, "guidance_scale": 3.0}
    own = {"guidance": "joint"} if isinstance(pipeline, SubjectDiffusionPipeline) else {}
    return pipeline(prompt, **drawn, **own).images


def fresh(tiny_model: TinyModel, *refinements: Refinement) -> SubjectDiffusionPipeline:
    pipeline = SubjectDiffusionPipeline.from_pretrained(tiny_model.subject)
    install_words(pipeline, refinements)
    return pipeline


def test_it_stands_in_the_attention_of_the_unet_alone(base: RefineBase) -> None:
    before = {name: value.clone() for name, value in base.pipeline.unet.state_dict().items()}
    module, losses = trained(base, 8)
    assert losses[-1] < 0.9 * losses[0]
    layers = {name.rsplit(".lora_", 1)[0] for name in module.tensors() if name.startswith("unet.")}
    attention = len([name for name in before if ".attn" in name and name.endswith("to_q.weight")])
    assert len(layers) == 4 * attention and all(".attn1." in name or ".attn2." in name for name in layers)
    assert {name for name, one in module.named_parameters() if one.requires_grad} == {
        name for name, _ in module.named_parameters() if name.startswith("lora.")
    }
    after = {name.replace(".base_layer", ""): value for name, value in base.pipeline.unet.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_untrained_it_draws_as_the_base(base: RefineBase) -> None:
    plain = draw(base.pipeline, "a dog")
    trained(base, 0)
    assert torch.equal(draw(base.pipeline, "a dog"), plain)


def test_what_the_file_holds_is_the_change_of_the_weights(base: RefineBase) -> None:
    """B A of the file is the whole change, whatever alpha: x W^T + x (B A)^T."""
    module, _ = trained(base, rank=2, alpha=6)
    tensors = module.tensors()
    a, b = (tensors[f"unet.{QUERY}.lora_{side}.weight"] for side in "AB")
    layer = base.pipeline.unet.get_submodule(QUERY)
    x = torch.randn(3, a.shape[1])
    assert a.shape == (2, 16) and torch.allclose(layer(x), x @ (layer.base_layer.weight + b @ a).T, atol=1e-5)
    assert torch.allclose(b, 3 * layer.lora_B["trained"].weight)


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_file_draws_what_the_trained_pipeline_draws(base, tiny_model, tmp_path: Path, text_encoder: bool) -> None:
    module, _ = trained(base, text_encoder=text_encoder)
    assert any(name.startswith("text_encoder.") for name in module.tensors()) == text_encoder
    drawn = draw(base.pipeline)
    refinement = kept(module, base, tmp_path / "z.safetensors")
    pipeline = fresh(tiny_model, refinement)
    without = draw(pipeline)
    METHOD.install(pipeline, [refinement])
    assert torch.allclose(draw(pipeline), drawn, atol=1e-5) and not torch.allclose(without, drawn, atol=1e-3)
    METHOD.install(pipeline, [replace(refinement, strength=0.0)])
    assert torch.allclose(draw(pipeline), without, atol=1e-5)
    METHOD.install(pipeline, [])
    assert torch.allclose(draw(pipeline), without, atol=1e-6)


def test_a_stock_pipeline_reads_what_is_exported(tiny_model, tmp_path: Path) -> None:
    base = open_tiny(tiny_model, plain=True)
    module, _ = trained(base, text_encoder=True, alpha=8)
    drawn = draw(base.pipeline, "a dog")
    refinement = kept(module, base, tmp_path / "z.safetensors")
    export_lora(refinement, tmp_path / "lora" / "z.safetensors")
    assert all(".lora_" in name for name in load_file(tmp_path / "lora" / "z.safetensors"))
    stock = StableDiffusionPipeline.from_pretrained(tiny_model.base, safety_checker=None)
    without = draw(stock, "a dog")
    stock.load_lora_weights(tmp_path / "lora" / "z.safetensors")
    assert torch.allclose(draw(stock, "a dog"), drawn, atol=1e-4)
    assert not torch.allclose(without, drawn, atol=1e-3)
    assert set(stock.get_list_adapters()) == {"unet", "text_encoder"}


def test_several_files_add_up_with_their_weights(tiny_model, tmp_path: Path) -> None:
    files = []
    for word in ("z", "y"):
        own = open_tiny(tiny_model)
        module, _ = trained(own, word=word, text_encoder=word == "y")
        files.append(kept(module, own, tmp_path / f"{word}.safetensors", word))
    pipeline = fresh(tiny_model, *files)
    linear = pipeline.unet.get_submodule(QUERY)
    x = torch.randn(3, linear.in_features)
    expected = linear(x)
    for weight, file in zip((0.5, 2.0), files, strict=True):
        a, b = (file.tensors[f"unet.{QUERY}.lora_{side}.weight"] for side in "AB")
        expected = expected + weight * x @ (b @ a).T
    weighed = [replace(file, strength=weight) for file, weight in zip(files, (0.5, 2.0), strict=True)]
    METHOD.install(pipeline, weighed)
    assert torch.allclose(pipeline.unet.get_submodule(QUERY)(x), expected, atol=1e-5)
    together = draw(pipeline, "a z dog and a y dog")
    METHOD.install(pipeline, weighed[::-1])
    assert torch.allclose(draw(pipeline, "a z dog and a y dog"), together, atol=1e-4)


def test_adapters_work_beside_it_whichever_comes_first(base, tiny_model, tmp_path: Path) -> None:
    module, _ = trained(base)
    refinement = kept(module, base, tmp_path / "z.safetensors")
    drawn = []
    for first in ("lora", "adapter"):
        pipeline = fresh(tiny_model, refinement)
        if first == "lora":
            METHOD.install(pipeline, [refinement])
        torch.manual_seed(0)
        adapters = EfficientAdapters(pipeline.unet, [AdapterDesign("attn2o", "ffni", 4)]).requires_grad_(False)
        wake(adapters)
        attach(pipeline.unet, [adapters])
        if first == "adapter":
            METHOD.install(pipeline, [refinement])
        drawn.append(draw(pipeline))
        detach(pipeline.unet)
        drawn.append(draw(pipeline))
    assert torch.allclose(drawn[0], drawn[2], atol=1e-5) and torch.allclose(drawn[1], drawn[3], atol=1e-5)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)


def test_dropout_works_in_training_only(base: RefineBase) -> None:
    module, _ = trained(base, 0, dropout=0.5)
    dropout = base.pipeline.unet.get_submodule(QUERY).lora_dropout["trained"]
    module.train()
    assert dropout.training
    module.eval()
    assert not dropout.training


def test_pairs_need_no_word(base: RefineBase) -> None:
    module = METHOD.build(base, [], options())
    assert not module.words() and all(".lora_" in name for name in module.tensors())


def test_a_file_that_does_not_fit_is_refused_with_its_name(base, tiny_model, tmp_path: Path) -> None:
    module, _ = trained(base, 0)
    refinement = kept(module, base, tmp_path / "z.safetensors")
    pipeline = fresh(tiny_model)
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, block_out_channels=(16, 48))
    with pytest.raises(UserError, match=r"z.safetensors: made for another base; .* is 48 wide here"):
        METHOD.install(pipeline, [refinement])
    pipeline.unet = UNet2DConditionModel.from_config(
        pipeline.unet.config, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")
    )
    with pytest.raises(UserError, match=r"z.safetensors: made for another base; this one has no layer down_blocks.0"):
        METHOD.install(pipeline, [refinement])
    with pytest.raises(UserError, match="holds no LoRA"):
        METHOD.install(pipeline, [Refinement("lora", "", "", {"z": {}}, {})])


def test_the_base_keeps_its_fingerprint_for_the_file(base: RefineBase) -> None:
    """Layers are wrapped while a LoRA is in, so a base is known by what it was when it was opened."""
    fingerprint = base_fingerprint(base.pipeline.unet, base.pipeline.text_encoder)
    trained(base, 1)
    assert base.fingerprint == fingerprint
