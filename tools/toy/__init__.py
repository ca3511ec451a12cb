"""Diffusion on points of the plane, where everything can be seen: paths, solvers, and what an evaluation buys.

The network is an MLP; paths, objectives, denoiser and samplers are those that train and sample images.
"""
