"""The specification: each algorithm as its equations, with all ranks simulated in one process, in plain torch on the CPU.

Nothing here is fast and nothing communicates. The distributed code must give the same bits on every rank, so this specifies
the order of sums, the dtype of every operation and the rules for NaN, Inf and zero. It imports torch alone.
"""
