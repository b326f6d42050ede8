"""One model as Triton's repository index shows it."""

from __future__ import annotations

from dataclasses import dataclass

READY = "READY"
UNLOADED_BY_HAND = "unloaded"  # Triton's reason for a model that somebody asked it to unload


@dataclass(frozen=True, slots=True)
class ServedModel:
    """state: that of the best version: READY, LOADING, UNLOADING or UNAVAILABLE (also: never loaded).

    reason: Triton's word for a model that is not served: "unloaded", or why its load failed; "" for one
    that was never loaded. ready_versions: how many versions take requests.
    """

    state: str
    reason: str = ""
    ready_versions: int = 0
