"""The atlas of a run or annotation: what is in each group, as one HTML page. `python -m tools.atlas`."""
