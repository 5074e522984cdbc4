"""Random access: item i of an index is sample i of reading the shards in order, in every worker."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from data_pipeline.errors import UserError
from data_pipeline.record import Drop
from data_pipeline.shards.reader import list_shards, read_shard
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.writer import write_shard
from tests.data_pipeline.shards.small_shards import FACTS, items, small_folder


class Keys:
    """A map-style data set on an index."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> str:
        return self.index[item].record.key


def test_item_i_is_sample_i_in_order(tmp_path: Path) -> None:
    write_shard(tmp_path, "00000", items(prefix="a"), FACTS)
    write_shard(tmp_path, "00001", [Drop("x", "image_empty")], FACTS)
    write_shard(tmp_path, "00002", items(3, prefix="c"), FACTS)
    shards = list_shards(tmp_path)
    index = ShardIndex(shards)
    in_order = [sample for shard in shards for sample in read_shard(shard.tar)]
    assert index.counts == [6, 0, 3] and len(index) == 9
    assert [index[item] for item in range(9)] == in_order
    assert index.place(6) == (2, 0)


def test_numbers_outside_are_an_index_error(tmp_path: Path) -> None:
    index = ShardIndex(list_shards(small_folder(tmp_path, 1)))
    for item in (-1, 6):
        with pytest.raises(IndexError):
            index[item]
    assert len(ShardIndex([])) == 0


def test_an_index_goes_to_the_workers_of_a_loader(tmp_path: Path) -> None:
    index = ShardIndex(list_shards(small_folder(tmp_path)))
    expected = [index[item].record.key for item in range(len(index))]
    loader = DataLoader(Keys(pickle.loads(pickle.dumps(index))), batch_size=None, num_workers=2)
    assert list(loader) == expected


def test_a_tar_with_another_number_of_samples_is_refused(tmp_path: Path) -> None:
    small_folder(tmp_path)
    (tmp_path / "00001.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[: 512 * 40] + bytes(1024))
    with pytest.raises(UserError, match=r"00001\.tar: "):
        ShardIndex(list_shards(tmp_path))[6]


def test_an_address_on_an_object_store_is_refused_by_one_line(tmp_path: Path) -> None:
    small_folder("memory://index")
    with pytest.raises(UserError, match="random access needs local files"):
        ShardIndex(list_shards("memory://index"))
