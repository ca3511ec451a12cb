"""What a model sees of stored samples: normalisation, crop and flip, autoencoders of latents."""
