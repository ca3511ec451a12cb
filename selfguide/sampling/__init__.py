"""Sampling from a published snapshot: which conditions are drawn, queries, group names, sample sets."""
