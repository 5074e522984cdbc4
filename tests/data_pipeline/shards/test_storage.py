"""Object stores: the same shards through s3fs against a local server that speaks S3."""

from __future__ import annotations

import os
from pathlib import Path

import boto3
import pytest
from s3fs import S3FileSystem

from data_pipeline.errors import UserError
from data_pipeline.record import Sample
from data_pipeline.shards.reader import list_shards, read_drops, read_shard, read_stats
from data_pipeline.shards.storage import LocalStorage, ObjectStorage, clean_leftovers, storage_of
from data_pipeline.shards.verify import verify
from data_pipeline.shards.writer import write_shard
from tests.data_pipeline.shards.small_shards import FACTS, items, sample, small_folder


def objects(bucket: str) -> dict[str, bytes]:
    """Names and bytes of all objects of a bucket, as another client of the store sees them."""
    client, name = boto3.client("s3"), bucket.split("/")[2]
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=name).get("Contents", [])]
    return {key: client.get_object(Bucket=name, Key=key)["Body"].read() for key in keys}


def test_paths_are_plain_and_urls_are_object_stores(tmp_path: Path) -> None:
    assert isinstance(storage_of(tmp_path), LocalStorage)
    assert storage_of(f"file://{tmp_path}").address("x") == str(tmp_path / "x")
    assert isinstance(storage_of("s3://bucket/folder/"), ObjectStorage)
    assert storage_of("s3://bucket/folder/").address("x") == "s3://bucket/folder/x"


def test_a_shard_on_s3_is_the_shard_on_disk(bucket: str, tmp_path: Path) -> None:
    write_shard(bucket, "00000", items(), FACTS)
    write_shard(tmp_path / "local", "00000", items(), FACTS)
    names = ("00000.parquet", "00000.tar", "00000_stats.json")
    assert objects(bucket) == {f"toybox/{name}": (tmp_path / "local" / name).read_bytes() for name in names}
    assert not list(tmp_path.rglob("*.tmp"))


def test_shards_on_s3_are_listed_read_and_verified(bucket: str) -> None:
    assert list_shards(bucket) == []
    small_folder(bucket)
    shards = list_shards(bucket)
    assert [shard.tar for shard in shards] == [f"{bucket}/00000.tar", f"{bucket}/00001.tar"]
    assert read_stats(shards[0]).kept == 6
    assert len(list(read_shard(shards[1].tar))) == 6 and len(list(read_drops(bucket, "00001"))) == 3
    assert verify(bucket).ok
    boto3.client("s3").put_object(Bucket=bucket.split("/")[2], Key="toybox/00001.tar", Body=b"x")
    assert "00001.tar: 1 bytes" in verify(bucket).problems[0]


def test_an_upload_that_fails_is_one_line_and_leaves_nothing(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = ObjectStorage.publish

    def failing(self: ObjectStorage, temporary: Path, name: str) -> None:
        if name.endswith("_stats.json"):
            self = ObjectStorage("s3://no-such-bucket/toybox")
        publish(self, temporary, name)

    monkeypatch.setattr(ObjectStorage, "publish", failing)
    with pytest.raises(UserError, match="toybox/00000: cannot be written"):
        write_shard(bucket, "00000", items(), FACTS)
    assert objects(bucket) == {} and not list(tmp_path.rglob("*.tmp"))


def test_a_store_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with pytest.raises(UserError, match="s3://bucket-of-nobody: cannot be read"):
        list_shards("s3://bucket-of-nobody")


def test_an_unknown_protocol_is_one_line() -> None:
    with pytest.raises(UserError, match="^nonsense://x: .*nonsense"):
        list_shards("nonsense://x")


def test_scratch_files_of_dead_uploads_are_cleaned(bucket: str, tmp_path: Path) -> None:
    scratch = storage_of(bucket).scratch()
    dead = scratch / ".00000.tar.elsewhere.1.0.tmp"
    dead.write_bytes(b"x")
    os.utime(dead, (0, 0))
    assert clean_leftovers(bucket) == [dead] and not dead.exists()


def test_memory_urls_work_too() -> None:
    write_shard("memory://writer", "00000", items(), FACTS)
    kept = [item for item in items() if isinstance(item, Sample)]
    assert list(read_shard("memory://writer/00000.tar")) == kept == [sample(n) for n in range(6)]
