"""Commands over the packages: shards, the digit net, the comparison, benchmarks."""
