"""Which groups of SMs a batch runs on: disjoint ones while there are enough, else the least shared.

A device is split into up to 64 groups; a set of groups is a mask, bit i for group i. Sets that an instance
had before come first (its CUDA graphs and its lines in the L2 cache are there), then blocks of neighbours
that begin at a multiple of their size, which keeps the number of different sets small: a backend makes what
it needs to run on a set once for each.
"""

from __future__ import annotations

from functools import cache


def groups_for(percent: float, groups: int) -> int:
    """How many of `groups` a GPU% is: round(percent / 100 groups), at least one."""
    return max(1, min(groups, int(percent * groups / 100 + 0.5)))


@cache
def blocks(count: int, groups: int) -> tuple[int, ...]:
    """Blocks of `count` neighbours: those that begin at a multiple of count, those that end as far from the
    end, then all others."""
    block = (1 << count) - 1
    starts = range(0, groups - count + 1, count)
    order = [*starts, *(groups - count - start for start in starts), *range(groups - count + 1)]
    return tuple(dict.fromkeys(block << start for start in order))


class SmGroups:
    """The groups of one device and how often each is held. Every decision costs a few operations on masks."""

    __slots__ = ("_layers", "groups")

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self._layers: list[int] = []  # the k-th: groups held by more than k

    def holders(self, group: int) -> int:
        """By how many the group is held."""
        return sum(layer >> group & 1 for layer in self._layers)

    def hold(self, mask: int) -> None:
        for k, layer in enumerate(self._layers):
            self._layers[k] = layer | mask
            mask &= layer
            if not mask:
                return
        if mask:
            self._layers.append(mask)

    def release(self, mask: int) -> None:
        """Undo hold()."""
        for k in range(len(self._layers) - 1, -1, -1):
            top = self._layers[k] & mask
            self._layers[k] ^= top
            mask ^= top
        while self._layers and not self._layers[-1]:
            self._layers.pop()

    def choose(self, count: int, before: tuple[int, ...] = ()) -> int:
        """`count` groups whose holders are as few as can be. before: sets to prefer, the best first."""
        layers = self._layers
        least = self._least(count)
        for mask in before:
            if mask.bit_count() == count and self._cost(mask) == least:
                return mask
        if least == 0:
            busy = layers[0] if layers else 0
            for mask in blocks(count, self.groups):
                if not mask & busy:
                    return mask
        else:
            for mask in blocks(count, self.groups):
                if self._cost(mask) == least:
                    return mask
        return self._scattered(count)

    def _cost(self, mask: int) -> int:
        return sum((mask & layer).bit_count() for layer in self._layers)

    def _least(self, count: int) -> int:
        """The smallest sum of holders over any `count` groups."""
        cost = 0
        for layer in self._layers:
            more = count - (self.groups - layer.bit_count())  # as many have more holders than this
            if more <= 0:
                break
            cost += more
        return cost

    def _scattered(self, count: int) -> int:
        """The `count` least held groups, wherever they are."""
        order = sorted(range(self.groups), key=lambda group: (self.holders(group), group))
        return sum(1 << group for group in order[:count])
