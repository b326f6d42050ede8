"""The messages between backend, arbiter and controller: binary, versioned, bounded.

One message is one packet of a Unix SOCK_SEQPACKET socket, so it arrives whole or not at all and needs no
framing. Layout, little endian: magic "DS", version u8, kind u8, then the fields of the kind. Strings are a
u16 length and UTF-8 bytes. GPU% travels in hundredths of a percent. Times are CLOCK_MONOTONIC microseconds,
which all processes of a host share. A message that does not decode raises WireError and costs its sender
the connection, nobody else.

The conversation of a backend: connect; Ping, Pong (an arbiter that is stopped accepts connections but does
not answer); Join, Welcome; then Work whenever the queue changes, a Grant when it is its turn, Done when the
device has finished. A grant may come while one runs: it starts when that one ends. Every grant is answered
by one Done. No word while a grant is wanted: Ping; still none: the arbiter counts as gone, the backend closes
the connection, runs ungated, and connects again from time to time. One that runs ungated while it joins says
so in Join, and ends that batch with Done(grant_id=0).

A standing grant is given to an idle instance before it has work, while nobody else wants the GPU: it runs
its next batch without asking, and says so with Start (of a very short one, with Done alone). The arbiter may
take it back with Revoke; the instance answers with Done(rows=0), or, where the two crossed, has started
already. Telemetry is told once a second.

This module is shared with the arbiter (dstack_sched.adapters) and knows neither Triton nor the scheduler.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, TypeAlias

VERSION = 2
MAX_MESSAGE_BYTES = 128 * 1024
MAX_NAME_BYTES = 512
MAX_LEVELS = 64
MAX_SM_GROUPS = 64
MAX_BATCH_SIZE = 1 << 20

_MAGIC = b"DS"
_HEAD = struct.Struct("<2sBB")
_JOIN = struct.Struct("<IhHIIIHQBBB")
_WORK = struct.Struct("<IQ")
_DONE = struct.Struct("<QIIIIQ")
_GRANT = struct.Struct("<QIHQQB")
_SHED = struct.Struct("<Q")
_WELCOME = struct.Struct("<QH")
_PING = struct.Struct("<Q")
_START = struct.Struct("<QIIQ")
_REVOKE = struct.Struct("<Q")
_PLAN = struct.Struct("<II?")


class WireError(ValueError):
    """The packet is not a message of this version; the text says which part is wrong."""


@dataclass(frozen=True, slots=True)
class Join:
    """Backend -> arbiter, first message. gpu -1: a CPU instance. slo_us 0: best effort.

    levels: GPU percentages the instance can take from one batch to the next; empty: gpu_percent only.
    sm_groups: into how many groups of SMs its device is split, so that a grant can name them; 0: into none.
    running_percent, running_until_us: a batch that runs ungranted while joining (after the arbiter was away)
    and when it should end, so that the arbiter counts its share; 0 and 0 when idle. Its end is reported by
    Done with grant_id 0.
    """

    model: str
    instance: str
    pid: int
    gpu: int
    gpu_percent: float
    max_batch_size: int
    batch_size: int
    slo_us: int
    reject_late: bool
    levels: tuple[float, ...] = ()
    running_percent: float = 0.0
    running_until_us: int = 0
    sm_groups: int = 0


@dataclass(frozen=True, slots=True)
class Welcome:
    """Arbiter -> backend, answer to Join. capacity_percent is what all grants together may reach."""

    session: int
    capacity_percent: float


@dataclass(frozen=True, slots=True)
class Work:
    """Backend -> arbiter: rows waiting now and the most urgent deadline (0 when none waits)."""

    waiting: int
    earliest_deadline_us: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Arbiter -> backend: run one batch of at most batch_size rows at gpu_percent, before the lease ends.

    sm_groups: the SM groups to run on, bit i for group i; 0: the instance chooses, or has none.
    standing: for the next work that comes, to be started by Start; otherwise for work that waits now.
    """

    grant_id: int
    batch_size: int
    gpu_percent: float
    lease_until_us: int
    sm_groups: int = 0
    standing: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Backend -> arbiter: a standing grant is in use from now on, for `rows` rows.

    waiting and earliest_deadline_us are the queue beside this batch, as in Work.
    """

    grant_id: int
    rows: int
    waiting: int
    earliest_deadline_us: int


@dataclass(frozen=True, slots=True)
class Revoke:
    """Arbiter -> backend: a standing grant is taken back. Answered by Done(rows=0) where it is unused."""

    grant_id: int


@dataclass(frozen=True, slots=True)
class Shed:
    """Arbiter -> backend: reject waiting rows whose deadline is before this time."""

    deadline_before_us: int


@dataclass(frozen=True, slots=True)
class Done:
    """Backend -> arbiter: the grant is over. rows 0: it was not used. late: rows past their deadline.

    waiting and earliest_deadline_us are the queue after this batch, as in Work.
    """

    grant_id: int
    rows: int
    late: int
    run_us: int
    waiting: int
    earliest_deadline_us: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Arbiter -> backend: what the plan says in place of the config, until the connection ends.

    batch_size: planned rows of a batch. slo_us: 0 for best effort; it sets the deadlines of later requests.
    """

    batch_size: int
    slo_us: int
    reject_late: bool


