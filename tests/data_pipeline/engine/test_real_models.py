"""Photos through BLIP-2 or BLIP, spaCy, Grounding DINO and SAM: the real classes, tiny, random weights from folders.

Thresholds are 0, so that whatever such networks say becomes entities: what is tested is that a whole build runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.build_settings import DataSettings
from data_pipeline.engine.build import build
from data_pipeline.settings import load_settings
from data_pipeline.shards.reader import decode_sample, list_shards, read_shard
from data_pipeline.shards.verify import verify
from data_pipeline.toybox.world import ToyboxWorld
from tests.data_pipeline.engine.builds import QUICK
from tests.data_pipeline.stages.tiny_grounding_dino import save_tiny_grounding_dino
from tests.data_pipeline.stages.tiny_networks import save_tiny_blip, save_tiny_blip2
from tests.data_pipeline.stages.tiny_sam import save_transformers, tiny_sam

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "data" / "folder.yaml"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of three shapes."""
    from PIL import Image

    folder, world = tmp_path_factory.mktemp("photos"), ToyboxWorld("val", size=128)
    for index in range(10):
        picture = Image.fromarray(world.scene(index).image)
        picture.crop((0, 0, 128, (128, 96, 64)[index % 3])).save(folder / f"{index}.jpg")
        (folder / f"{index}.txt").write_text("a dog next to a red ball")
    return folder


@pytest.mark.parametrize("captioner", ["blip2", "blip"])
def test_a_folder_of_photos_becomes_shards_that_verify(captioner: str, photos: Path, tmp_path: Path) -> None:
    caption = (save_tiny_blip2 if captioner == "blip2" else save_tiny_blip)(tmp_path / "captioner")
    detector = save_tiny_grounding_dino(tmp_path / "detector")
    segmenter = save_transformers(tiny_sam(), tmp_path / "segmenter")
    overrides = [
        f"source.path={photos}", "source.shard_size=4", f"output={tmp_path / 'shards'}", *QUICK,
        f"stages.caption.backend={captioner}", f"stages.caption.model={caption}", "stages.caption.prompt=a dog and",
        f"stages.detect.model={detector}", "stages.detect.shortest_side=128", "stages.detect.longest_side=256",
        f"stages.segment.model={segmenter}", "engine.device=cpu", "duplicates.remove=false",
        "rules.min_longer_side_px=64", "rules.nouns=[1, 99]", "rules.entities=[1, 999]",
        "rules.min_token_score=0", "rules.min_chunk_score=0",
    ]  # fmt: skip
    totals = build(load_settings(DataSettings, [CONFIG], overrides))
    assert totals.read == 10 and totals.kept > 0, totals
    report = verify(str(tmp_path / "shards"))
    assert report.ok, report.lines()
    for shard in list_shards(tmp_path / "shards"):
        for sample in read_shard(shard.tar):
            record = sample.record
            assert {stage: who.backend for stage, who in record.provenance.items()} == {
                "caption": captioner, "nouns": "spacy", "detect": "grounding_dino", "segment": "sam",
            }  # fmt: skip
            assert decode_sample(sample).masks.shape == (len(record.entities), record.height, record.width)
            assert all(record.caption[slice(*entity.caption_span or ())] == entity.phrase for entity in record.entities)
