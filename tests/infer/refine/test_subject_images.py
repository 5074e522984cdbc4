"""A subject's pictures are read, checked and varied; what is odd is told by file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import UserError
from infer.refine.method import Concept
from infer.refine.samples import RefineSamples
from infer.refine.subject_images import (
    VariationSettings,
    find_pictures,
    read_pictures,
    unlike_pictures,
    vary,
    with_captions,
)
from infer.refine.task import loss_weights
from model.image_encoder import SubjectImageEncoder


def checkered(width: int, height: int, cell: int = 8) -> Image.Image:
    rows, columns = np.indices((height, width)) // cell
    grey = (((rows + columns) % 2) * 255).astype(np.uint8)
    return Image.fromarray(np.stack([grey, 255 - grey, grey], axis=-1))


def saved(picture: Image.Image, path: Path) -> Path:
    picture.save(path)
    return path


def read(path: Path, size: int = 64) -> tuple[np.ndarray, list[str]]:
    pictures, warnings = read_pictures([path, path], size)
    return pictures[0].rgba, warnings


def test_folders_give_their_pictures_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg"):
        saved(checkered(64, 64), tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    assert [path.name for path in find_pictures([tmp_path])] == ["a.jpg", "b.png"]


@pytest.mark.parametrize("place", ["empty", "missing"])
def test_no_pictures_are_refused_in_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="images .*give .*pictures of the subject|no pictures there"):
        find_pictures([tmp_path / place])


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not a picture")
    with pytest.raises(UserError, match="x.png: not a picture"):
        read_pictures([tmp_path / "x.png"], 64)


def test_a_sharp_square_picture_brings_no_warning(tmp_path: Path) -> None:
    _, warnings = read(saved(checkered(128, 128), tmp_path / "good.png"))
    assert warnings == []


def test_a_long_picture_is_cropped_to_its_middle_and_says_so(tmp_path: Path) -> None:
    picture = checkered(300, 100)
    picture.paste((255, 0, 0), (100, 0, 200, 100))
    rgba, warnings = read(saved(picture, tmp_path / "long.png"))
    assert (rgba[8:-8, 8:-8, 0] > 250).all()
    assert "long.png: 300 x 100 pixels, cropped" in warnings[0]


def test_tiny_and_blurred_pictures_are_warned_of(tmp_path: Path) -> None:
    assert any("only 16 x 16" in line for line in read(saved(checkered(16, 16, 2), tmp_path / "tiny.png"))[1])
    flat = Image.fromarray(np.tile(np.linspace(0, 255, 128, dtype=np.uint8)[None, :, None], (128, 1, 3)))
    assert any("blurred" in line for line in read(saved(flat, tmp_path / "flat.png"))[1])


def test_a_picture_lying_on_its_side_is_turned_by_its_exif_tag(tmp_path: Path) -> None:
    picture = checkered(64, 64)
    picture.paste((255, 0, 0), (0, 0, 64, 16))  # a red top
    exif = picture.getexif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    rgba, _ = read(tmp_path / "turned.jpg")
    assert rgba[-4, 32, 0] > 200 and rgba[-4, 32, 1] < 60


def test_a_single_picture_is_warned_of(tmp_path: Path) -> None:
    _, warnings = read_pictures([saved(checkered(64, 64), tmp_path / "one.png")], 64)
    assert "one.png: the only picture" in warnings[-1]


def test_a_picture_of_something_else_is_warned_of_with_its_similarity(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    encoder = SubjectImageEncoder(16, {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16})

    class Colours(SubjectImageEncoder):
        def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            means = pictures.mean(dim=(2, 3)) - 0.5
            return means, super().forward(pictures)[1]

    encoder.__class__ = Colours
    for name, colour in (("a", (255, 20, 20)), ("b", (250, 30, 25)), ("c", (10, 250, 250))):
        saved(Image.new("RGB", (32, 32), colour), tmp_path / f"{name}.png")
    pictures, _ = read_pictures(find_pictures([tmp_path]), 32)
    warnings = unlike_pictures(pictures, encoder)
    assert len(warnings) == 1 and "c.png: may show something else (similarity -" in warnings[0]


def test_variation_is_a_function_of_the_generator_and_marks_what_counts(tmp_path: Path) -> None:
    pictures, _ = read_pictures([saved(checkered(64, 64), tmp_path / "p.png")], 64)
    settings = VariationSettings(flip=0.5, shrink=1.0, shrink_to=0.5, say_size=True)
    first, again = (vary(pictures[0], settings, np.random.default_rng(4)) for _ in range(2))
    assert (first.pixels == again.pixels).all() and first.size_words == again.size_words
    share = float(first.valid.mean())
    assert 0.2 < share < 1.0
    outside = first.pixels[:, first.valid[0] == 0]
    assert (outside == 127 / 255).all()


def test_enlarged_pictures_say_so_only_when_asked(tmp_path: Path) -> None:
    pictures, _ = read_pictures([saved(checkered(64, 64), tmp_path / "p.png")], 64)
    rng = np.random.default_rng(0)
    assert vary(pictures[0], VariationSettings(enlarge=1.0, say_size=True), rng).size_words in (
        "zoomed in ",
        "close up ",
    )
    assert vary(pictures[0], VariationSettings(enlarge=1.0), rng).size_words == ""
    assert float(vary(pictures[0], VariationSettings(enlarge=1.0), rng).valid.min()) == 1.0


def test_transparent_pixels_do_not_count(tmp_path: Path) -> None:
    rgba = np.array(checkered(64, 64).convert("RGBA"))
    rgba[:32, :, 3] = 0
    pictures, _ = read_pictures([saved(Image.fromarray(rgba), tmp_path / "cut.png")], 64)
    varied = vary(pictures[0], VariationSettings(flip=0.0), np.random.default_rng(0))
    assert float(varied.valid[0, :32].max()) == 0 and float(varied.valid[0, 32:].min()) == 1


def test_a_caption_beside_a_picture_takes_the_place_of_the_templates(tmp_path: Path) -> None:
    for name, text in (("a", "a dog on the beach"), ("b", "the {} at night\n")):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "c.png")
    pictures = with_captions(read_pictures(find_pictures([tmp_path]), 64)[0], "dog")
    assert [picture.caption for picture in pictures] == ["a {} on the beach", "the {} at night", None]
    samples = RefineSamples([Concept("z", "dog", "subject", pictures)], ["z dog"], ["a {}"], VariationSettings(), 0)
    assert {samples[n].prompt for n in range(6)} == {"a z dog on the beach", "the z dog at night", "a z dog"}
    (tmp_path / "c.txt").write_text("a sunny day", encoding="utf-8")
    with pytest.raises(UserError, match=r"c.txt: 'a sunny day': expected the subject once, as {} or 'dog'"):
        with_captions(pictures, "dog")


def test_the_background_counts_as_much_as_asked(tmp_path: Path) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32] = 255
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    assert find_pictures([tmp_path]) == [tmp_path / "a.png"]
    (read,), _ = read_pictures([tmp_path / "a.png"], 64, tell_apart=True)
    shown = vary(read, VariationSettings(flip=0.0, background_weight=0.25), np.random.default_rng(0))
    assert torch.equal(shown.valid[0, :, :32], torch.ones(64, 32))
    assert torch.equal(shown.valid[0, :, 32:], torch.full((64, 32), 0.25))
    assert float(shown.pixels[:, :, 32:].max()) == 0.0  # it stays as it is
    mirrored = vary(read, VariationSettings(flip=1.0, background_weight=0.25), np.random.default_rng(0))
    assert torch.equal(mirrored.valid, shown.valid.flip(-1))
    for size in (VariationSettings(shrink=1.0, background_weight=0.25), VariationSettings(enlarge=1.0, flip=0.0)):
        resized = vary(read, size, np.random.default_rng(3)).valid
        assert resized.shape == (1, 64, 64) and float(resized.max()) == 1.0
    (whole,), _ = read_pictures([tmp_path / "a.png"], 64)
    assert float(vary(whole, VariationSettings(background_weight=0.25), np.random.default_rng(0)).valid.min()) == 1.0


def test_cells_of_the_latents_count_as_much_as_their_pixels() -> None:
    valid = torch.zeros(1, 1, 4, 8)
    valid[..., :2], valid[..., 2:4], valid[..., 4] = 1.0, 0.5, 1.0  # cells: full, half weight, half covered, none
    valid[:, :, 2:, 4] = 0.0
    assert loss_weights(valid, (2, 4)).tolist() == [[[[1.0, 0.5, 1.0, 0.0], [1.0, 0.5, 0.0, 0.0]]]]