@dataclass(frozen=True, slots=True)
class Leave:
    """Backend -> arbiter: unloading; no grant is wanted any more."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Any -> arbiter: are you there? A stopped arbiter keeps its sockets open, but does not answer."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Arbiter -> any, answer to Ping, with its nonce."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Arbiter -> any: why the connection is closed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Control:
    """Controller -> arbiter: {"verb": ..., ...}; answered by a Reply."""

    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """Arbiter -> controller."""

    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Backend -> arbiter, about once a second: what the instance measured of itself (stats.telemetry)."""

    body: dict[str, Any]


Message: TypeAlias = (
    Join | Welcome | Work | Grant | Start | Revoke | Shed | Done | Leave | Refuse | Control | Reply | Ping
    | Pong | Plan | Telemetry
)  # fmt: skip

_KIND: dict[type, int] = {
    Join: 1, Welcome: 2, Work: 3, Grant: 4, Shed: 5, Done: 6, Leave: 7, Refuse: 8, Control: 9, Reply: 10,
    Ping: 11, Pong: 12, Telemetry: 13, Start: 14, Revoke: 15, Plan: 16,
}  # fmt: skip


def encode(message: Message) -> bytes:
    """The packet of a message. Raises WireError where a field is out of its range."""
    head = _HEAD.pack(_MAGIC, VERSION, _KIND[type(message)])
    try:
        packet = head + _body(message)
    except WireError:
        raise
    except (struct.error, ValueError, OverflowError, TypeError, RecursionError) as error:
        raise WireError(f"{type(message).__name__}: field out of range: {error}") from None
    if len(packet) > MAX_MESSAGE_BYTES:
        raise WireError(f"{type(message).__name__}: {len(packet)} bytes, at most {MAX_MESSAGE_BYTES}")
    return packet


