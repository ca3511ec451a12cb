"""Feature nets that metrics are computed in."""
