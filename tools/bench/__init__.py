"""Benchmarks: one interleaving harness, and a suite a file."""
