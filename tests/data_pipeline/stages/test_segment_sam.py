"""SAM in both libraries: one specification, run on the same tiny weights saved for each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor, sam_model_registry
from transformers import SamModel, SamProcessor
from transformers.models.sam.image_processing_sam import SamImageProcessor

from data_pipeline.errors import UserError
from data_pipeline.record import BoxPx
from data_pipeline.stages.segment.sam import SamSegmenter, SamSettings
from data_pipeline.stages.segment.segment_anything_py import (
    SegmentAnythingSegmenter,
    SegmentAnythingSettings,
    read_weights,
)
from tests.data_pipeline.stages.tiny_sam import SIDE, save_meta, save_transformers, tiny_sam

Segmenter = SamSegmenter | SegmentAnythingSegmenter
BACKENDS = ("sam", "segment_anything")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`meta.pth`, `meta.safetensors` and the folder `tiny-sam`, all of the same weights."""
    folder = tmp_path_factory.mktemp("sam")
    sam = tiny_sam()
    save_meta(sam, folder / "meta.pth")
    save_meta(sam, folder / "meta.safetensors")
    save_transformers(sam, folder / "tiny-sam")
    return folder


@pytest.fixture(scope="module")
def load(files: Path) -> Callable[..., Segmenter]:
    def _load(backend: str, **keys: Any) -> Segmenter:
        if backend == "sam":
            return SamSettings(model=str(files / "tiny-sam"), **keys).load("cpu")
        checkpoint = files / "meta.pth"
        settings = SegmentAnythingSettings(model=str(checkpoint), **keys)
        return SegmentAnythingSegmenter(tiny_sam(seed=1), read_weights(checkpoint), checkpoint, settings, "cpu")

    return _load


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Soft random spots: noise would not survive being resized."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, 5, 5))).float()
    grown = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return (grown.clip(0, 1) * 255).byte().permute(1, 2, 0).numpy()


