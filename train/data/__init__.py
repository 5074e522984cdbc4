"""From samples, rendered or read from shards, to the batches of a task. Start with diffusion_data.py."""
