"""Regularisation: drawn once and kept, by the base or another pipeline, or found among real captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from data_pipeline.errors import UserError
from infer.refine.method import RefineBase
from infer.refine.regularisation import open_regularisation
from infer.refine.regularisation.shards import ShardsRegularisation, _open_clip, _text_vectors
from infer.refine.samples import RefineSamples
from infer.refine.settings import RefineSettings
from infer.refine.subject_images import VariationSettings
from model.base_loading import SHIPPED
from tests.infer.refine.tiny_base import concept, tiny_base
from tests.infer.tiny_model import TinyModel
from tests.train.data.scene_shards import scene_shards

CLIP = str(SHIPPED / "toybox" / "region_clip")
DRAWN = {"count": 3, "steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def base(tiny_model: TinyModel) -> RefineBase:
    return tiny_base(tiny_model)


def opened(base: RefineBase, told: dict[str, Any], method: str = "dreambooth", *concepts: Any) -> Any:
    settings = RefineSettings.model_validate(
        {
            "method": method, "output": "z.safetensors", "regularisation": told,
            "concepts": {"z": {"images": ["photos"], "class_word": "dog"}},
        }
    )  # fmt: skip
    return open_regularisation(settings, base, concepts or [concept()], 32)


def pictures_of(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.png"))


def test_none_is_none(base: RefineBase) -> None:
    assert opened(base, {"kind": "none"}) == ()


def test_the_base_draws_its_class_once(base: RefineBase, tmp_path: Path) -> None:
    (found,) = opened(base, {"kind": "generated", "cache": tmp_path, **DRAWN})
    assert len(found) == 3
    picture, caption = found[1]
    assert caption == "a photo of a dog" and picture.rgba.shape == (32, 32, 4) and (picture.rgba[..., 3] == 255).all()
    assert not np.array_equal(picture.rgba, found[0][0].rgba)
    (told,) = tmp_path.glob("*/set.json")
    assert json.loads(told.read_text())["drawn_by"] == base.fingerprint
    times = [path.stat().st_mtime_ns for path in pictures_of(tmp_path)]
    opened(base, {"kind": "generated", "cache": tmp_path, **DRAWN})
    assert [path.stat().st_mtime_ns for path in pictures_of(tmp_path)] == times


def test_an_interrupted_set_goes_on_to_the_same_pictures(base: RefineBase, tmp_path: Path) -> None:
    opened(base, {"kind": "generated", "cache": tmp_path, **DRAWN})
    before = [path.read_bytes() for path in pictures_of(tmp_path)]
    kept = pictures_of(tmp_path)[0].stat().st_mtime_ns
    pictures_of(tmp_path)[1].unlink()
    opened(base, {"kind": "generated", "cache": tmp_path, **DRAWN})
    again = pictures_of(tmp_path)
    assert [path.read_bytes() for path in again] == before and again[0].stat().st_mtime_ns == kept
    opened(base, {"kind": "generated", "cache": tmp_path, **DRAWN, "count": 4})  # more of the same set
    assert [path.read_bytes() for path in pictures_of(tmp_path)][:3] == before and len(pictures_of(tmp_path)) == 4


def test_other_classes_and_settings_are_other_sets(base: RefineBase, tmp_path: Path) -> None:
    told = {"kind": "generated", "cache": tmp_path, **DRAWN, "count": 1}
    dog, mug = opened(base, told, "dreambooth", concept(), concept("y", "mug"))
    assert (dog[0][1], mug[0][1]) == ("a photo of a dog", "a photo of a mug")
    opened(base, told | {"seed": 1})
    opened(base, told | {"prompt": "photo of a {}"})
    assert len(list(tmp_path.iterdir())) == 4


def test_a_cache_that_cannot_be_written_is_one_line(base: RefineBase, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="regularisation.cache=.*cannot be written"):
        opened(base, {"kind": "generated", "cache": tmp_path / "file", **DRAWN})


@pytest.fixture(scope="module")
def lora(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the tiny base, in diffusers' format."""
    folder = tmp_path_factory.mktemp("lora")
    unet = StableDiffusionPipeline.from_pretrained(tiny_model.base, safety_checker=None).unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder


