"""Starts programs on several processes and machines (the command `lightning-accel`), and joins them to a process group."""
