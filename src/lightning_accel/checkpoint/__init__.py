"""Checkpoints: what all ranks share, what each rank has of its own, and how ranks agree on success."""