PICTURES = [picture(96, 128, 1), picture(200, 90, 2), picture(50, 60, 3)]
BOXES: list[list[BoxPx]] = [
    [(10.0, 12.5, 60.0, 80.0), (64.0, 0.0, 128.0, 96.0), (3.0, 3.0, 40.0, 40.0)],
    [(5.0, 20.0, 80.0, 190.0)],
    [(0.0, 0.0, 60.0, 50.0), (30.0, 25.0, 55.0, 45.0)],
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_box_gets_a_mask_of_the_stored_size(load: Callable[..., Segmenter], backend: str) -> None:
    masks = load(backend).segment(PICTURES, BOXES)
    assert [found.shape for found in masks] == [(3, 96, 128), (1, 200, 90), (2, 50, 60)]
    assert all(found.dtype == bool for found in masks)
    assert all(0.01 < mask.mean() < 0.99 for found in masks for mask in found), "the tiny weights say nothing"


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_of_different_sizes_in_a_batch_give_what_each_gives_alone(
    load: Callable[..., Segmenter], backend: str
) -> None:
    segmenter = load(backend)
    with torch.inference_mode():
        together = segmenter.logits(PICTURES, BOXES)
        for (logits, seen), one, given in zip(together, PICTURES, BOXES, strict=True):
            ((alone, seen_alone),) = segmenter.logits([one], [given])
            assert logits.dtype == torch.float32 and logits.shape == (len(given), SIDE // 4, SIDE // 4)
            assert seen == seen_alone
            torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)
    masks = segmenter.segment(PICTURES, BOXES)
    for found, one, given in zip(masks, PICTURES, BOXES, strict=True):
        assert (found != segmenter.segment([one], [given])[0]).mean() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_box_does_not_depend_on_the_other_boxes_of_its_picture(load: Callable[..., Segmenter], backend: str) -> None:
    segmenter = load(backend)
    with torch.inference_mode():
        ((together, _),) = segmenter.logits(PICTURES[:1], BOXES[:1])
        for number, box in enumerate(BOXES[0]):
            ((alone, _),) = segmenter.logits(PICTURES[:1], [[box]])
            torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bound_of_boxes_in_a_call_changes_no_mask(load: Callable[..., Segmenter], backend: str) -> None:
    with torch.inference_mode():
        at_once = load(backend).logits(PICTURES, BOXES)
        in_parts = load(backend, boxes_per_call=2).logits(PICTURES, BOXES)
    for (logits, _), (expected, _) in zip(in_parts, at_once, strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_picture_without_boxes_gets_no_masks(load: Callable[..., Segmenter], backend: str) -> None:
    segmenter = load(backend)
    without = segmenter.segment(PICTURES, [BOXES[0], [], BOXES[2]])
    assert [found.shape for found in without] == [(3, 96, 128), (0, 200, 90), (2, 50, 60)]
    assert np.array_equal(without[2], segmenter.segment(PICTURES, BOXES)[2])
    assert segmenter.segment(PICTURES[:1], [[]])[0].shape == (0, 96, 128)
    assert segmenter.segment([], []) == []


@pytest.mark.parametrize("number", range(3))
def test_meta_boxes_and_masks_are_where_its_own_predictor_has_them(load: Callable[..., Segmenter], number: int) -> None:
    """`SamPredictor`, one box at a time, as its authors use it."""
    sam = tiny_sam()
    predictor = SamPredictor(sam)
    predictor.set_image(PICTURES[number])
    segmenter = load("segment_anything")
    with torch.inference_mode():
        ((logits, seen),) = segmenter.logits([PICTURES[number]], [BOXES[number]])
    (masks,) = segmenter.segment([PICTURES[number]], [BOXES[number]])
    assert seen == tuple(predictor.input_size)
    for box, low, mask in zip(BOXES[number], logits, masks, strict=True):
        expected, _, expected_low = predictor.predict(box=np.array(box), multimask_output=False)
        np.testing.assert_allclose(low, expected_low[0], atol=1e-4)
        assert (mask != expected[0]).mean() < 1e-3


@pytest.mark.parametrize("number", range(3))
def test_transformers_boxes_and_masks_are_where_its_own_processor_has_them(
    load: Callable[..., Segmenter], files: Path, number: int
) -> None:
    """`SamProcessor` and `SamModel` on one picture, as the documentation shows."""
    processor = SamProcessor(SamImageProcessor.from_pretrained(files / "tiny-sam"))
    model = SamModel.from_pretrained(files / "tiny-sam").eval()
    inputs = processor(PICTURES[number], input_boxes=[[list(box) for box in BOXES[number]]], return_tensors="pt")
    inputs["input_boxes"] = inputs["input_boxes"].float()
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    with torch.no_grad():
        output = model(pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"], multimask_output=False)
    (expected,) = processor.post_process_masks(output.pred_masks, *sizes)
    segmenter = load("sam")
    with torch.inference_mode():
        ((logits, _),) = segmenter.logits([PICTURES[number]], [BOXES[number]])
    (masks,) = segmenter.segment([PICTURES[number]], [BOXES[number]])
    torch.testing.assert_close(logits, output.pred_masks[0, :, 0], atol=1e-4, rtol=0)
    assert (masks != expected[:, 0].numpy()).mean() < 1e-3


def test_the_same_weights_give_the_same_masks_in_both_libraries(load: Callable[..., Segmenter]) -> None:
    first, second = load("sam"), load("segment_anything")
    exact = picture(SIDE, SIDE * 3 // 4, 4)  # needs no resizing, in which Pillow and torch round differently
    with torch.inference_mode():
        ((ours, _),) = first.logits([exact], BOXES[1:2])
        ((theirs, _),) = second.logits([exact], BOXES[1:2])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    for one, other in zip(first.segment(PICTURES, BOXES), second.segment(PICTURES, BOXES), strict=True):
        assert (one & other).sum() / (one | other).sum() > 0.98


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_image_encoder_is_computed_in_a_half(load: Callable[..., Segmenter], backend: str) -> None:
    half, whole = load(backend, dtype="bfloat16"), load(backend)
    network: Any = half.network if isinstance(half, SamSegmenter) else half.sam
    encoder = "vision_encoder" if backend == "sam" else "image_encoder"
    for name, weight in network.named_parameters():
        assert weight.dtype == (torch.bfloat16 if name.startswith(encoder) else torch.float32), name
    for one, other in zip(half.segment(PICTURES, BOXES), whole.segment(PICTURES, BOXES), strict=True):
        assert (one & other).sum() / (one | other).sum() > 0.9


def test_the_two_kinds_of_checkpoint_hold_the_same(files: Path) -> None:
    pth, safetensors = read_weights(files / "meta.pth"), read_weights(files / "meta.safetensors")
    assert pth.keys() == safetensors.keys()
    assert all(torch.equal(pth[name], safetensors[name]) for name in pth)


def test_provenance_names_model_and_content(load: Callable[..., Segmenter]) -> None:
    folder, file = load("sam").provenance, load("segment_anything").provenance
    assert (folder.backend, folder.model) == ("sam", "tiny-sam")
    assert (file.backend, file.model) == ("segment_anything", "meta.pth")
    assert folder.revision.startswith("sha256:") and file.revision.startswith("sha256:")


def load_checkpoint(file: Path, **keys: Any) -> None:
    SegmentAnythingSettings(model=str(file), **keys).load("cpu")


def test_a_checkpoint_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    torch.save({"code": Path("x")}, tmp_path / "objects.pth")
    torch.save({"epoch": 3, "model": {}}, tmp_path / "wrapped.pth")
    (tmp_path / "sam.onnx").write_bytes(b"x")
    expected = {
        "none.pth": "no such file; give a checkpoint of segment-anything",
        "text.pth": "damaged, or holds more than tensors",
        "empty.pth": "damaged, or holds more than tensors",
        "objects.pth": "damaged, or holds more than tensors",
        "cut.safetensors": "cannot be loaded",
        "wrapped.pth": "expected a file of tensors by name",
        "sam.onnx": r"expected a \.pth or \.safetensors file",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message) as told:
            load_checkpoint(tmp_path / name)
        assert str(told.value).startswith(f"segment.model={tmp_path / name}") and "\n" not in str(told.value)


def test_weights_of_another_network_are_told_with_the_first_that_differs(files: Path) -> None:
    with pytest.raises(UserError, match=r"is no SAM of segment.model_type=vit_b \(lacks image_encoder.pos_embed; \d+"):
        load_checkpoint(files / "meta.pth", model_type="vit_b")


def test_a_folder_whose_sizes_contradict_each_other_is_refused(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "contradiction"
    save_transformers(tiny_sam(), folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_size": {"height": 1024, "width": 1024}}))
    with pytest.raises(UserError, match="makes pictures of 1024 x 1024 with longest_edge=128"):
        SamSettings(model=str(folder)).load("cpu")


@pytest.mark.slow
def test_a_checkpoint_of_real_size_loads_by_its_type(tmp_path: Path) -> None:
    """ViT-B with random weights, 360 MB: the registry's own sizes, once through the encoder."""
    torch.manual_seed(0)
    file = save_meta(sam_model_registry["vit_b"](), tmp_path / "sam_vit_b.pth")
    segmenter = SegmentAnythingSettings(model=str(file), model_type="vit_b", dtype="float32").load("cpu")
    (masks,) = segmenter.segment(PICTURES[:1], BOXES[:1])
    assert masks.shape == (3, 96, 128)
