"""Parts of perf/h100_dataplane.py: what Triton serves through `dstack`, against what the GPU can do."""
