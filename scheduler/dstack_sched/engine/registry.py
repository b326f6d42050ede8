"""The policies by name."""

from __future__ import annotations

from collections.abc import Callable

from dstack_sched.engine.dstack import DStackEngine
from dstack_sched.engine.interface import Engine
from dstack_sched.errors import InputError

POLICIES: dict[str, Callable[[], Engine]] = {
    "dstack": DStackEngine,
}


def make_engine(policy_name: str) -> Engine:
    """A fresh engine of the named policy. Raises InputError, listing the names, for one unknown."""
    maker = POLICIES.get(policy_name)
    if maker is None:
        raise InputError(f"policy {policy_name!r} is unknown; choose one of {', '.join(POLICIES)}")
    return maker()
