"""Guidance sources: training components that give the condition. One file a source; `component` is their protocol."""
