"""The order of training samples: from a sample's number to a shard's sample or a toybox scene, by arithmetic.

    stream = open_stream(settings.data, "train", Layout(processes, workers, batch_size))
    item = stream[n]  # StreamSample (still encoded) or ToyboxNumber

layout.py says which loading process reads n, mixture.py from which source, shard_order.py which sample of which shard;
shard_list.py, shard_places.py and shard_reader.py find, fetch and open the shards; position.py is what a checkpoint
keeps, damage.py what is skipped; shard_stream.py puts them together.
"""

from train.stream.damage import plain_error as plain_error
from train.stream.layout import Layout as Layout
from train.stream.position import Resumable as Resumable
from train.stream.shard_source import HELD_EVERY as HELD_EVERY
from train.stream.shard_stream import SamplePlace as SamplePlace
from train.stream.shard_stream import Stream as Stream
from train.stream.shard_stream import StreamSample as StreamSample
from train.stream.shard_stream import StreamShard as StreamShard
from train.stream.shard_stream import ToyboxNumber as ToyboxNumber
from train.stream.shard_stream import open_stream as open_stream
