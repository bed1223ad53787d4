"""Each algorithm as its equations: all ranks simulated in one process, in plain torch on the CPU. The specification.

Nothing here is fast and nothing communicates. The distributed code must give the same bits on every rank, so the order of
sums, the dtype of every operation and the rules for NaN, Inf and zero are part of what is written here. Imports torch alone.
"""
