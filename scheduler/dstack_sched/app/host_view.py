"""The GPUs of the Triton's host as the controller takes them: what to plan with, and when to plan anew."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from dstack_sched.app.gpus import GpuWatch, host_gpus
from dstack_sched.app.mps_clients import check_clients
from dstack_sched.domain.gpu import HostGpus, mps_client_limit
from dstack_sched.domain.mps import MpsServer, clients_by_gpu
from dstack_sched.domain.plan import Plan
from dstack_sched.errors import InputError
from dstack_sched.ports import Clock

RETRY_S = 10.0  # a plan for changed GPUs that could not be put in force is tried again so often
FRESH_S = 2.0  # the plans of one round see the same host


class HostView:
    """Looks through a GpuWatch. Not for several threads.

    own_pids: processes of the Triton that is planned for; servers: of the MPS daemon that it uses;
    own_bytes: GPU index -> what its instances report to hold, for hosts whose process ids are hidden from us.
    """

    def __init__(
        self,
        watch: GpuWatch,
        clock: Clock,
        own_pids: Callable[[], Collection[int]] = tuple,
        servers: Callable[[], tuple[MpsServer, ...] | None] = lambda: None,
        own_bytes: Callable[[], Mapping[int, int]] = dict,
    ) -> None:
        self.watch = watch
        self.servers = servers
        self._clock = clock
        self._own_pids, self._own_bytes = own_pids, own_bytes
        self._last: tuple[HostGpus, int] | None = None
        self._planned: frozenset[int] | None = None  # the GPUs that the last plan was made for
        self._in_force: frozenset[int] | None = None
        self._tried: tuple[frozenset[int], int] | None = None
        self._news = ""

    def host(self) -> HostGpus:
        """The GPUs to plan with, now. Errors: MachineError where NVML fails."""
        now_us = self._clock.now_us()
        if self._last is not None and self._planned == self._usable():
            found, at_us = self._last
            if now_us - at_us < FRESH_S * 1e6:
                return found
        self.watch.look()
        servers = self.servers() or ()
        own = {*self._own_pids(), *(server.pid for server in servers)}
        others = self._clients_of_others(servers)
        found = host_gpus(self.watch.states, own, self._own_bytes(), others)
        self._last, self._planned = (found, now_us), self._usable()
        return found

    def check_clients(self, plan: Plan) -> tuple[str, ...]:
        """Lines on the MPS clients that the plan needs; () without an MPS daemon. Errors: InputError."""
        servers = self.servers()
        if servers is None or not self.watch.states:
            return ()
        limit = mps_client_limit(self.watch.states[0].reading.driver)
        return check_clients(plan, self._clients_of_others(servers), limit)

    def fitted(self, plan: Plan) -> Plan:
        """The plan as one for all GPUs of this host, also those that it does not use: only then do configs
        say where models run. Errors: InputError where it uses one that is not there, or is out."""
        states = self.watch.states
        for model, row in plan.models.items():
            for gpu in sorted({replica.gpu for replica in row.replicas} or {row.gpu}):
                if gpu < 0:
                    return plan
                why = states[gpu].out if gpu < len(states) else f"this host has {len(states)}, counted from 0"
                if why:
                    raise InputError(f"the plan places {model} on GPU {gpu}: {why}; plan again on this host")
        return replace(plan, gpus=tuple(state.reading.name for state in states))

    def _clients_of_others(self, servers: tuple[MpsServer, ...]) -> dict[int, int]:
        """GPU index -> MPS clients there that are not of this Triton."""
        own = frozenset(self._own_pids())
        held = clients_by_gpu(servers, tuple(state.reading.uuid for state in self.watch.states))
        return {gpu: len(pids - own) for gpu, pids in held.items()}

    def put_in_force(self) -> None:
        """The last plan made for host() is in force."""
        self._in_force = self._planned

    def urgent(self) -> str | None:
        """Why a new plan cannot wait: the GPUs are not those that the plan in force was made for."""
        usable = self._usable()
        self._news = "; ".join(self.watch.news()) or self._news
        if self._in_force is None or usable == self._in_force:
            self._tried, self._news = None, ""
            return None
        now_us = self._clock.now_us()
        if self._tried and self._tried[0] == usable and now_us - self._tried[1] < RETRY_S * 1e6:
            return None
        self._tried = (usable, now_us)
        return self._news or f"GPUs to plan with: {sorted(self._in_force)} -> {sorted(usable)}"

    def _usable(self) -> frozenset[int]:
        return frozenset(state.reading.index for state in self.watch.states if not state.out)
