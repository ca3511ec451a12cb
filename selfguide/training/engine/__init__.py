"""Two backends behind one small protocol: DeepSpeed ZeRO, and torch as its reference."""
