"""Other readers of latents, each run by a Python of its own; these files import nothing of ours."""
