"""Checkpoints: what all ranks share, what each rank holds for itself, and how ranks agree on success."""
