"""Training components beside guidance: what a denoiser learns of its own features."""
