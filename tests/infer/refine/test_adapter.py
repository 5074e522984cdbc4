"""The adapter method: the published configs, a run by hand, the file, and several files in one pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.base import open_base
from infer.refine.method import Concept, RefineBase, RefineBatch, RefineModule
from infer.refine.methods.adapter import (
    METHOD,
    AdapterConfig,
    AdapterKeys,
    AdapterSettings,
    export_adapters,
    install_folder,
    read_adapter_config,
)
from infer.refine.prompts import SUBJECT_TEMPLATES
from infer.refine.refinement import Refinement, read_refinement, write_refinement
from infer.refine.words import install_words
from model.efficient_adapters import AdapterDesign, detach
from model.saving import base_fingerprint
from tests.infer.tiny_model import TinyModel
from train.draws import SampleDraws

DOG = Concept("z", "dog", "subject", ())
# The shape of the published files: what matters stands five levels down.
PUBLISHED = """
model:
  base_learning_rate: 1.0e-04
  params:
    timesteps: 1000
    unet_config:
      params:
        context_dim: 768
        adapter_config:
          transformer_adp_config:
            - type: inout # inout
              din: attn2o  #
              dout: ffni #
              mid_dim: 60
              method: "default"
              scale: 1.0 #
lightning: {trainer: {max_steps: 3000}}
"""
RESIDUAL = """
adapter_config:
  resblock_adp_config:
    type: inout
    din: resi
    dout: reso
    method: sig
    mid_dim: 7
    scale: 4
