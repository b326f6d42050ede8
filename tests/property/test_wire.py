"""The wire never raises anything but WireError, loses nothing, and lets nothing out of bounds through."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_backend import wire

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
PERCENT = st.integers(1, 10_000).map(lambda hundredths: hundredths / 100)
CAPACITY = st.integers(0, 65_535).map(lambda hundredths: hundredths / 100)
NAME = st.text(st.characters(codec="utf-8"), min_size=1, max_size=100).filter(str.isprintable)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
BODY = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), JSON, max_size=5)


@st.composite
def joins(draw: st.DrawFn) -> wire.Join:
    max_batch = draw(st.integers(1, wire.MAX_BATCH_SIZE))
    return wire.Join(
        model=draw(NAME),
        instance=draw(NAME),
        pid=draw(U32),
        gpu=draw(st.integers(-(2**15), 2**15 - 1)),
        gpu_percent=draw(PERCENT),
        max_batch_size=max_batch,
        batch_size=draw(st.integers(1, max_batch)),
        slo_us=draw(U32),
        reject_late=draw(st.booleans()),
        levels=tuple(draw(st.lists(PERCENT, max_size=wire.MAX_LEVELS))),
        running_percent=draw(st.just(0.0) | PERCENT),
        running_until_us=draw(U64),
        sm_groups=draw(st.integers(0, wire.MAX_SM_GROUPS)),
    )


MESSAGES = st.one_of(
    joins(),
    st.builds(wire.Welcome, U64, CAPACITY),
    st.builds(wire.Work, U32, U64),
    st.builds(wire.Grant, U64, U32, CAPACITY, U64, U64, st.booleans()),
    st.builds(wire.Start, U64, U32, U32, U64),
    st.builds(wire.Revoke, U64),
    st.builds(wire.Telemetry, BODY),
    st.builds(wire.Plan, U32, U32, st.booleans()),
    st.builds(wire.Shed, U64),
    st.builds(wire.Done, U64, U32, U32, U32, U32, U64),
    st.just(wire.Leave()),
    st.builds(wire.Refuse, NAME),
    st.builds(wire.Control, BODY),
    st.builds(wire.Reply, BODY),
    st.builds(wire.Ping, U64),
    st.builds(wire.Pong, U64),
)


@given(MESSAGES)
def test_what_is_encoded_comes_back_equal(message: wire.Message) -> None:
    packet = wire.encode(message)
    assert len(packet) <= wire.MAX_MESSAGE_BYTES
    assert wire.decode(packet) == message


def decodes_or_refuses(packet: bytes) -> None:
    """Whatever decodes must be in bounds, and encode to something that decodes to the same."""
    try:
        message = wire.decode(packet)
    except wire.WireError as error:
        assert "\n" not in str(error)
        return
    if isinstance(message, wire.Join):
        assert message.model.isprintable() and message.instance.isprintable()
        assert 1 <= message.batch_size <= message.max_batch_size <= wire.MAX_BATCH_SIZE
        assert 0 < message.gpu_percent <= 100 and 0 <= message.running_percent <= 100
        assert len(message.levels) <= wire.MAX_LEVELS
        assert message.model and message.instance
    assert wire.decode(wire.encode(message)) == message


@given(st.binary(max_size=200))
def test_random_bytes(packet: bytes) -> None:
    decodes_or_refuses(packet)


@given(st.integers(0, 255), st.binary(max_size=200))
def test_random_body_behind_a_good_header(kind: int, body: bytes) -> None:
    decodes_or_refuses(struct.pack("<2sBB", b"DS", wire.VERSION, kind) + body)


@given(MESSAGES, st.data())
def test_a_good_packet_damaged(message: wire.Message, data: st.DataObject) -> None:
    """Truncated, lengthened or with a byte changed."""
    packet = bytearray(wire.encode(message))
    at = data.draw(st.integers(0, len(packet) - 1))
    damage = data.draw(st.sampled_from(("cut", "add", "flip")))
    if damage == "cut":
        del packet[at:]
    elif damage == "add":
        packet += data.draw(st.binary(min_size=1, max_size=9))
    else:
        packet[at] ^= data.draw(st.integers(1, 255))
    decodes_or_refuses(bytes(packet))


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"DS\x02",
        b"XX\x01\x07",
        b"DS\x01\x07",
        b"DS\x02\x00",
        b"DS\x02\x07\x00",
        b"DS\x02\x09[]",
        b"DS\x02\x09{",
        b'DS\x02\x09{"a":NaN}',
        b'DS\x02\x09{"a":-Infinity}',
        b"DS\x02\x09" + b"[" * 100_000,
        b'DS\x02\x09{"a":' + b"9" * 10_000 + b"}",
        b'DS\x02\x09"\xff"',
        b"DS\x02\x08\xff\xff",
        b"DS\x02\x09" + b" " * wire.MAX_MESSAGE_BYTES + b"{}",
    ],
)
def test_known_bad_packets(packet: bytes) -> None:
    """Guards against errors of the parsers below that are not WireError: recursion, huge integers, UTF-8."""
    with pytest.raises(wire.WireError):
        wire.decode(packet)


@pytest.mark.parametrize(
    "message",
    [
        wire.Work(-1, 0),
        wire.Work(2**32, 0),
        wire.Grant(1, 1, float("nan"), 0),
        wire.Grant(1, 1, float("inf"), 0),
        wire.Grant(1, 1, 700.0, 0),
        wire.Refuse("\udc80"),
        wire.Control({"a": float("nan")}),
        wire.Control({"a": object()}),
        wire.Control({"a": "x" * wire.MAX_MESSAGE_BYTES}),
        wire.Join("m" * 600, "i", 1, 0, 50.0, 1, 1, 0, False),
        wire.Join("m", "i", 1, 0, 50.0, 1, 1, 0, False, (10.0,) * 300),
        wire.Grant(1, 1, 50.0, 0, 1 << 64),
    ],
)
def test_what_cannot_be_sent_says_so(message: wire.Message) -> None:
    with pytest.raises(wire.WireError):
        wire.encode(message)
