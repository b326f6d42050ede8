"""What a `config.pbtxt` states of interest to us, and our changes to it. All else is kept as found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

BACKEND = "dstack"


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """One `instance_group` entry: `count` instances of a kind on each of `gpus` (empty: as Triton does)."""

    kind: str = "KIND_AUTO"
    count: int = 1
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The fields we read. None, an empty tuple or an empty mapping: the file does not state it."""

    backend: str = ""
    platform: str = ""
    max_batch_size: int | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int | None = None
    dynamic_batching: bool = False
    instance_groups: tuple[InstanceGroup, ...] = ()
    scheduler: str = ""  # "sequence_batching" or "ensemble_scheduling" where one is set


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """What should be stated from now on. None leaves a field alone; a parameter of None is removed.

    preferred_batch_sizes and max_queue_delay_us go into `dynamic_batching`, whose other fields stay.
    """

    backend: str | None = None
    parameters: Mapping[str, str | None] = field(default_factory=dict)
    max_batch_size: int | None = None
    preferred_batch_sizes: tuple[int, ...] | None = None
    max_queue_delay_us: int | None = None
    instance_groups: tuple[InstanceGroup, ...] | None = None
