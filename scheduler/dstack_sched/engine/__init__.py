"""Who runs now, with how much of the GPU: the D-STACK engine and its rivals, one instance a GPU."""

from dstack_sched.engine.interface import Engine
from dstack_sched.engine.registry import POLICIES, make_engine

__all__ = ["POLICIES", "Engine", "make_engine"]
