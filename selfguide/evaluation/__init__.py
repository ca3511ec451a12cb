"""Scores of a snapshot under a named protocol: generate, embed, compare, record."""
