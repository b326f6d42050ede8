"""The servers of a cell: started together, idle while another one is measured.

An idle server costs GPU memory and nothing else: its processes launch no kernels. Starting them together
takes as long as the slowest, which saves much of a cell's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from compare.alternatives import Alternative, Served
from compare.deployment import Deployment, Site
from dstack_sched.errors import DstackError

MOST_PROCESSES = 44  # model processes at once: MPS takes 48 clients a GPU, and each costs memory
LEAST_FREE_BYTES_A_MODEL = 2 << 30


class Fleet:
    """A context manager. `served`: how the models of an alternative are deployed."""

    def __init__(
        self,
        site: Site,
        models: int,
        served: Callable[[Alternative], Mapping[str, Served]],
        say: Callable[[str], None],
    ) -> None:
        self._site, self._models, self._served, self._say = site, models, served, say
        self._open: dict[tuple[object, ...], Deployment] = {}
        self._failed: dict[tuple[object, ...], DstackError] = {}
        self._count = 0

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop all servers."""
        with ThreadPoolExecutor(max(1, len(self._open))) as pool:
            list(pool.map(lambda each: each.close(), self._open.values()))
        self._open.clear()

    def open(self, alternatives: Iterable[Alternative]) -> None:
        """Start the servers of as many alternatives as there is room for: the first one by itself (what the
        backend tries out about a model is then in its cache, for all alike), the others together. One that
        fails is told when it is asked for."""
        wanted: dict[tuple[object, ...], Alternative] = {}
        for each in alternatives:
            if each.server not in self._open:
                wanted.setdefault(each.server, each)
        room = max(1, MOST_PROCESSES // self._models - len(self._open))
        chosen = list(wanted.items())[:room]
        self._start_together(chosen[:1])
        self._start_together(chosen[1:])

    def _start_together(self, chosen: Sequence[tuple[tuple[object, ...], Alternative]]) -> None:
        sites = [self._next_site(each) for _, each in chosen]
        with ThreadPoolExecutor(max(1, len(chosen))) as pool:
            started = [
                (key, each, pool.submit(self._start, site, each))
                for (key, each), site in zip(chosen, sites, strict=True)
            ]
            for key, each, future in started:
                try:
                    self._open[key] = future.result()
                    self._say(f"{each.name}: server ready after {self._open[key].start_s:.1f} s")
                except DstackError as error:
                    self._failed[key] = error

    def get(self, alternative: Alternative) -> Deployment:
        """The server of an alternative, started where it is not open. Errors: why it cannot be had; one that
        failed is tried once more, by itself where memory is short."""
        key = alternative.server
        if key not in self._open:
            before = self._failed.get(key)
            if before is not None:
                self._say(f"{alternative.name}: {before}; once more")
            self._make_room()
            self._open[key] = self._start(self._next_site(alternative), alternative)
            self._say(f"{alternative.name}: server ready after {self._open[key].start_s:.1f} s")
        return self._open[key]

    def drop(self, alternative: Alternative) -> None:
        """Stop the server of an alternative: something is wrong with it. The next `get` starts another."""
        deployment = self._open.pop(alternative.server, None)
        if deployment is not None:
            deployment.close()

    def _make_room(self) -> None:
        free = self._site.nvml.free_bytes()
        full = (len(self._open) + 1) * self._models > MOST_PROCESSES
        if full or (free is not None and free < LEAST_FREE_BYTES_A_MODEL * self._models):
            self.close()

    def _next_site(self, alternative: Alternative) -> Site:
        """A directory of its own for each server ever started: its logs stay. Names are short: a socket's
        path must be."""
        self._count += 1
        name = f"{self._count}-{alternative.name.split('+')[0]}"
        return replace(self._site, directory=self._site.directory / name)

    def _start(self, site: Site, alternative: Alternative) -> Deployment:
        return Deployment(site, alternative, self._served(alternative))
