"""The network in training: backbone and guidance head under one roof, and weights that others published."""
