"""Collectives on explicit tensors, groups and scratch memory; they know no DDP and no thread."""
