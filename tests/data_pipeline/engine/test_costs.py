"""What `--dry-run` tells: work by stage, hours, dollars and bytes, each against numbers computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from data_pipeline.build_settings import DataSettings
from data_pipeline.engine.costs import (
    ACCELERATORS,
    NETWORKS,
    accelerators_at_once,
    duration,
    estimate,
    money,
    size,
    stored_bytes,
    total_hours,
    works,
)
from scripts import count_pipeline_flops as script

A100 = ACCELERATORS[0]
NO_STAGES = {
    "caption": {"backend": "alt_text"},
    "detect": {"backend": "clip_proposals"},
    "segment": {"backend": "grabcut"},
}
FULL = {"caption": {"backend": "blip2"}, "detect": {"backend": "grounding_dino"}, "segment": {"backend": "sam"}}


def settings(stages: dict[str, Any] | None = None, **others: Any) -> DataSettings:
    """Alt text, region proposals and GrabCut over a folder, but for what is said."""
    given = {"source": {"kind": "folder", "path": "photos"}, "output": "out", **others}
    return DataSettings.model_validate(given | {"stages": NO_STAGES | (stages or {})})


@pytest.mark.parametrize(
    ("stage", "given", "half", "float32"),
    [
        # picture + beams * first word + beams * 29 further tokens
        ("caption", {"backend": "blip2"}, 0.5336 + 0.1667 + 29 * 0.00531, 0),
        ("caption", {"backend": "blip2", "num_beams": 3}, 0.5336 + 3 * (0.1667 + 29 * 0.00531), 0),
        ("caption", {"backend": "blip", "max_new_tokens": 1, "dtype": "float32"}, 0, 0.3821 + 0.0220),
        ("detect", {"backend": "grounding_dino", "dtype": "float16"}, 0.6760, 0),
        ("detect", {"backend": "grounding_dino", "shortest_side": 400}, 0, 0.6760 / 4),
        ("detect", {"backend": "grounding_dino", "longest_side": 800}, 0, 0.6760 * (800 / 1066) ** 2),
        ("detect", {"backend": "grounding_dino_py", "model": "x.pth", "config": "swin_b"}, 0, 1.1185),
        # eight boxes, in float32 whatever the encoder
        ("segment", {"backend": "sam"}, 0.9721, 8 * 0.003625),
        ("segment", {"backend": "sam", "dtype": "float32"}, 0, 0.9721 + 8 * 0.003625),
        ("segment", {"backend": "segment_anything", "model": "x.pth"}, 5.9611, 8 * 0.003625),
    ],
)
def test_a_stages_work_follows_its_settings(stage: str, given: dict[str, Any], half: float, float32: float) -> None:
    (work,) = [one for one in works(settings({stage: given})) if one.stage == stage]
    assert (work.half, work.float32) == pytest.approx((half, float32), rel=1e-9)
    assert work.sure == (stage == "caption")


def test_hours_are_operations_over_the_assumed_share_of_the_peak_of_their_dtype() -> None:
    caption, _, detect, segment = works(settings(FULL))
    # 0.85429 TFLOP at 0.4 * 312 TFLOP/s; 0.6760 at 0.4 * 19.5; 0.9721 and 0.029
    assert caption.hours(1_000_000, A100) == pytest.approx(1.9015, abs=1e-4)
    assert detect.hours(1_000_000, A100) == pytest.approx(24.0741, abs=1e-4)
    assert segment.hours(1_000_000, A100) == pytest.approx(2.1637 + 1.0328, abs=1e-4)
    low, high = total_hours([caption, detect, segment], 1_000_000, A100)
    assert (low, high) == pytest.approx((1.9015, 1.9015 + 24.0741 + 3.1965), abs=2e-4)


def test_the_lines_of_a_full_build() -> None:
    told = estimate(
        settings(
            FULL,
            source={"kind": "laion", "metadata": "m", "download": "d"},
            checks=[{"check": "nsfw"}, {"check": "faces", "model": "face.onnx"}],
            engine={"workers": 4},
        ),
        1_000_000,
    )
    assert told[0] == "estimate for 1,000,000 pictures, computed beforehand:"
    assert told[1] == "  checks   nsfw Falconsai/nsfw_image_detection: 0.04 TFLOP a picture, A100 4.7 min, H100 1.5 min"
    assert told[2] == "  checks   faces: on the CPU, not counted"
    assert told[3] == "  caption  blip2 Salesforce/blip2-opt-2.7b: 0.85 TFLOP a picture, A100 1.9 h, H100 36 min"
    assert told[4] == "  nouns    spacy en_core_web_sm: 45 min of one CPU core"
    assert told[7] == (
        "  A100: 2.0 h if the rules let no picture through, 29 h if all (how many is not known); on 4 of them 30 min "
        "to 7.3 h; $3.96 to $59 at an assumed $2.00 an hour"
    )
    assert "40% of the peak" in told[9]
    assert told[10].startswith("  written: at most about 426 GB, 426 kB a picture")
    assert told[11] == "  fetched: about 294 GB, 294 kB a picture"
    assert len(told) == 12


def test_a_model_that_was_not_counted_is_said_and_left_out() -> None:
    told = estimate(settings({"caption": {"backend": "blip", "model": "my/blip"}, "segment": {"backend": "sam"}}), 1000)
    assert "  caption  blip my/blip: not known, not counted" in told
    (total,) = [line for line in told if line.startswith("  A100")]
    assert total.startswith("  A100 without caption, detect: 0 s if the rules let no picture through, 12 s if all")


def test_a_build_without_accelerators_is_told_in_seconds_of_a_core() -> None:
    told = estimate(settings(source={"kind": "toybox"}), 1000)
    assert "  caption  alt_text: no work to speak of" in told
    assert "  nouns    spacy en_core_web_sm: 2.7 s of one CPU core" in told  # 1000 * 0.0027 s
    assert "  segment  grabcut: 4.0 min of one CPU core" in told  # 1000 pictures * 8 boxes * 0.03 s
    assert not any("A100" in line for line in told)


def test_what_the_source_knows_is_not_looked_for() -> None:
    pairs = settings(source={"kind": "toybox", "entities": "true"})
    photos = settings(source={"kind": "openimages", "folder": "openimages"})
    assert [work.stage for work in works(pairs)] == ["caption"]
    assert [work.stage for work in works(photos)] == ["caption", "segment"]
    assert [work.stage for work in works(settings({"nouns": None, "detect": None}))] == ["caption", "segment"]


def test_uncounted_pictures_are_told_by_the_million() -> None:
    one, million = estimate(settings(), 0), estimate(settings(), 1_000_000)
    assert one[0] == "estimate for each million pictures (none is counted here), computed beforehand:"
    assert one[1:] == million[1:]


def test_a_build_on_processors_is_told_that_the_hours_are_not_theirs() -> None:
    told = estimate(settings({"segment": {"backend": "sam"}}, engine={"device": "cpu"}), 1000)
    assert any("engine.device=cpu" in line for line in told)


@pytest.mark.parametrize(
    ("engine", "count"),
    [
        ({}, 8),
        ({"workers": 3}, 3),
        ({"kind": "ray"}, 8),
        ({"kind": "ray", "ray_workers": 6, "ray_gpus": 0.5}, 3),
        ({"kind": "ray", "ray_workers": 6, "ray_gpus": 0}, 1),
    ],
)
def test_as_many_accelerators_as_the_settings_put_to_work(engine: dict[str, Any], count: int) -> None:
    assert accelerators_at_once(settings(engine=engine).engine) == count


def test_bytes_of_a_picture_are_its_pixels_times_the_bits_of_its_quality() -> None:
    # 1024 x 768 pixels: 4.25 bits each at quality 95; those of the web 294,118 bytes over 1024 * 1365; 8 kB of record
    assert stored_bytes(settings()) == pytest.approx((786432 * 294117.6 / 1397760 + 8000, 786432 * 4.25 / 8 + 8000))
    small = settings(images={"max_side_px": 512, "jpeg_quality": 80})  # 196,608 pixels, between 1.74 and 2.36 bits
    assert stored_bytes(small)[1] == pytest.approx(196608 * 2.05 / 8 + 8000)
    scenes = stored_bytes(settings(source={"kind": "toybox", "size": 64}))
    assert scenes == pytest.approx((4096 * 4.25 / 8 + 8000,) * 2)


@pytest.mark.parametrize(
    ("write", "number", "text"),
    [
        (duration, 0.0, "0 s"),
        (duration, 0.0001, "under 1 s"),
        (duration, 0.5, "30 min"),
        (duration, 1.25, "1.2 h"),
        (duration, 3061.4, "3,061 h"),
        (money, 3.961, "$3.96"),
        (money, 6122.4, "$6,122"),
        (size, 426e3, "426 kB"),
        (size, 1.73e9, "1.7 GB"),
        (size, 32.4e12, "32 TB"),
    ],
)
def test_numbers_are_told_in_the_unit_a_person_would_take(
    write: Callable[[float], str], number: float, text: str
) -> None:
    assert write(number) == text


def test_every_constant_has_a_count() -> None:
    assert script.COUNTERS.keys() == NETWORKS.keys()


@pytest.mark.slow
def test_the_constant_of_sam_is_what_torch_counts_in_both_libraries() -> None:
    for key in (("sam", "facebook/sam-vit-base"), ("segment_anything", "vit_b")):
        assert script.parts(script.COUNTERS[key]()) == pytest.approx(script.parts(NETWORKS[key]), rel=1e-3)


@pytest.mark.slow
def test_a_constant_that_is_off_fails_the_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "nsfw", "Falconsai/nsfw_image_detection"
    assert script.main(["--only", "nsfw"]) == 0
    monkeypatch.setitem(NETWORKS, key, type(NETWORKS[key])(NETWORKS[key].picture * 1.03))
    assert script.main(["--only", "nsfw"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_the_readmes_table_has_both_sizes_of_sam_and_three_sizes_of_dataset(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script.main(["--table"]) == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.count("|") == 9 and set(rule) <= set("|- ")
    # 0.85429 + 5.9611 TFLOP at 0.4 * 312 and 0.4 * 989 TFLOP/s, 0.6760 + 0.029 at 0.4 * 19.5 and 0.4 * 67
    assert rows[0].startswith("| BLIP-2, Grounding DINO tiny in float32, SAM ViT-H | 7.5 | 40 h, $81 |")
    assert rows[0].endswith("| 919 h, $2,757 |")
    assert "SAM ViT-B" in rows[1] and len(rows) == 5
