"""The diffusion core: paths, preconditioning, objectives, conditions, the denoiser and its samplers."""
