"""Which GPUs of the host are used: those that answer, have had no grave error lately and nobody excluded.

What other programs hold of a GPU's memory is not ours to plan with. A GPU that is out comes back by itself:
at once when it had only disappeared, HOLD_S after the last grave error otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from dstack_sched.domain.fault import Fault, FaultKind
from dstack_sched.domain.gpu import GpuReading, HostGpus, PlanGpu
from dstack_sched.ports import Clock, GpuInventory

# Errors of the device rather than of a program on it (those are 13, 31, 43, 45, 68, 69, 109): after these a
# GPU's results or its availability are in doubt. NVIDIA, "Xid errors".
GRAVE_XIDS = {
    48: "an uncorrectable memory error",
    62: "its internal microcontroller halted",
    63: "a memory row was remapped",
    64: "a memory row could not be remapped",
    74: "an NVLink error",
    79: "it has fallen off the bus",
    92: "a high rate of memory errors",
    94: "a contained memory error",
    95: "an uncontained memory error",
    110: "a security fault",
    119: "its system processor does not answer",
    120: "an error of its system processor",
    121: "an error of the chip-to-chip link",
    140: "an unrecovered memory error",
    143: "a power-on error",
    145: "an NVLink error",
    149: "an NVLink error",
    150: "an NVLink error",
    154: "the driver asks for a reset",
}
HOLD_S = 600.0
EXCLUDED = "excluded by the operator"


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU and whether it is used. out: why it is not, "" where it is; since_us: when that began."""

    reading: GpuReading
    out: str
    since_us: int

    @property
    def label(self) -> str:
        return f"GPU {self.reading.index}"


class GpuWatch:
    """`look` again and again; it says what changed. excluded: what the operator wants left out, now.

    Each entry of excluded is an index ("1") or the beginning of a UUID. Not for several threads.
    """

    def __init__(
        self,
        inventory: GpuInventory,
        clock: Clock,
        excluded: Callable[[], Collection[str]] = tuple,
        hold_s: float = HOLD_S,
    ) -> None:
        self._inventory = inventory
        self._clock = clock
        self._excluded = excluded
        self._hold_us = round(hold_s * 1e6)
        self._grave: dict[str, tuple[int, int]] = {}  # uuid -> last grave Xid and when
        self._news: list[str] = []
        self.states: tuple[GpuState, ...] = ()

    def look(self) -> None:
        """Read every GPU. Errors: MachineError where NVML as a whole fails; what was known stays."""
        readings, now_us, excluded = self._inventory.read(), self._clock.now_us(), self._excluded()
        before = {state.reading.uuid: state for state in self.states}
        states = []
        for reading in readings:
            out = self._why_out(reading, excluded, now_us)
            last = before.get(reading.uuid)
            state = GpuState(reading, out, now_us)
            if last is not None and bool(last.out) == bool(out):
                state = GpuState(reading, out, last.since_us)
            elif last is not None:
                self._news.append(
                    f"{state.label} is out: {out}" if out else f"{state.label} is back: {last.out}"
                )
            states.append(state)
        self.states = tuple(states)

    def news(self) -> tuple[str, ...]:
        """One line for each GPU that went out or came back since this was asked last."""
        told = tuple(self._news)
        self._news.clear()
        return told

    def _why_out(self, reading: GpuReading, excluded: Collection[str], now_us: int) -> str:
        for xid in reading.xids:
            if xid in GRAVE_XIDS:
                self._grave[reading.uuid] = (xid, now_us)
        xid, at_us = self._grave.get(reading.uuid, (0, 0))
        recent = bool(xid) and now_us - at_us < self._hold_us
        told = f"Xid {xid}, {GRAVE_XIDS[xid]}" if recent else ""
        if reading.lost:
            return f"{told}; {reading.lost}" if told else reading.lost
        if is_excluded(reading, excluded):
            return EXCLUDED
        if reading.reset_pending:
            return f"{told or 'memory errors'}; it needs a reset (nvidia-smi -r)"
        return told


class GpuGuard:
    """health.Guard: GPUs that are out, but for those excluded. A re-plan moves their models."""

    kind = FaultKind.GPU_LOST

    def __init__(self, watch: GpuWatch) -> None:
        self._watch = watch

    def look(self, now_us: int) -> tuple[Fault, ...]:
        self._watch.look()
        return tuple(
            Fault(self.kind, state.label, state.since_us, state.out)
            for state in self._watch.states
            if state.out and state.out != EXCLUDED
        )

    def mend(self, fault: Fault) -> str | None:
        return None


def is_excluded(reading: GpuReading, excluded: Collection[str]) -> bool:
    """Whether an operator's list names this GPU, by index or by the beginning of its UUID."""
    return any(
        each == str(reading.index) or (len(each) > 3 and reading.uuid.startswith(each)) for each in excluded
    )


def foreign_bytes(reading: GpuReading, own_pids: Collection[int], own_bytes: int = 0) -> int:
    """Memory that others hold there, in bytes, the driver's own included.

    Ours are the processes of own_pids; where they are not listed (a container shows no process ids of its
    own) what our instances report to hold, own_bytes, is taken instead.
    """
    listed = sum(each.memory_bytes or 0 for each in reading.processes if each.pid in own_pids)
    return max(0, reading.used_bytes - max(listed, own_bytes))


def host_gpus(
    states: Collection[GpuState],
    own_pids: Collection[int] = (),
    own_bytes: Mapping[int, int] | None = None,
    clients: Mapping[int, int] | None = None,
) -> HostGpus:
    """The GPUs as the planner takes them. own_bytes, clients (MPS clients of others): by index."""
    usable = tuple(
        PlanGpu(
            index=(reading := state.reading).index,
            name=reading.name,
            memory_bytes=reading.memory_bytes
            - foreign_bytes(reading, own_pids, (own_bytes or {}).get(reading.index, 0)),
            clients=(clients or {}).get(reading.index, 0),
        )
        for state in states
        if not state.out
    )
    return HostGpus(tuple(state.reading.name for state in states), usable)


def gpu_rows(states: Collection[GpuState], own_pids: Collection[int] = ()) -> dict[str, dict[str, object]]:
    """index -> what `doctor` and `status` tell of each GPU, as plain JSON types."""
    return {
        str(state.reading.index): {
            "uuid": state.reading.uuid,
            "name": state.reading.name,
            "memory_bytes": state.reading.memory_bytes,
            "used_bytes": state.reading.used_bytes,
            "used_by_others_bytes": foreign_bytes(state.reading, own_pids),
            "utilization_percent": state.reading.utilization_percent,
            "processes": len(state.reading.processes),
            "out": state.out or None,
        }
        for state in states
    }
