"""Which SM groups a process takes at which GPU%."""

from __future__ import annotations

import zlib
from collections.abc import Sequence


class Levels:
    """The levels of a process on a device of `groups` SM groups, each level rounded to whole groups.

    gpu_percent is a level too: the one of a run that names none. Every level has a home, an aligned run of
    groups (level of k groups: groups i k to i k + k - 1), picked by `seed` so that models that are left
    alone spread out. groups 0: the share is fixed, there are no levels."""

    def __init__(self, groups: int, gpu_percent: float, levels: Sequence[float], seed: str):
        self.groups = groups
        self._seed = zlib.crc32(seed.encode())
        self._own = self._count(gpu_percent)
        counts = sorted({self._own, *map(self._count, levels)}) if groups else []
        self._masks = {count: self._home(count) for count in counts}
        self.percents = tuple(100 * count / groups for count in counts)

    def mask(self, gpu_percent: float | None = None) -> int:
        """The home of the level nearest to a GPU%; 0 where there are no levels."""
        if not self._masks:
            return 0
        wanted = self._own if gpu_percent is None else self._count(gpu_percent)
        return self._masks[min(self._masks, key=lambda count: (abs(count - wanted), count))]

    def clip(self, sm_groups: int) -> int:
        """The groups of a mask that there are; 0 where the share is fixed."""
        return sm_groups & ((1 << self.groups) - 1)

    @property
    def homes(self) -> list[int]:
        """The masks to prepare, the one of a run that names no level first: 0 where there are no levels."""
        own = self.mask()
        return [own, *(mask for mask in self._masks.values() if mask != own)]

    def percent(self, mask: int) -> float:
        return 100 * mask.bit_count() / self.groups

    def _count(self, gpu_percent: float) -> int:
        return min(self.groups, max(1, round(gpu_percent / 100 * self.groups)))

    def _home(self, count: int) -> int:
        start = self._seed % (self.groups // count) * count
        return ((1 << count) - 1) << start
