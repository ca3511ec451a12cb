"""Commands over checkpoints: verify them, list them, and write what they hold as files of weights."""
