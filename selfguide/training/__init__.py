"""From a config and shards to snapshots: the loop, its engines, averages, checkpoints."""
