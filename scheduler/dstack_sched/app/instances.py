"""How many instances a model has, from its config as Triton reports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def instances(config: Mapping[str, Any]) -> int:
    """Instances, each a stub process, that a config in force asks for (Triton filled in what it left out)."""
    total = 0
    for group in config.get("instance_group", ()):
        gpus = len(group.get("gpus", ())) if group.get("kind") == "KIND_GPU" else 1
        total += int(group.get("count", 1)) * max(1, gpus)
    return max(1, total)
