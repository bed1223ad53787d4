"""Data-parallel training: an algorithm attached to torch's DDP, and the plain PyTorch loop."""
