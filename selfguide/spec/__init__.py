"""Torch-free facts that the launcher and the trainer share: configs, sizes, the run folder, records."""
