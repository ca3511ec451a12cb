"""Samples by ordinal and as micro-batches: bytes of blocks, caches, prefetch, mixtures, the audit of an epoch."""
