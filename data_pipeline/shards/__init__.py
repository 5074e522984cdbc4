"""Shards on disk: `NAME.tar` (WebDataset), `NAME.parquet` (the same as a table, drops too), `NAME_stats.json` (last).

writer.py makes them, reader.py and shard_index.py give the samples back, verify.py says whether a folder can be
trusted. A shard is finished when its stats file exists. Folders are local paths or any fsspec URL.
"""
