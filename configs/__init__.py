"""Experiments and their parts as YAML; Hydra finds them as pkg://configs. Fields are those of selfguide.spec.config."""
