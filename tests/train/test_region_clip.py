"""Task region_clip: heads on two frozen towers, exported as the tensors of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.stages.detect.clip_folder import PARTS, WEIGHTS, read_folder
from data_pipeline.toybox.world import ToyboxScene, ToyboxWorld
from scripts.export_toybox import halve, join_region_clip
from tests.train.tiny_runs import tiny_settings
from train.loop import train
from train.settings import TrainSettings
from train.tasks.region_clip import NOTHING, PLACE, RegionClipTask, by_noun, phrases_of


@pytest.fixture(scope="module")
def run(chain: Path) -> Path:
    """The runs, with region_clip trained three steps on clip and base."""
    train(region_settings(chain))
    return chain


def region_settings(runs: Path) -> TrainSettings:
    changes = {"data__size": 64, "data__toybox__references": [1, 1], "ema__decay": 0.0}
    return tiny_settings("region_clip", runs, inputs={"image": "clip", "text": "base"}, **changes)


def scene_of(caption_with: str, split: str = "val") -> ToyboxScene:
    world = ToyboxWorld(split, size=64, min_subjects=1)
    return next(scene for scene in map(world.scene, range(400)) if caption_with in scene.caption)


def test_only_the_heads_are_saved_and_the_rest_comes_from_the_other_runs(run: Path) -> None:
    export = run / "region_clip" / "export"
    own = load_file(export / WEIGHTS)
    assert {"visual.proj", "text_projection", "logit_scale", "ln_final.weight", "visual.ln_post.bias"} < set(own)
    assert not any("mlp" in name or "embedding" in name or "conv1" in name for name in own)
    parts = json.loads((export / PARTS).read_text())
    assert (export / parts["image"]["folder"]).resolve() == (run / "clip" / "export").resolve()
    assert not any(Path(folder).is_absolute() for folder in (parts["image"]["folder"], parts["tokenizer"]))
    state = read_folder(export).clip.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in own.items())
    image = load_file(run / "clip" / "export" / WEIGHTS)
    text = load_file(run / "base" / "export" / "text_encoder" / "model.safetensors")
    assert torch.equal(state["visual.conv1.weight"], image["visual.conv1.weight"])
    embedding = next(tensor for name, tensor in text.items() if name.endswith("token_embedding.weight"))
    assert torch.equal(state["token_embedding.weight"], embedding)
    assert not torch.equal(state["visual.proj"], image["visual.proj"])


def test_what_is_trained_sees_as_the_exported_model_does(run: Path) -> None:
    task = RegionClipTask(region_settings(run), torch.device("cpu"))
    clip, module = task.loaded.clip, task.module
    pictures = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = task.loaded.tokenize(["a photo of a dog", "a photo of a red car"])
    with torch.no_grad():
        assert torch.allclose(
            module.image(module.frozen_image(pictures)), clip.encode_image(pictures, normalize=True), atol=1e-5
        )
        assert torch.allclose(module.text(module.frozen_text(ids)), clip.encode_text(ids, normalize=True), atol=1e-5)


def test_texts_of_one_noun_are_one_answer_and_places_are_none() -> None:
    keys = torch.tensor([0, 0, 1, PLACE, NOTHING, NOTHING])
    chances = by_noun(torch.log(torch.tensor([[1.0, 2.0, 3.0, 2.0, 1.0, 1.0]])), keys).exp()
    assert chances[0].tolist() == pytest.approx([0.3, 0.3, 0.2])


def test_phrases_are_what_a_noun_finder_says_and_unknown_nouns_are_made_up() -> None:
    scene = scene_of("on a wooden floor")
    generator = np.random.default_rng(0)
    phrases = phrases_of(scene, 0.0, generator)
    assert phrases.texts[-1] == "wooden floor" and phrases.keys[-1] == PLACE
    named = zip(phrases.texts[:-1], scene.entities, strict=True)
    assert all(text.endswith(entity.noun) for text, entity in named)
    assert all(text in scene.caption for text in phrases.texts)
    made_up = phrases_of(scene, 1.0, generator)
    for text, entity in zip(made_up.texts[:-1], scene.entities, strict=True):
        assert text.endswith(entity.noun) == (entity.noun == entity.subject.group_word)


def test_a_colour_belongs_to_the_phrase() -> None:
    world = ToyboxWorld("val", size=64, min_subjects=1, max_subjects=1)
    scene = next(scene for scene in map(world.scene, range(100)) if scene.caption.startswith("a red "))
    assert phrases_of(scene, 0.0, np.random.default_rng(0)).texts[0] == f"red {scene.entities[0].noun}"


def test_boxes_learnt_from_show_a_thing_or_clearly_nothing(run: Path) -> None:
    task = RegionClipTask(region_settings(run), torch.device("cpu"))
    regions = task.dataset[0]
    scene = task.dataset.world.scene(0)
    assert len(regions.tokens) == len(regions.shown) and len(regions.texts) == len(regions.keys)
    assert int(regions.shown.max()) < len(scene.entities) and int(regions.shown.min()) >= NOTHING
    again = RegionClipTask(region_settings(run), torch.device("cpu")).dataset[0]
    assert torch.equal(regions.shown, again.shown) and torch.equal(regions.tokens, again.tokens)


def test_the_shipped_form_takes_its_towers_from_the_folders_beside_it(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "toybox"
    for source, place in (
        (run / "clip" / "export", target / "subject" / "image_encoder"),
        (run / "base" / "export", target / "base"),
        (run / "region_clip" / "export", target / "region_clip"),
    ):
        shutil.copytree(source, place)
    for file in target.rglob("*.safetensors"):
        halve(file)
    join_region_clip(target)
    parts = json.loads((target / "region_clip" / PARTS).read_text())
    assert parts["text"]["folder"] == "../base/text_encoder" and parts["tokenizer"] == "../base/tokenizer"
    read_folder(target / "region_clip")
    file = target / "base" / "text_encoder" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="another text tower"):
        join_region_clip(target)
