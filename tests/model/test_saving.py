"""model/saving.py: what is written, what comes back, which base it fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.models import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from model.composition import SubjectDiffusionModel
from model.image_encoder import SubjectImageEncoder
from model.saving import SavedModelError, base_fingerprint, load_subject_model, save_subject_model
from model.subject_adapter import SubjectAdapter
from tests.model.tiny import (
    LATENTS,
    tiny_image_encoder,
    tiny_subject_model,
    tiny_text_encoder,
    tiny_unet,
    tiny_vae,
    wake,
)
from tests.model.tiny_inputs import tiny_inputs
from tests.model.tiny_tokenizer import tiny_tokenizer

PATTERNS = (r"unet\..*\.attn2\.to_[kv]\.weight", r"text_encoder\..*", r"adapter\..*")


@pytest.fixture
def model() -> SubjectDiffusionModel:
    """A trained model: every parameter that training would touch has moved away from the base."""
    model = tiny_subject_model(awake=True)
    model.set_trainable(PATTERNS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    return model


def save(folder: Path, model: SubjectDiffusionModel, **options) -> None:
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    save_subject_model(
        folder, model, base="tiny", trained=trained, image_encoder=tiny_image_encoder(), card="# A model\n", **options
    )


def save_all(folder: Path, model: SubjectDiffusionModel, **options) -> None:
    save(
        folder, model, parts="all", vae=tiny_vae(), tokenizer=tiny_tokenizer(), scheduler=DDIMScheduler(), **options
    )


@torch.no_grad()
def predict(model: SubjectDiffusionModel) -> torch.Tensor:
    latents = torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(5))
    return model(latents, torch.tensor([10, 700]), tiny_inputs())


# Trained parts


def test_a_trained_model_comes_back_on_its_base(tmp_path, model):
    save(tmp_path, model)
    loaded = load_subject_model(tmp_path).compose(tiny_unet(), tiny_text_encoder())
    expected = dict(model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.named_parameters())
    torch.testing.assert_close(predict(loaded), predict(model), atol=1e-5, rtol=0)


def test_only_what_was_trained_is_written(tmp_path, model):
    save(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "adapter", "image_encoder", "subject_model.json", "trained.safetensors"
    ]  # fmt: skip
    names = set(load_subject_model(tmp_path).trained)
    assert names == {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("adapter.")}


def test_the_manifest_names_base_and_fingerprint(tmp_path, model):
    save(tmp_path, model)
    manifest = json.loads((tmp_path / "subject_model.json").read_text())
    assert manifest["format_version"] == 1 and manifest["base"] == "tiny"
    trained = load_subject_model(tmp_path).trained
    assert manifest["base_fingerprint"] == base_fingerprint(tiny_unet(), tiny_text_encoder(), without=trained)
    assert (tmp_path / "README.md").read_text() == "# A model\n"


def test_the_image_encoder_comes_back(tmp_path, model):
    save(tmp_path, model)
    expected = dict(tiny_image_encoder().named_parameters())
    found = dict(load_subject_model(tmp_path).image_encoder.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_model_saved_from_its_loaded_form_is_the_same(tmp_path, model):
    save(tmp_path / "first", model)
    loaded = load_subject_model(tmp_path / "first").compose(tiny_unet(), tiny_text_encoder())
    loaded.set_trainable(PATTERNS)
    save(tmp_path / "second", loaded)
    weights = ("trained.safetensors", "adapter/diffusion_pytorch_model.safetensors")
    for name in ("subject_model.json", "adapter/config.json", *weights):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert not [file for file in (tmp_path / "second").rglob("*.json") if str(tmp_path) in file.read_text()]


def test_another_base_is_refused_with_both_fingerprints(tmp_path, model):
    save(tmp_path, model)
    loaded, other = load_subject_model(tmp_path), tiny_unet(seed=9)
    actual = base_fingerprint(other, tiny_text_encoder(), without=loaded.trained)
    with pytest.raises(SavedModelError, match=f"{loaded.fingerprint}.*{actual}"):
        loaded.compose(other, tiny_text_encoder())
    assert torch.equal(other.conv_in.weight, tiny_unet(seed=9).conv_in.weight)


def test_a_base_named_explicitly_is_taken_when_its_shapes_fit(tmp_path, model):
    save(tmp_path, model)
    loaded = load_subject_model(tmp_path, base="a-fine-tune")
    assert loaded.base == "a-fine-tune"
    composed = loaded.compose(tiny_unet(seed=9), tiny_text_encoder(seed=9))
    assert torch.equal(composed.unet.conv_in.weight, tiny_unet(seed=9).conv_in.weight)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(composed.unet.get_parameter(name), model.unet.get_parameter(name))


def test_a_base_of_other_shapes_is_refused_by_the_tensor(tmp_path, model):
    save(tmp_path, model)
    with pytest.raises(SavedModelError, match=r"unet\.\S+ is \(32, 24\), base other has \(48, 24\)"):
        load_subject_model(tmp_path, base="other").compose(
            tiny_unet(block_out_channels=(16, 48)), tiny_text_encoder()
        )


def test_a_half_precision_save_is_half_as_large_and_loads_on_the_full_precision_base(tmp_path, model):
    save(tmp_path / "full", model)
    save(tmp_path / "half", model, dtype=torch.float16)
    for name in ("trained.safetensors", "adapter/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "half" / name).stat().st_size < 0.7 * (tmp_path / "full" / name).stat().st_size
    loaded = load_subject_model(tmp_path / "half").compose(tiny_unet(), tiny_text_encoder())
    torch.testing.assert_close(predict(loaded), predict(model), atol=2e-2, rtol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# Fingerprints


def test_the_fingerprint_does_not_depend_on_precision_or_attached_parts():
    expected = base_fingerprint(tiny_unet(), tiny_text_encoder())
    assert base_fingerprint(tiny_unet().half(), tiny_text_encoder().half()) == expected
    model = tiny_subject_model()
    assert base_fingerprint(model.unet, model.text_encoder) == expected


def test_the_fingerprint_tells_bases_apart():
    expected = base_fingerprint(tiny_unet(), tiny_text_encoder())
    assert base_fingerprint(tiny_unet(seed=9), tiny_text_encoder()) != expected
    assert base_fingerprint(tiny_unet(), tiny_text_encoder(seed=9)) != expected


def test_the_fingerprint_leaves_out_what_is_named():
    other = tiny_unet()
    wake(other.conv_in)
    names = {"unet.conv_in.weight", "unet.conv_in.bias"}
    same = base_fingerprint(tiny_unet(), tiny_text_encoder(), without=names)
    assert base_fingerprint(other, tiny_text_encoder(), without=names) == same


# Everything


def test_stock_classes_load_every_part_of_a_full_folder(tmp_path, model):
    save_all(tmp_path, model)
    for name, stock in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        _, report = stock.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert len(CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")) == len(tiny_tokenizer())
    DDIMScheduler.from_pretrained(tmp_path / "scheduler")


def test_a_full_folder_holds_the_whole_model(tmp_path, model):
    save_all(tmp_path, model)
    loaded = SubjectDiffusionModel(
        UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
        CLIPTextModel.from_pretrained(tmp_path / "text_encoder"),
        SubjectAdapter.from_pretrained(tmp_path / "adapter"),
    )
    torch.testing.assert_close(predict(loaded.eval()), predict(model), atol=1e-5, rtol=0)
    SubjectImageEncoder.from_pretrained(tmp_path / "image_encoder")


def test_a_full_folder_is_a_plain_pipeline_to_the_stock_class(tmp_path, model):
    save_all(tmp_path, model)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, image_encoder=None)
    assert isinstance(pipeline.unet, UNet2DConditionModel)


def test_a_full_folder_can_be_written_in_half_precision_and_leaves_the_model_alone(tmp_path, model):
    before = predict(model)
    save_all(tmp_path, model, dtype=torch.float16)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet", dtype=torch.float16)
    assert torch.equal(unet.conv_in.weight, model.unet.conv_in.weight.half())
    assert torch.equal(predict(model), before)


def test_a_full_folder_without_one_of_its_parts_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="vae, scheduler"):
        save(tmp_path, model, parts="all", tokenizer=tiny_tokenizer())


# Folders that cannot be read


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(SavedModelError, match=r"no subject_model\.json"):
        load_subject_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "base is missing"),
        ('{"format_version": 2, "base": "b", "base_fingerprint": "", "trained": []}', "format version 2"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, text, message):
    (tmp_path / "subject_model.json").write_text(text)
    with pytest.raises(SavedModelError, match=message):
        load_subject_model(tmp_path)


def test_a_broken_weights_file_is_refused_by_name(tmp_path, model):
    save(tmp_path, model)
    (tmp_path / "trained.safetensors").write_bytes(b"broken")
    with pytest.raises(SavedModelError, match=r"trained\.safetensors: cannot be read"):
        load_subject_model(tmp_path)


def test_a_missing_part_is_refused_by_folder(tmp_path, model):
    save(tmp_path, model)
    (tmp_path / "adapter" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(SavedModelError, match="adapter/"):
        load_subject_model(tmp_path)