def test_any_pipeline_of_diffusers_draws_with_or_without_a_lora(
    base: RefineBase, tiny_model: TinyModel, lora: Path, tmp_path: Path
) -> None:
    told = {"kind": "pipeline", "model": str(tiny_model.base), "cache": tmp_path, **DRAWN, "count": 1}
    plain = opened(base, told)[0][0][0].rgba
    tuned = opened(base, told | {"lora": str(lora)})[0][0][0].rgba
    again = opened(base, told | {"lora": str(lora / "pytorch_lora_weights.safetensors")})[0][0][0].rgba
    assert not np.array_equal(plain, tuned) and np.array_equal(tuned, again)


def test_a_pipeline_that_is_not_there_is_one_line(base: RefineBase, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="regularisation.model: base nowhere: no such folder"):
        opened(base, {"kind": "pipeline", "model": "nowhere", "cache": tmp_path, **DRAWN})


def test_captions_near_the_class_are_found_the_nearest_first(base: RefineBase, capsys) -> None:
    told = {"kind": "shards", "folder": str(scene_shards()), "clip": CLIP, "similarity": -1, "count": 7}
    (found,) = opened(base, told)
    captions = [found[index][1] for index in range(len(found))]
    assert found[0][0].rgba.shape == (32, 32, 4) and len(found) == 7
    clip = _open_clip(CLIP, torch.device("cpu"))
    vectors = _text_vectors(clip, ["photo of a dog", *captions])
    similar = (vectors[1:] @ vectors[0]).tolist()
    assert similar == sorted(similar, reverse=True) and len(set(similar)) > 3
    assert "regularisation:" not in capsys.readouterr().out
    (fewer,) = opened(base, told | {"similarity": (similar[1] + similar[2]) / 2})
    assert [fewer[index][1] for index in range(len(fewer))] == captions[:2]
    assert "regularisation: 2 of 7 pictures, no more captions" in capsys.readouterr().out


def test_shards_without_the_class_name_the_nearest(base: RefineBase) -> None:
    told = {"kind": "shards", "folder": str(scene_shards()), "clip": CLIP, "similarity": 0.9999}
    with pytest.raises(UserError, match=r"no caption is 0.9999 similar to 'photo of a dog', the nearest is 0\.\d\d"):
        opened(base, told)


def test_a_folder_without_shards_and_a_model_without_text_tower_are_refused(base: RefineBase, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished shards there; give what `data` built"):
        opened(base, {"kind": "shards", "folder": str(tmp_path), "clip": CLIP})
    with pytest.raises(
        UserError, match="regularisation.clip: .* no CLIP of its own that reads texts; give an open_clip"
    ):
        opened(base, {"kind": "shards", "folder": str(scene_shards())})


def test_published_numbers_of_real_pictures() -> None:
    settings = ShardsRegularisation(folder="x")
    assert (settings.count, settings.similarity, settings.query) == (200, 0.85, "photo of a {}")


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"kind": "drawn"}, "regularisation.kind='drawn': expected one of 'none', 'generated', 'pipeline', 'shards'"),
        ({"kind": "generated", "number": 3}, "unknown key regularisation.number"),
        ({"kind": "generated", "prompt": "a dog"}, "regularisation.prompt='a dog'"),
        ({"kind": "pipeline"}, "regularisation.model: missing"),
    ],
)
def test_mistakes_are_named(base: RefineBase, told: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        opened(base, told)


def test_methods_that_leave_the_base_alone_take_none(base: RefineBase) -> None:
    with pytest.raises(UserError, match="textual-inversion leaves the base as it is and needs none"):
        opened(base, {"kind": "generated"}, "textual-inversion")


def test_samples_of_a_set_stand_between_the_subjects(base: RefineBase, tmp_path: Path) -> None:
    sets = opened(base, {"kind": "generated", "cache": tmp_path, **DRAWN})
    samples = RefineSamples([concept()], ["z dog"], base.templates, VariationSettings(), 0, sets)
    rows = [samples[number] for number in range(4)]
    assert [row.prior for row in rows] == [False, True, False, True]
    assert rows[1].prompt == "a photo of a dog" and "z dog" in rows[0].prompt
