"""Run lengths of masks: the same as pycocotools', and safe to read from anywhere."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco

from data_pipeline.record import MaskRle
from data_pipeline.shards.masks import decode_mask, encode_mask, mask_area, run_lengths


@pytest.mark.parametrize("seed", range(30))
def test_masks_come_back_as_pycocotools_has_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 300, 2))
    mask = rng.random((height, width)) < rng.choice([0.01, 0.5, 0.99])
    mask[: height // 2] = mask[0, 0]  # long runs, too
    coded = encode_mask(mask)
    assert (decode_mask(coded) == mask).all()
    theirs = {"size": list(coded.size), "counts": coded.counts.encode()}
    assert (coco.decode(theirs).astype(bool) == decode_mask(coded)).all()
    assert mask_area(coded) == mask.sum() == coco.area(theirs)


def test_golden_runs_go_down_the_columns() -> None:
    mask = np.array([[0, 1, 1], [0, 1, 0]], dtype=bool)
    coded = encode_mask(mask)
    assert coded == MaskRle((2, 3), "231")
    assert run_lengths(coded).tolist() == [2, 3, 1]


def test_full_and_empty_masks() -> None:
    assert encode_mask(np.ones((2, 2), dtype=bool)).counts == "04"
    assert mask_area(MaskRle((2, 2), "04")) == 4
    assert not decode_mask(encode_mask(np.zeros((2, 2), dtype=bool))).any()


@pytest.mark.parametrize(
    "mask",
    [
        MaskRle((2, 3), ""),
        MaskRle((2, 3), "23"),  # too short
        MaskRle((2, 3), "2311"),  # too long
        MaskRle((2, 3), "23P"),  # a number that goes on after the end
        MaskRle((2, 3), "2 1"),
        MaskRle((2, 3), "23é"),
        MaskRle((2, 3), "23O1"),  # a negative run
        MaskRle((2, 3), "oooooooooo1"),  # a number of 55 bits
        MaskRle((0, 3), ""),
        MaskRle((-2, -3), "231"),
    ],
)
def test_runs_that_do_not_fill_the_picture_are_refused(mask: MaskRle) -> None:
    with pytest.raises(ValueError):
        decode_mask(mask)
