"""A build from an object store into an object store is the build between folders."""

from __future__ import annotations

from pathlib import Path

import boto3

from data_pipeline.build_settings import DataSettings
from data_pipeline.engine.build import build
from data_pipeline.settings import load_settings
from data_pipeline.shards.reader import list_shards, read_shard
from data_pipeline.shards.storage import storage_of
from data_pipeline.shards.verify import verify
from tests.data_pipeline.engine.builds import CONFIG, QUICK


def test_photos_on_s3_become_shards_on_s3(bucket: str, undisturbed: Path, tmp_path: Path) -> None:
    photos, name = tmp_path / "photos", bucket.split("/")[2]
    photos.mkdir()
    samples = [sample for shard in list_shards(undisturbed) for sample in read_shard(shard.tar)][:5]
    for number, sample in enumerate(samples):
        given = '{"caption": "a toy", "entities": [{"noun": "toy", "box_xyxy_px": [8, 8, 40, 40]}]}'
        for file, data in ((f"{number}.jpg", sample.jpeg), (f"{number}.json", given.encode())):
            (photos / file).write_bytes(data)
            boto3.client("s3").put_object(Bucket=name, Key=f"photos/{file}", Body=data)

    def settings(source: str, output: str) -> DataSettings:
        overrides = ["source.kind=folder", f"source.path={source}", "source.shard_size=2", f"output={output}", *QUICK]
        return load_settings(DataSettings, [CONFIG], [*overrides, "duplicates.remove=true", "gallery=5"])

    build(settings(str(photos), str(tmp_path / "shards")))
    build(settings(f"s3://{name}/photos", bucket))
    remote, local = storage_of(bucket), tmp_path / "shards"
    assert remote.names() == sorted(path.name for path in local.iterdir() if path.is_file() and path.suffix != ".lock")
    for shard in list_shards(local):
        with remote.open(f"{shard.name}.tar") as tar:
            assert tar.read() == Path(shard.tar).read_bytes()
    assert verify(bucket).ok
    totals = build(settings(f"s3://{name}/photos", bucket))
    assert totals.read == 0, "nothing is built twice"
