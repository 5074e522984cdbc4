"""scripts/bench_codec.py and scripts/bench_encoder.py: the gates measure what they say, and bad models do not pass."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional

from data_pipeline.errors import run_command
from data_pipeline.toybox.world import ToyboxWorld
from model.image_encoder import SubjectImageEncoder
from scripts import bench_codec, bench_encoder
from train.pictures import to_uint8

VISION = {"image_size": 32, "patch_size": 8, "width": 192, "layers": 1, "head_width": 16}


@pytest.fixture(autouse=True)
def small_benches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_codec, "FITTED_ON", 40)
    monkeypatch.setattr(bench_encoder, "JUDGED", 10)
    monkeypatch.setattr(bench_encoder, "PAIRS", 16)


def seeing_encoder() -> SubjectImageEncoder:
    """A vision tower without blocks whose tokens are the patches' own pixels: 192 numbers of 8 x 8 x 3."""
    encoder = SubjectImageEncoder(16, VISION | {"layers": 0}).eval()
    encoder.visual.ln_pre, encoder.visual.ln_post = torch.nn.Identity(), torch.nn.Identity()
    torch.nn.init.zeros_(encoder.visual.positional_embedding)
    encoder.visual.conv1.weight.data = torch.eye(192).reshape(192, 3, 8, 8)
    return encoder


def test_distances_tell_subjects_from_background() -> None:
    pictures, masks = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :2] = True
    drawn = torch.where(masks[:, None], 0.4, 9.0)  # what is out of range is clamped to 1
    assert bench_codec.distances(pictures, drawn, masks) == pytest.approx((0.35, 0.2, 0.5))


def test_the_subjects_of_a_scene_are_one_mask() -> None:
    scene = ToyboxWorld("val", size=32, min_subjects=2, max_subjects=2).scene(0)
    first, second = (torch.from_numpy(entity.mask) for entity in scene.entities)
    assert torch.equal(bench_codec.subject_mask(scene), first | second)
    empty = ToyboxWorld("val", size=32, max_subjects=0).scene(0)
    assert not bench_codec.subject_mask(empty).any()


@pytest.mark.parametrize(("ours", "end"), [(0.05, "17.4% (met)"), (0.055, "9.1% (not met)"), (0.1, "-65.3% (not met)")])
def test_the_codec_must_stay_15_per_cent_below_pca(ours: float, end: str) -> None:
    assert bench_codec.verdict(ours, 0.0605).endswith(end)


def test_the_codec_bench_prints_both_codes_and_a_broken_autoencoder_fails(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = AutoencoderKL.from_pretrained(chain / "vae" / "export")
    torch.nn.init.zeros_(broken.decoder.conv_out.weight)
    broken.save_pretrained(tmp_path)
    sheet = tmp_path / "sheets" / "codec.png"
    assert run_command(bench_codec.main, ["--vae", str(tmp_path), "--scenes", "5", "--picture", str(sheet)]) == 0
    printed = capsys.readouterr().out
    losses = {name: float(value) for name, value in re.findall(r"^(.+ numbers) +(\S+)", printed, re.MULTILINE)}
    assert list(losses) == ["autoencoder, 4 numbers", "PCA, 4 numbers", "PCA, 24 numbers"]
    assert losses["autoencoder, 4 numbers"] > losses["PCA, 4 numbers"] > losses["PCA, 24 numbers"] > 0
    assert printed.endswith("(not met)\n")
    with Image.open(sheet) as opened:
        assert opened.size == (12 * 68 + 4, 2 * 68 + 4)  # five cells of three pictures, four cells a row


def test_the_picture_shows_the_pca_of_equal_size_also_beside_a_larger_code(chain: Path) -> None:
    architecture = dict(AutoencoderKL.load_config(chain / "vae" / "export")) | {"latent_channels": 32}
    found, (real, drawn, linear) = bench_codec.measure(AutoencoderKL.from_config(architecture).eval(), 3, 40)
    assert list(found)[1] == "PCA, 32 numbers"
    everywhere = torch.ones(3, 32, 32, dtype=torch.bool)
    assert bench_codec.distances(real, linear, everywhere)[0] == found["PCA, 32 numbers"][0]
    assert bench_codec.distances(real, drawn, everywhere)[0] == found["autoencoder, 32 numbers"][0]


def test_the_ridge_probe_recovers_a_linear_map_with_its_offset() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, other = torch.randn(400, 12, generator=generator) + 3, torch.randn(50, 12, generator=generator)
    weights = torch.randn(12, 5, generator=generator)
    probe = bench_encoder.RidgeProbe(inputs, inputs @ weights + 7, other, other @ weights + 7)
    torch.testing.assert_close(probe(other), other @ weights + 7, atol=0.02, rtol=0)


def test_the_ridge_is_the_one_that_serves_other_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, other = torch.randn(20, 12, generator=generator), torch.randn(500, 12, generator=generator)
    noise = torch.randn(20, 5, generator=generator)  # nothing to be learnt: the mean is the best answer
    probe = bench_encoder.RidgeProbe(inputs, noise, other, torch.zeros(500, 5))
    assert probe.weights.abs().max() < 0.02


def test_rows_of_patches_make_the_picture_again_and_lie_in_the_order_of_the_tokens() -> None:
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = bench_encoder.rows_of_patches(pictures, 8)
    assert rows.shape == (32, 192) and torch.equal(bench_encoder.from_rows(rows, 8, 32), pictures)
    assert torch.equal(rows[1].sort().values, pictures[0, :, :8, 8:16].flatten().sort().values)
    tokens = functional.conv2d(pictures, seeing_encoder().visual.conv1.weight, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens.flatten(0, 1), rows)


def test_the_probe_reads_pictures_back_from_tokens_that_hold_them_and_not_from_blind_ones() -> None:
    losses, (real, from_tokens, from_raw) = bench_encoder.probe(seeing_encoder(), 60, numbers=4)
    assert losses["patch tokens"] < 0.01 < losses["raw patches, 4 numbers"] < losses["mean patch"]
    assert real.shape == from_tokens.shape == from_raw.shape == (10, 3, 32, 32)
    assert (from_tokens - real).abs().mean() < 0.01
    blind = seeing_encoder()
    torch.nn.init.zeros_(blind.visual.conv1.weight)
    losses, _ = bench_encoder.probe(blind, 60, numbers=4)
    assert losses["patch tokens"] == pytest.approx(losses["mean patch"], rel=1e-3)
    assert losses["patch tokens, untrained"] < 0.5 * losses["mean patch"]


def test_the_untrained_encoder_beside_it_is_always_the_same_and_leaves_the_random_state_alone() -> None:
    encoder = seeing_encoder()
    before = torch.get_rng_state()
    first = bench_encoder.untrained(encoder).visual.conv1.weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, bench_encoder.untrained(encoder).visual.conv1.weight)
    assert not torch.equal(first, encoder.visual.conv1.weight)


