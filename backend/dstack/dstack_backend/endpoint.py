"""Where the arbiter listens: one rule for the backend, the arbiter and the controller."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SOCKET_VARIABLE = "DSTACK_ARBITER_SOCKET"


def runtime_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The private directory (0700) of this user's sockets; not created here."""
    base = environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "dstack" if base else Path("/tmp") / f"dstack-{os.getuid()}"  # noqa: S108 - made 0700, owner checked


def socket_path(environ: Mapping[str, str] = os.environ) -> Path:
    """$DSTACK_ARBITER_SOCKET, else arbiter.sock in the runtime directory."""
    named = environ.get(SOCKET_VARIABLE)
    return Path(named) if named else runtime_dir(environ) / "arbiter.sock"
