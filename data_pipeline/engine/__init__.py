"""Runs the build: units of a source through the stages into shards, restartable, on one machine or many."""