def test_the_encoder_bench_sizes_the_raw_probe_like_the_autoencoder_and_prints_retrieval(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "encoder.png"
    folders = ["--clip", str(chain / "clip" / "export"), "--vae", str(chain / "vae" / "export")]
    assert run_command(bench_encoder.main, [*folders, "--references", "20", "--picture", str(sheet)]) == 0
    printed = capsys.readouterr().out
    assert "from raw patches, 4 numbers" in printed
    assert re.search(r"^bar .*<= 0\.08: \d\.\d{3} \((not )?met\)$", printed, re.MULTILINE)
    assert re.search(r"retrieval@1 of 16 .* image to text [01]\.\d\d, text to image [01]\.\d\d, chance 0\.062", printed)
    with Image.open(sheet) as opened:
        assert opened.size == (9 * 68 + 4, 4 * 68 + 4)  # ten cells of three pictures, three cells a row


def test_without_a_text_tower_retrieval_is_skipped_in_one_line(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SubjectImageEncoder(16, VISION).save_pretrained(tmp_path)
    given = ["--encoder", str(tmp_path), "--vae", str(chain / "vae" / "export"), "--references", "20"]
    assert run_command(bench_encoder.main, given) == 0
    assert "retrieval: skipped" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("bench", "arguments", "told"),
    [
        (bench_codec, ["--vae", "nowhere"], "--vae nowhere: no autoencoder there"),
        (bench_codec, ["--scenes", "0"], "--scenes: expected a whole number from 1, got '0'"),
        (bench_codec, ["--picture", "codec.jpg"], "ends in .png"),
        (bench_encoder, ["--encoder", "nowhere"], "--encoder nowhere: no SubjectImageEncoder there"),
        (bench_encoder, ["--clip", "nowhere"], "nowhere: no open_clip folder"),
        (bench_encoder, ["--vae", "nowhere"], "--vae nowhere: no AutoencoderKL there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_one_line(
    bench: object, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(bench.main, arguments) == 2  # type: ignore[attr-defined]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line


def test_a_saved_model_of_another_kind_is_named(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = chain / "base" / "export" / "unet"
    for bench in (bench_codec, bench_encoder):
        assert run_command(bench.main, ["--vae", str(unet)]) == 2
        assert "holds UNet2DConditionModel; expected AutoencoderKL" in capsys.readouterr().err


def test_held_out_references_fill_the_frame_on_grey() -> None:
    pictures = bench_encoder.references("heldout", 3, 32)
    assert pictures.shape == (3, 3, 32, 32)
    assert all((to_uint8(picture)[[0, 0, -1, -1], [0, -1, 0, -1]] == 127).all() for picture in pictures)
