"""The part of D-STACK that runs inside Triton's stub process. Imports nothing of dstack_sched."""

__version__ = "0.1.0"
