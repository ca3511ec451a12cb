"""Guidance sources: where the condition comes from. One file a source; `source.py` says what a source is."""
