"""model/image_encoder.py: open_clip's vision tower, its pixels and its files."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from model.image_encoder import SubjectImageEncoder
from tests.model.tiny import CLIP_CONFIG, tiny_clip, tiny_image_encoder

PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def assert_equal_towers(encoder: SubjectImageEncoder, clip, mean, std) -> None:
    clip.visual.output_tokens = True
    normalised = (PIXELS - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        for ours, theirs in zip(encoder(PIXELS), clip.visual(normalised), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_it_gives_what_the_towers_output_tokens_gives(quick_gelu):
    clip = tiny_clip(quick_gelu=quick_gelu)
    encoder = SubjectImageEncoder.from_open_clip(clip, CLIP_CONFIG | {"quick_gelu": quick_gelu}).eval()
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert_equal_towers(encoder, clip, mean, std)


def test_the_normalisation_can_be_another(tmp_path):
    clip, half = tiny_clip(), (0.5, 0.5, 0.5)
    encoder = SubjectImageEncoder.from_open_clip(clip, CLIP_CONFIG, half, half).eval()
    assert_equal_towers(encoder, clip, half, half)
    encoder.save_pretrained(tmp_path)
    assert_equal_towers(SubjectImageEncoder.from_pretrained(tmp_path).eval(), tiny_clip(), half, half)


def test_its_dimensions_are_those_of_what_it_returns():
    encoder = tiny_image_encoder()
    pooled, patches = encoder(PIXELS)
    assert pooled.shape == (2, encoder.pooled_dim)
    assert patches.shape == (2, encoder.num_patches, encoder.patch_dim)
    assert encoder.image_size == 16


def test_it_comes_back_from_its_folder_as_it_was(tmp_path):
    encoder = tiny_image_encoder()
    encoder.save_pretrained(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded, report = SubjectImageEncoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for ours, theirs in zip(loaded(PIXELS), encoder(PIXELS), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_clip_model_keeps_its_own_weights():
    clip = tiny_clip()
    encoder = SubjectImageEncoder.from_open_clip(clip, CLIP_CONFIG)
    with torch.no_grad():
        encoder.visual.conv1.weight.zero_()
    assert clip.visual.conv1.weight.any()


def test_it_can_be_built_anew_from_its_config():
    encoder = tiny_image_encoder()
    assert (
        SubjectImageEncoder.from_config(encoder.config).visual.state_dict().keys() == encoder.visual.state_dict().keys()
    )


def test_a_published_tower_is_read_through_open_clip_with_its_own_pixels(tmp_path, monkeypatch):
    published = tiny_clip(quick_gelu=True)
    (tmp_path / "Tiny-quickgelu.json").write_text(json.dumps(CLIP_CONFIG | {"quick_gelu": True}))
    save_file(published.state_dict(), tmp_path / "weights.safetensors")
    open_clip.add_model_config(tmp_path)
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "quick_gelu": True}
    tags = {"ours": {"file": str(tmp_path / "weights.safetensors")} | half}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-quickgelu", tags)
    encoder = SubjectImageEncoder.from_pretrained_open_clip("Tiny-quickgelu", "ours").eval()
    assert encoder.config.quick_gelu
    assert_equal_towers(encoder, published, half["mean"], half["std"])


def test_unknown_weights_of_a_tower_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no weights openai of ViT-H-14; it has laion2b_s32b_b79k"):
        SubjectImageEncoder.from_pretrained_open_clip("ViT-H-14", "openai")
    with pytest.raises(ValueError, match="no weights openai of ViT-H-15; it has no weights"):
        SubjectImageEncoder.from_pretrained_open_clip("ViT-H-15", "openai")
