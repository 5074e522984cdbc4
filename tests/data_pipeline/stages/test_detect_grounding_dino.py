"""Grounding DINO in both backends: one contract, one set of weights, equal scores; what each refuses, in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, BertModel, GroundingDinoProcessor

from data_pipeline.errors import UserError
from data_pipeline.record import Provenance
from data_pipeline.stages import BoxScores, Detector, NounChunk, Picture
from data_pipeline.stages.detect import grounding_dino_py
from data_pipeline.stages.detect.grounding_dino import GroundingDinoSettings
from data_pipeline.stages.detect.grounding_dino_py import GroundingDinoPySettings
from data_pipeline.stages.detect.groundingdino_network import methods_of_old_bert, read_literals
from data_pipeline.stages.detect.text_guided import Sides, TextGuidedDetector
from tests.data_pipeline.stages.tiny_grounding_dino import (
    QUERIES,
    save_as_transformers,
    save_small_original,
    save_tiny_grounding_dino,
    word_piece_tokenizer,
)

SMALL: dict[str, Any] = {"shortest_side": 96, "longest_side": 160}
SIZES = ((100, 140), (140, 100), (104, 141), (90, 90), (60, 300), (96, 128))  # the first, third and last meet at 96x128
CAPTIONS = (
    ("a dog",),
    ("two dogs", "a cat", "the minivan", "a flower pot"),
    ("the red sports car", "a plant", "a red sports car"),
    ("a cat", "..."),
    ("the boat of st bernard",),
    ("a dog", "a boat"),
)


def noise(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chunks(*texts: str) -> tuple[NounChunk, ...]:
    return tuple(NounChunk(text, text.split()[-1], (0, len(text))) for text in texts)


PICTURES = [noise(*size, seed) for seed, size in enumerate(SIZES)]
CHUNKS = [chunks(*texts) for texts in CAPTIONS]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_original(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_grounding_dino(tmp_path_factory.mktemp("tiny"))


def of_the_authors(original: Path, **options: Any) -> GroundingDinoPySettings:
    given = {
        "model": str(original / "weights.safetensors"),
        "config": str(original / "config.py"),
        "text_encoder": str(original / "bert"),
    }
    return GroundingDinoPySettings(**{**given, **SMALL, **options})


@pytest.fixture(scope="module")
def authors(original: Path) -> TextGuidedDetector:
    return of_the_authors(original).load("cpu")


@pytest.fixture(scope="module")
def port(tiny: Path) -> TextGuidedDetector:
    return GroundingDinoSettings(model=str(tiny), **SMALL).load("cpu")


@pytest.fixture(params=["grounding_dino", "grounding_dino_py"])
def detector(request: pytest.FixtureRequest) -> Detector:
    name = "port" if request.param == "grounding_dino" else "authors"
    found: Detector = request.getfixturevalue(name)
    assert found.provenance.backend == request.param
    return found


def assert_same(first: BoxScores, second: BoxScores, picture: Picture, tolerance: float = 1e-4) -> None:
    """Boxes to that fraction of the picture, scores to 1e-4."""
    side = max(picture.shape)
    np.testing.assert_allclose(first.boxes_xyxy_px / side, second.boxes_xyxy_px / side, rtol=0, atol=tolerance)
    np.testing.assert_allclose(first.token_scores, second.token_scores, rtol=0, atol=1e-4)
    np.testing.assert_allclose(first.chunk_scores, second.chunk_scores, rtol=0, atol=1e-4)


def test_every_picture_gets_boxes_inside_it_and_a_score_of_each_chunk(detector: Detector) -> None:
    for picture, own, found in zip(PICTURES, CHUNKS, detector.detect(PICTURES, CHUNKS), strict=True):
        height, width = picture.shape[:2]
        assert found.boxes_xyxy_px.shape == (QUERIES, 4) and found.boxes_xyxy_px.dtype == np.float32
        assert found.token_scores.shape == found.chunk_scores.shape == (QUERIES, len(own))
        assert found.token_scores.dtype == found.chunk_scores.dtype == np.float32
        x0, y0, x1, y1 = found.boxes_xyxy_px.T
        assert ((x0 >= 0) & (x0 <= x1) & (x1 <= width) & (y0 >= 0) & (y0 <= y1) & (y1 <= height)).all()
        assert (x1 > x0).sum() > 0
        assert (found.token_scores >= found.chunk_scores - 1e-6).all() and found.token_scores.max() <= 1
        assert found.chunk_scores[:, 0].std() > 1e-4  # boxes differ: thresholds have something to choose from


def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(detector: Detector) -> None:
    together = detector.detect(PICTURES, CHUNKS)
    for picture, own, found in zip(PICTURES, CHUNKS, together, strict=True):
        assert_same(found, detector.detect([picture], [own])[0], picture)


def test_a_text_padded_to_its_neighbours_length_scores_as_alone(detector: Detector) -> None:
    short, long = chunks("a dog", "a cat"), chunks("a red sports car", "two dogs", "a flower pot", "the minivan")
    (alone,) = detector.detect(PICTURES[:1], [short])
    for order in ([short, long, long], [long, short, long], [long, long, short]):
        numbers = [i for i, own in enumerate(order) if own is short]
        assert_same(detector.detect([PICTURES[0]] * 3, order)[numbers[0]], alone, PICTURES[0])


def test_the_same_call_gives_the_same_bits(detector: Detector) -> None:
    first, second = (detector.detect(PICTURES, CHUNKS) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.boxes_xyxy_px, other.boxes_xyxy_px)
        assert np.array_equal(one.chunk_scores, other.chunk_scores)


def test_chunks_of_one_phrase_share_scores_and_wordless_ones_score_zero(detector: Detector) -> None:
    (found,) = detector.detect(PICTURES[:1], [chunks("a dog", "...", "a cat", "the dog")])
    assert np.array_equal(found.chunk_scores[:, 0], found.chunk_scores[:, 3])
    assert (found.chunk_scores[:, 1] == 0).all() and (found.token_scores[:, 1] == 0).all()
    assert not np.array_equal(found.chunk_scores[:, 0], found.chunk_scores[:, 2])


def test_where_no_chunk_says_anything_there_are_no_boxes(detector: Detector) -> None:
    nothing, something = detector.detect(PICTURES[:2], [chunks("...", "the"), chunks("a dog")])
    assert nothing.boxes_xyxy_px.shape == (0, 4) and nothing.chunk_scores.shape == nothing.token_scores.shape == (0, 2)
    assert len(something.boxes_xyxy_px) == QUERIES


def test_a_caption_longer_than_the_network_reads_keeps_what_fits(detector: Detector) -> None:
    many = chunks(*(f"{'x' * count} dog" for count in range(1, 40)))
    (found,) = detector.detect(PICTURES[:1], [many])
    scored = found.chunk_scores.max(axis=0) > 0
    assert scored[0] and not scored[-1]


@pytest.mark.parametrize("size", [(1, 1), (8, 900), (900, 8)])
def test_a_picture_of_any_shape_is_looked_at(detector: Detector, size: tuple[int, int]) -> None:
    (found,) = detector.detect([noise(*size)], [chunks("a dog")])
    assert len(found.boxes_xyxy_px) == QUERIES and np.isfinite(found.boxes_xyxy_px).all()


@pytest.mark.filterwarnings("error:.*not writable")
def test_a_read_only_or_sliced_picture_is_taken_as_it_is(detector: Detector) -> None:
    shared = noise(100, 280)
    view = shared[:, ::2]
    view.setflags(write=False)
    sliced, whole = detector.detect([view, view.copy()], [chunks("a dog")] * 2)
    assert_same(sliced, whole, view)


def test_both_backends_give_equal_scores_with_equal_weights(
    original: Path, authors: TextGuidedDetector, tmp_path: Path
) -> None:
    same = GroundingDinoSettings(model=str(save_as_transformers(original, tmp_path)), **SMALL).load("cpu")
    for picture, one, other in zip(
        PICTURES, authors.detect(PICTURES, CHUNKS), same.detect(PICTURES, CHUNKS), strict=True
    ):
        # the authors hold logits of box edges within 1e-3 of the picture's, transformers within 1e-5
        assert_same(one, other, picture, tolerance=2e-3)


def test_the_port_is_read_as_transformers_reads_it(tiny: Path) -> None:
    """Published sizes (nothing rounded), transformers' own preparation, and its boxes in pixels."""
    picture = noise(100, 150)
    found = GroundingDinoSettings(model=str(tiny), side_multiple=1, **SMALL).load("cpu")
    (answer,) = found.detect([picture], [chunks("a dog", "the minivan")])
    processor = GroundingDinoProcessor.from_pretrained(tiny)
    processor.image_processor.size = {"shortest_edge": 96, "longest_edge": 160}
    inputs = processor(images=picture, text="dog. minivan.", return_tensors="pt")  # [CLS] dog . mini ##van . [SEP]
    assert inputs.pixel_values.shape == (1, 3, 96, 144)
    with torch.no_grad():
        output = AutoModelForZeroShotObjectDetection.from_pretrained(tiny).eval()(**inputs)
    tokens = output.logits[0].sigmoid()
    (boxes,) = processor.post_process_grounded_object_detection(output, threshold=0.0, target_sizes=[(100, 150)])
    np.testing.assert_allclose(answer.chunk_scores[:, 0], tokens[:, 1], atol=1e-5)
    np.testing.assert_allclose(answer.chunk_scores[:, 1], tokens[:, 3:5].mean(dim=1), atol=1e-5)
    np.testing.assert_allclose(answer.token_scores[:, 1], tokens[:, 3:5].amax(dim=1), atol=1e-5)
    expected = boxes["boxes"].clamp(torch.zeros(4), torch.tensor([150.0, 100.0, 150.0, 100.0]))
    np.testing.assert_allclose(answer.boxes_xyxy_px, expected, atol=1e-2)


