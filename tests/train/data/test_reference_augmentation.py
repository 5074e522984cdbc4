"""References seen anew: colours and alpha move as one, by amounts that the seed decides."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from train.data.reference_augmentation import FolderPictures, PaintedBackgrounds, augment, perspective, rotation, warp
from train.settings import ReferenceSettings

SIZE = 64


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def cutout() -> np.ndarray:
    """A red left half and a blue right half, opaque within a margin of 5; what is hidden beyond is green."""
    picture = np.zeros((40, 60, 4), np.uint8)
    picture[..., 1] = 255
    picture[5:35, 5:30] = (255, 0, 0, 255)
    picture[5:35, 30:55] = (0, 0, 255, 255)
    return picture


def settings(**values: object) -> ReferenceSettings:
    return ReferenceSettings.model_validate({"background": 0.0, **values})


def test_without_settings_the_cut_out_is_as_it_was() -> None:
    assert augment(cutout(), settings(), SIZE, seeded()) is not None
    np.testing.assert_array_equal(augment(cutout(), settings(), SIZE, seeded()), cutout())


def test_a_mirrored_cut_out_has_its_colours_and_its_alpha_the_other_way() -> None:
    found = augment(cutout(), settings(flip=1.0), SIZE, seeded())
    opaque = cutout()[:, ::-1]
    np.testing.assert_array_equal(found[..., 3], opaque[..., 3])
    np.testing.assert_array_equal(found[5:35, 5:55], opaque[5:35, 5:55])


def test_a_quarter_turn_puts_every_pixel_where_it_belongs() -> None:
    found = warp(cutout(), rotation(60, 40, 90))
    np.testing.assert_array_equal(found[..., 3], np.rot90(cutout()[..., 3]))
    np.testing.assert_array_equal(found[5:55, 5:35], np.rot90(cutout())[5:55, 5:35])


def test_the_corners_of_a_perspective_go_where_the_numbers_say() -> None:
    matrix = perspective(60, 40, np.array([[0.1, 0.2], [0, 0], [0.25, 0.25], [0, 0]]))
    corners = matrix @ np.array([[0, 60, 60, 0], [0, 0, 40, 40], [1, 1, 1, 1]], float)
    np.testing.assert_allclose((corners[:2] / corners[2]).T, [[6, 8], [60, 0], [45, 30], [0, 40]], atol=1e-4)


@pytest.mark.parametrize("changes", [{"rotation_degrees": 45.0}, {"perspective": 1.0}, {"flip": 1.0}])
def test_colour_and_alpha_stay_together_and_nothing_hidden_appears(changes: dict[str, float]) -> None:
    found = augment(cutout(), settings(**changes), SIZE, seeded(3))
    inside = cv2.erode((found[..., 3] > 250).astype(np.uint8), np.ones((3, 3))) > 0
    assert inside.sum() > 400
    # Red or blue, or a mixture of both where they meet; the green of hidden pixels is nowhere that can be seen.
    assert found[found[..., 3] > 8][:, 1].max() <= 2
    assert (found[inside][:, 0].astype(int) + found[inside][:, 2] > 245).all()


def test_all_of_a_turned_cut_out_is_kept() -> None:
    square = np.full((40, 40, 4), 255, np.uint8)
    turned = warp(square, rotation(40, 40, 45))
    assert turned.shape[:2] == (58, 58)  # 40 times the root of 2 is 56.6, on whole pixels to both sides
    assert turned[..., 3].sum() / 255 == pytest.approx(1600, rel=0.05)


def test_the_seed_decides_and_chances_are_kept() -> None:
    all_of_it = settings(flip=0.5, rotation_degrees=10.0, perspective=0.5)
    first, again, other = (augment(cutout(), all_of_it, SIZE, seeded(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or (first != other).any()
    mirrored = sum((augment(cutout(), settings(flip=0.3), SIZE, seeded(i))[20, 10, 2] > 200) for i in range(300))
    assert 65 <= mirrored <= 115


def test_large_cut_outs_are_reduced_before_they_are_warped() -> None:
    large = cv2.resize(cutout(), (1200, 800), interpolation=cv2.INTER_NEAREST)
    assert max(augment(large, settings(flip=1.0), SIZE, seeded()).shape[:2]) == 2 * SIZE


def test_a_thread_that_would_vanish_stays_as_it_is() -> None:
    thread = np.zeros((2000, 1, 4), np.uint8)
    thread[1000] = 255
    np.testing.assert_array_equal(augment(thread, settings(flip=1.0), 8, seeded())[..., 3].max(), 255)


def test_backgrounds_come_from_a_folder_of_pictures(tmp_path: Path) -> None:
    for name, colour in (("a.png", (250, 0, 0)), ("b.jpg", (0, 250, 0))):
        Image.new("RGB", (90, 60), colour).save(tmp_path / name)
    pictures = FolderPictures(tmp_path, 32)
    seen = {tuple(int(round(v / 50)) for v in pictures(seeded(i))[16, 16]) for i in range(20)}  # type: ignore[index]
    assert seen == {(5, 0, 0), (0, 5, 0)}
    assert np.array_equal(pictures(seeded(1)), pictures(seeded(1)))  # type: ignore[arg-type]
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert all(pictures(seeded(i))[16, 16, 1] > 200 for i in range(20))  # type: ignore[index]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.references.backgrounds=.*no pictures"):
        FolderPictures(tmp_path, 32)


def test_the_toybox_paints_its_own() -> None:
    painted = PaintedBackgrounds(48)
    assert painted(seeded(0)).shape == (48, 48, 3)  # type: ignore[union-attr]
    assert np.array_equal(painted(seeded(4)), painted(seeded(4)))  # type: ignore[arg-type]
