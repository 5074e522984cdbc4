"""What the loop runs on, whatever it trains: processes, optimisers, checkpoints, averages, reports, faults."""