def test_boxes_are_in_pixels_of_the_stored_picture_clipped_to_it(tmp_path: Path) -> None:
    def network(pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        assert pixels.shape == (1, 3, 64, 128) and texts == ["dog ."]
        boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.4, 0.4]]])
        return torch.tensor([[[9.0, 0.0, 9.0, 9.0], [9.0, -(3.0**9), 9.0, 9.0]]]), boxes

    looker = TextGuidedDetector(
        network, word_piece_tokenizer(tmp_path), Sides(64, 128, 32, 2), Provenance("x"), "cpu", torch.float32
    )
    (found,) = looker.detect([noise(200, 400)], [chunks("a dog")])
    np.testing.assert_allclose(found.boxes_xyxy_px, [[100, 50, 300, 150], [280, 0, 400, 60]], rtol=1e-5)
    np.testing.assert_allclose(found.chunk_scores, [[0.5], [0.0]], atol=1e-6)


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [
        ((600, 800), 1, (800, 1066)),  # the published size
        ((600, 800), 32, (800, 1056)),
        ((602, 800), 32, (800, 1056)),  # nearly the same shape: the same batch
        ((800, 600), 32, (1056, 800)),
        ((1000, 1000), 32, (800, 800)),
        ((400, 1200), 32, (448, 1344)),  # 444 x 1333
        ((10, 3000), 32, (32, 1344)),  # 4 x 167 + 2 x 84 + 42 + 21 cells
        ((1, 1), 32, (800, 800)),
    ],
)
def test_a_picture_is_looked_at_in_its_shape_at_about_the_published_size(
    size: tuple[int, int], multiple: int, expected: tuple[int, int]
) -> None:
    assert Sides(800, 1333, multiple, 900).of(*size) == expected


