"""What one GPU does: its ceilings, training steps, engines, and what stands beside them."""
