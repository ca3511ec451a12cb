"""Samples to shards: the plan, the bytes of each shard, the commit, and indexes of other people's tars."""