"""


def options(**values: Any) -> AdapterSettings:
    return settings_of(AdapterSettings, values, "options")


@pytest.fixture
def base(tiny_model: TinyModel) -> RefineBase:
    return open_base(str(tiny_model.subject), False, "cpu", SUBJECT_TEMPLATES)


def batch_of(*prompts: str, prior: tuple[bool, ...] = ()) -> RefineBatch:
    count = len(prompts)
    latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    marked = torch.tensor(prior or (False,) * count)
    unseen = (None,) * count
    return RefineBatch(latents, torch.ones(count, 1, 8, 8), prompts, prompts, marked, tuple(range(count)), unseen)


def learn(module: RefineModule, batch: RefineBatch, steps: int, rate: float = 1e-2) -> list[float]:
    """A loop by hand; every step draws the same noise, so that the loss must fall."""
    optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], rate)
    losses = []
    for _ in range(steps):
        loss, _ = module(batch, SampleDraws(0, 0, batch.numbers), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def kept(module: RefineModule, settings: AdapterSettings, base: RefineBase, file: Path, word: str = "z") -> Refinement:
    """As the task writes it and `generate` reads it."""
    told = {word: {"class_word": "dog", "kind": "subject", "thing": f"{word} dog"} | module.words().get(word, {})}
    told = told if module.words() else {}
    plain = {"options": settings.model_dump(mode="json")}
    write_refinement(Refinement("adapter", base.name, base.fingerprint, told, module.tensors(), plain), file)
    return read_refinement(file)


def draw(pipeline: SubjectDiffusionPipeline, prompt: str = "a z dog on the beach") -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=2, guidance="joint", output_type="latent", generator=generator).images


def fresh(tiny_model: TinyModel, *refinements: Refinement) -> SubjectDiffusionPipeline:
    pipeline = SubjectDiffusionPipeline.from_pretrained(tiny_model.subject)
    install_words(pipeline, refinements)
    return pipeline


def test_a_published_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "attn2o-ffni.yaml").write_text(PUBLISHED)
    (tmp_path / "resi-reso.yaml").write_text(RESIDUAL)
    (tmp_path / "bare.yaml").write_text("transformer_adp_config: [{din: attn2c, dout: attn2c, method: ident}]")
    default, residual, bare = (
        read_adapter_config(tmp_path / name).designs() for name in ("attn2o-ffni.yaml", "resi-reso.yaml", "bare.yaml")
    )
    assert default == [AdapterDesign("attn2o", "ffni", 60, "relu", 1.0)] == AdapterSettings().adapter_config.designs()
    assert residual == [AdapterDesign("resi", "reso", 7, "sigmoid", 4.0)]
    assert bare == [AdapterDesign("attn2c", "attn2c", 60, "identity")]
    assert options(adapter_config=str(tmp_path / "resi-reso.yaml")).adapter_config.designs() == residual


@pytest.mark.parametrize(
    ("section", "told"),
    [
        (
            "transformer_adp_config: [{din: ffni, dout: attn2i}]",
            "adapter_config: adapter ffni-attn2i: attn2i is passed",
        ),
        ("transformer_adp_config: {din: resi, dout: reso}", "resi and reso belong under resblock_adp_config"),
        ("resblock_adp_config: {din: attn2o, dout: ffni}", "under resblock_adp_config din and dout are resi or reso"),
        ("transformer_adp_config: []", "is empty; give transformer_adp_config, resblock_adp_config or both"),
        ("transformer_adp_config: [{din: attn2o, dout: ffni, typ: inout}]", "unknown key .*typ; did you mean type"),
        ("transformer_adp_config: [{din: attn2o, dout: ffni, method: gelu}]", "method='gelu'"),
        ("trainer: {max_steps: 3}", "holds no adapter_config; expected transformer_adp_config or"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_a_line(section: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(section)
    with pytest.raises(UserError, match=told) as refused:
        options(adapter_config=tmp_path / "config.yaml")
    assert "\n" not in str(refused.value)


def test_a_config_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot be read"):
        options(adapter_config=str(tmp_path / "nowhere.yaml"))


def test_the_defaults_are_those_of_the_two_published_tasks() -> None:
    subject, pairs = options(), options(preset="pairs")
    assert (subject.steps, subject.learning_rate, subject.batch_size) == (2500, 1e-4, 1)
    assert (pairs.steps, pairs.learning_rate) == (60_000, 1e-5)
    assert pairs.adapter_config.designs() == [AdapterDesign("attn2o", "ffni", 256)]
    assert options(preset="pairs", steps=9).steps == 9


def test_settings_survive_the_file_they_are_written_into() -> None:
    settings = options(preset="pairs", adapter_config={"resblock_adp_config": {"mid_dim": 9}})
    assert options(**settings.model_dump(mode="json")) == settings


def test_only_the_adapters_learn_and_the_loss_falls(base: RefineBase) -> None:
    before = base_fingerprint(base.pipeline.unet, base.pipeline.text_encoder)
    module = METHOD.build(base, [DOG], options())
    assert METHOD.thing(DOG, options()) == "z dog"
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained and all(name.startswith("adapters.") for name in trained)
    losses = learn(module, batch_of("a z dog", "a photo of a z dog"), 8)
    assert losses[-1] < 0.9 * losses[0]
    assert base_fingerprint(base.pipeline.unet, base.pipeline.text_encoder) == before == base.fingerprint


def test_the_first_loss_is_the_bases_and_the_prior_is_weighed(base: RefineBase) -> None:
    batch = batch_of("a z dog", "a dog", prior=(False, True))
    loss, told = METHOD.build(base, [DOG], options(prior_weight=3.0))(batch, SampleDraws(0, 0, (0, 1)), 0)
    assert loss.item() == pytest.approx(float(told["denoising"] + 3 * told["prior"]), rel=1e-5)
    untouched = METHOD.build(base, [], options())
    own, _ = untouched(batch_of("a dog"), SampleDraws(0, 0, (0,)), 0)
    detach(base.pipeline.unet)
    assert torch.equal(untouched(batch_of("a dog"), SampleDraws(0, 0, (0,)), 0)[0], own)


def test_the_placeholder_stands_for_the_identifier_and_learns_when_asked(base: RefineBase, capsys) -> None:
    fixed = METHOD.build(base, [DOG], options(identifier="sks"))
    assert "z: stands for the identifier 'sks'" in capsys.readouterr().out
    assert fixed.words()["z"]["identifier"] == "sks"
    ids = base.pipeline.tokenizer.convert_tokens_to_ids(base.pipeline.tokenizer.tokenize("sks"))
    rows = base.pipeline.text_encoder.embeddings.token_embedding.weight[ids]
    assert torch.equal(fixed.tensors()["words.z"], rows)
    learnt = METHOD.build(base, [Concept("y", "dog", "subject", ())], options(identifier="sks", train_word=True))
    learn(learnt, batch_of("a y dog"), 2)
    assert not torch.equal(learnt.tensors()["words.y"], rows)


@pytest.mark.parametrize("section", ["transformer_adp_config", "resblock_adp_config"])
def test_a_file_draws_what_the_trained_pipeline_draws(base, tiny_model, tmp_path: Path, section: str) -> None:
    settings = options(adapter_config={section: {"din": "attn2o", "dout": "ffni"} if "trans" in section else {}})
    module = METHOD.build(base, [DOG], settings)
    learn(module, batch_of("a z dog"), 3, rate=0.05)
    drawn = draw(base.pipeline)
    refinement = kept(module, settings, base, tmp_path / "z.safetensors")
    pipeline = fresh(tiny_model, refinement)
    without = draw(pipeline)
    METHOD.install(pipeline, [refinement])
    assert torch.allclose(draw(pipeline), drawn, atol=1e-5) and not torch.allclose(without, drawn, atol=1e-3)
    METHOD.install(pipeline, [replace(refinement, strength=0.0)])
    assert torch.equal(draw(pipeline), without)


def test_several_files_draw_together_in_any_order(tiny_model, tmp_path: Path) -> None:
    files = []
    for word in ("z", "y"):
        own = open_base(str(tiny_model.subject), False, "cpu", SUBJECT_TEMPLATES)
        settings = options(adapter_config={"transformer_adp_config": {"din": "attn2o", "dout": "ffni", "mid_dim": 4}})
        module = METHOD.build(own, [Concept(word, "dog", "subject", ())], settings)
        learn(module, batch_of(f"a {word} dog"), 3, rate=0.05)
        files.append(kept(module, settings, own, tmp_path / f"{word}.safetensors", word))
    pipeline = fresh(tiny_model, *files)
    drawn = {}
    for name, chosen in {"zy": files, "yz": files[::-1], "z": files[:1], "y": files[1:]}.items():
        METHOD.install(pipeline, chosen)
        drawn[name] = draw(pipeline, "a z dog and a y dog")
    assert torch.allclose(drawn["zy"], drawn["yz"], atol=1e-5)
    assert not torch.allclose(drawn["zy"], drawn["z"], atol=1e-3)
    assert not torch.allclose(drawn["zy"], drawn["y"], atol=1e-3)


def test_adapters_of_a_file_go_into_a_folder_and_come_back(base, tiny_model, tmp_path: Path) -> None:
    settings = options()
    module = METHOD.build(base, [DOG], settings)
    learn(module, batch_of("a z dog"), 2, rate=0.05)
    refinement = kept(module, settings, base, tmp_path / "z.safetensors")
    pipeline = fresh(tiny_model, refinement)
    files = export_adapters(pipeline, refinement, tmp_path / "adapters")
    assert len(files) == len(list(module.adapters))
    install_folder(pipeline, tmp_path / "adapters")
    assert torch.allclose(draw(pipeline), draw(base.pipeline), atol=1e-5)
    with pytest.raises(UserError, match="no adapter files there"):
        install_folder(pipeline, tmp_path / "nowhere")


def test_a_file_that_does_not_fit_is_refused_with_its_name(base, tiny_model, tmp_path: Path) -> None:
    settings = options()
    module = METHOD.build(base, [], settings)
    refinement = kept(module, settings, base, tmp_path / "pairs.safetensors")
    assert not refinement.words and set(refinement.tensors) == set(module.tensors())
    pipeline = fresh(tiny_model)
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, block_out_channels=(16, 48))
    with pytest.raises(UserError, match=r"pairs.safetensors: adapter tensor .*made for another base"):
        METHOD.install(pipeline, [refinement])
    with pytest.raises(UserError, match="does not say which adapters it holds"):
        METHOD.install(pipeline, [Refinement("adapter", "", "", {}, {})])


def test_an_adapter_config_may_be_written_in_the_settings() -> None:
    both = AdapterConfig(
        transformer_adp_config=(AdapterKeys(din="attn1i", dout="attn1i"), AdapterKeys(din="attn2o", dout="ffni"))
    )
    assert options(adapter_config=both.model_dump()).adapter_config == both
