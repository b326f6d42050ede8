"""The comparison of D-STACK with its alternatives on one GPU; `perf/h100_compare.py` is the command."""