def test_a_picture_grows_until_there_are_cells_for_all_boxes() -> None:
    assert Sides(64, 128, 32, 85).of(100, 100) == (64, 64)  # 64 + 16 + 4 + 1 cells
    assert Sides(64, 128, 32, 86).of(100, 100) == (96, 64)


def test_attention_that_misreads_masks_is_not_used(tiny: Path, port: TextGuidedDetector, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    for part in (config, config["text_config"]):
        part["_attn_implementation"] = part["attn_implementation"] = "eager"
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    eager = GroundingDinoSettings(model=str(tmp_path), **SMALL).load("cpu")
    for picture, one, other in zip(
        PICTURES, port.detect(PICTURES, CHUNKS), eager.detect(PICTURES, CHUNKS), strict=True
    ):
        assert_same(one, other, picture)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_runs_and_gives_float32(tiny: Path, dtype: Any) -> None:
    (found,) = GroundingDinoSettings(model=str(tiny), dtype=dtype, **SMALL).load("cpu").detect(PICTURES[:1], CHUNKS[:1])
    assert np.isfinite(found.boxes_xyxy_px).all() and found.boxes_xyxy_px.dtype == np.float32
    assert found.chunk_scores.dtype == np.float32 and found.chunk_scores.max() > 0


def test_mm_grounding_dino_loads_too(tmp_path: Path) -> None:
    folder = save_tiny_grounding_dino(tmp_path / "mm", multi_modal=True)
    mm = GroundingDinoSettings(model=str(folder), **SMALL).load("cpu")
    for picture, own, found in zip(PICTURES, CHUNKS, mm.detect(PICTURES, CHUNKS), strict=True):
        assert_same(found, mm.detect([picture], [own])[0], picture)
    assert mm.provenance.model == "mm" and mm.provenance.revision.startswith("sha256:")


def test_the_authors_pth_is_read_like_safetensors(original: Path, authors: TextGuidedDetector) -> None:
    pickled = of_the_authors(original, model=str(original / "weights.pth")).load("cpu")
    assert pickled.provenance.model == "weights.pth" != authors.provenance.model
    assert_same(pickled.detect(PICTURES[:1], CHUNKS[:1])[0], authors.detect(PICTURES[:1], CHUNKS[:1])[0], PICTURES[0])


def test_bert_is_left_as_it_was_and_gets_only_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {"get_extended_attention_mask", "invert_attention_mask", "get_head_mask"}
    with methods_of_old_bert():
        assert methods <= set(dir(BertModel))
    assert not methods & set(vars(BertModel))  # they come and go on the class itself
    monkeypatch.setattr(BertModel, "get_head_mask", test_half_precision_runs_and_gives_float32, raising=False)
    with methods_of_old_bert():
        assert BertModel.get_head_mask is test_half_precision_runs_and_gives_float32
    assert "get_head_mask" in dir(BertModel)


def test_settings_are_read_without_loading_a_library() -> None:
    code = (
        "import sys, data_pipeline.stages.detect.grounding_dino, data_pipeline.stages.detect.grounding_dino_py\n"
        "print({'torch', 'transformers', 'groundingdino'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_packages_own_configurations_are_read(original: Path) -> None:
    folder = Path(str(grounding_dino_py.find_spec("groundingdino").origin)).parent / "config"
    names = grounding_dino_py.PACKAGED_CONFIGS
    assert read_literals(folder / names["swin_t"])["backbone"] == "swin_T_224_1k"
    assert read_literals(folder / names["swin_b"])["backbone"] == "swin_B_384_22k"
    assert read_literals(original / "config.py")["num_queries"] == QUERIES


def test_without_the_package_one_line_says_what_to_do(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grounding_dino_py, "PACKAGE", "groundingdino_that_is_not_there")
    with pytest.raises(
        UserError, match="pip install --no-build-isolation --no-deps groundingdino-py==0.4.0`, or take back"
    ):
        of_the_authors(original).load("cpu")


class Malice:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


def test_a_checkpoint_is_never_run(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Malice()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"^detect\.model=.*evil\.pth: holds more than weights, or is broken"):
        of_the_authors(original, model=str(tmp_path / "evil.pth")).load("cpu")
    assert "ran" not in capsys.readouterr().out


def test_a_configuration_is_never_run(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, line in enumerate(("import os", "nheads = print('ran')", "print('ran')")):
        config = tmp_path / f"config{number}.py"
        config.write_text(f"nheads = 8\n{line}\n")
        with pytest.raises(UserError, match=r"config\d\.py, line 2: expected `name = constant`"):
            of_the_authors(original, config=str(config)).load("cpu")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model", "gone.pth", r"^detect\.model=gone\.pth: no such file; expected a checkpoint"),
        ("config", "swin_l", r"^detect\.config=swin_l: expected swin_t, swin_b or a \.py file"),
        ("text_encoder", "gone/", r"^detect\.text_encoder=gone/: no such folder; give a folder or a hub id"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(original: Path, option: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        of_the_authors(original, **{option: value}).load("cpu")


def test_what_does_not_fit_is_told_in_one_line(original: Path, tmp_path: Path) -> None:
    text = (original / "config.py").read_text()
    for number, (old, new, message) in enumerate(
        (
            (
                "enc_layers = 1",
                "enc_layers = 2",
                r"^detect\.model=.*: incomplete, lacks \d+ weights such as transformer",
            ),
            ("num_queries = 20", "num_queries = 30", r"^detect\.model=.*: cannot be loaded .*size mismatch"),
            ("nheads = 8", "", r"^detect\.config=.*: cannot be loaded .*nheads"),
            ('"swin_T_224_1k"', '"resnet50"', r"^detect\.config=.*: backbone=resnet50; expected a Swin"),
            ("[1, 2, 3]", "[1, 2]", r"^detect\.config=.*: holds values that do not fit"),
        )
    ):
        config = tmp_path / f"config{number}.py"
        config.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message) as told:
            of_the_authors(original, config=str(config)).load("cpu")
        assert "\n" not in str(told.value)


def test_the_port_refuses_other_networks_and_incomplete_ones(original: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds a network of type 'bert'; expected grounding-dino or mm-grounding"):
        word_piece_tokenizer(original / "bert")
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (tiny / name).exists():
                (original / "bert" / name).write_bytes((tiny / name).read_bytes())
        GroundingDinoSettings(model=str(original / "bert"), **SMALL).load("cpu")
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny / "model.safetensors")
    weights.pop("model.level_embed")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"incomplete, lacks 1 weights such as model\.level_embed"):
        GroundingDinoSettings(model=str(tmp_path), **SMALL).load("cpu")


def test_a_longest_side_below_the_shortest_is_refused() -> None:
    with pytest.raises(ValueError, match="longest_side=500 is below shortest_side=800"):
        GroundingDinoSettings(longest_side=500)
