"""Training components that shape what a model represents, beside its guidance (Xiang et al. 2025, DDAE++)."""