def _body(message: Message) -> bytes:
    match message:
        case Work(waiting, deadline):
            return _WORK.pack(waiting, deadline)
        case Grant(grant_id, batch_size, percent, lease, groups, standing):
            return _GRANT.pack(grant_id, batch_size, _hundredths(percent), lease, groups, standing)
        case Start(grant_id, rows, waiting, deadline):
            return _START.pack(grant_id, rows, waiting, deadline)
        case Revoke(grant_id):
            return _REVOKE.pack(grant_id)
        case Plan(batch_size, slo_us, reject_late):
            return _PLAN.pack(batch_size, slo_us, reject_late)
        case Done(grant_id, rows, late, run_us, waiting, deadline):
            return _DONE.pack(grant_id, rows, late, run_us, waiting, deadline)
        case Shed(before):
            return _SHED.pack(before)
        case Welcome(session, capacity):
            return _WELCOME.pack(session, _hundredths(capacity))
        case Join():
            fixed = _JOIN.pack(
                message.pid, message.gpu, _hundredths(message.gpu_percent), message.max_batch_size,
                message.batch_size, message.slo_us, _hundredths(message.running_percent),
                message.running_until_us, message.reject_late, message.sm_groups, len(message.levels),
            )  # fmt: skip
            levels = struct.pack(f"<{len(message.levels)}H", *map(_hundredths, message.levels))
            return fixed + levels + _text(message.model) + _text(message.instance)
        case Ping(nonce) | Pong(nonce):
            return _PING.pack(nonce)
        case Refuse(reason):
            return _text(reason[: MAX_NAME_BYTES // 4])
        case Control(body) | Reply(body) | Telemetry(body):
            return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    return b""


def decode(packet: bytes) -> Message:
    """The message of a packet. Raises WireError; never anything else, whatever the bytes are."""
    if len(packet) > MAX_MESSAGE_BYTES:
        raise WireError(f"packet of {len(packet)} bytes, at most {MAX_MESSAGE_BYTES}")
    try:
        magic, version, kind = _HEAD.unpack_from(packet)
    except struct.error:
        raise WireError("packet shorter than its header") from None
    if magic != _MAGIC:
        raise WireError("not a D-STACK packet (bad magic)")
    if version != VERSION:
        raise WireError(f"wire version {version}, this side speaks {VERSION}")
    try:
        return _parse(kind, packet, _HEAD.size)
    except WireError:
        raise
    except struct.error:
        raise WireError(f"message kind {kind}: wrong length {len(packet)}") from None
    except (ValueError, RecursionError) as error:  # UTF-8, JSON, integers of absurd length
        raise WireError(f"message kind {kind}: {error}") from None


def _parse(kind: int, packet: bytes, at: int) -> Message:
    match kind:
        case 3:
            return Work(*_exact(_WORK, packet, at))
        case 6:
            return Done(*_exact(_DONE, packet, at))
        case 4:
            grant_id, batch_size, percent, lease, groups, standing = _exact(_GRANT, packet, at)
            return Grant(grant_id, batch_size, percent / 100, lease, groups, bool(standing))
        case 14:
            return Start(*_exact(_START, packet, at))
        case 15:
            return Revoke(*_exact(_REVOKE, packet, at))
        case 16:
            return Plan(*_exact(_PLAN, packet, at))
        case 5:
            return Shed(*_exact(_SHED, packet, at))
        case 2:
            session, capacity = _exact(_WELCOME, packet, at)
            return Welcome(session, capacity / 100)
        case 1:
            return _parse_join(packet, at)
        case 11:
            return Ping(*_exact(_PING, packet, at))
        case 12:
            return Pong(*_exact(_PING, packet, at))
        case 7:
            if len(packet) != at:
                raise struct.error
            return Leave()
        case 8:
            reason, end = _take_text(packet, at)
            if len(packet) != end:
                raise struct.error
            return Refuse(reason)
        case 9 | 10 | 13:
            body = json.loads(packet[at:], parse_constant=_no_constant)
            if not isinstance(body, dict):
                raise WireError(f"message kind {kind}: a JSON object is wanted")
            return Control(body) if kind == 9 else Reply(body) if kind == 10 else Telemetry(body)
    raise WireError(f"unknown message kind {kind}")


def _parse_join(packet: bytes, at: int) -> Join:
    fixed = _JOIN.unpack_from(packet, at)
    pid, gpu, percent, max_batch, batch, slo_us, running, running_until_us, reject, groups, count = fixed
    if groups > MAX_SM_GROUPS:
        raise WireError(f"join: {groups} SM groups, at most {MAX_SM_GROUPS}")
    if count > MAX_LEVELS:
        raise WireError(f"join: {count} levels, at most {MAX_LEVELS}")
    at += _JOIN.size
    levels = struct.unpack_from(f"<{count}H", packet, at)
    model, at = _take_text(packet, at + 2 * count)
    instance, at = _take_text(packet, at)
    if at != len(packet) or not model or not instance:
        raise WireError("join: model and instance names are wanted, and nothing after them")
    if not (model.isprintable() and instance.isprintable()):
        raise WireError("join: names must be printable")
    if not 0 < percent <= 10_000 or any(not 0 < level <= 10_000 for level in levels):
        raise WireError("join: GPU% must be in (0, 100]")
    if running > 10_000:
        raise WireError("join: the GPU% of the running batch must be in [0, 100]")
    if not 1 <= batch <= max_batch <= MAX_BATCH_SIZE:
        raise WireError(f"join: 1 <= batch_size <= max_batch_size <= {MAX_BATCH_SIZE} is wanted")
    return Join(
        model, instance, pid, gpu, percent / 100, max_batch, batch, slo_us, bool(reject),
        tuple(level / 100 for level in levels), running / 100, running_until_us, groups,
    )  # fmt: skip


def _exact(layout: struct.Struct, packet: bytes, at: int) -> tuple[Any, ...]:
    if len(packet) != at + layout.size:
        raise struct.error
    return layout.unpack_from(packet, at)


def _no_constant(name: str) -> None:
    raise WireError(f"JSON has no number {name}")


def _hundredths(percent: float) -> int:
    return round(percent * 100)


def _text(value: str) -> bytes:
    data = value.encode()
    if len(data) > MAX_NAME_BYTES:
        raise WireError(f"name of {len(data)} bytes, at most {MAX_NAME_BYTES}")
    return struct.pack("<H", len(data)) + data


def _take_text(packet: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<H", packet, at)
    end = at + 2 + length
    if length > MAX_NAME_BYTES or end > len(packet):
        raise WireError("string longer than its packet or the limit")
    return packet[at + 2 : end].decode(), end
