"""Frames: every message survives the trip, any msgpack reader can read it, and no bytes do harm."""

from __future__ import annotations

import math
import types
import typing
from typing import Any, Literal, get_args, get_origin

import msgpack
import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared.bus import WireFault, wire
from shared.messages import (
    PROTOCOL,
    Ack,
    AnyMessage,
    ArrayHeader,
    AssignedGroup,
    Envelope,
    Goodbye,
    Grant,
    GroupReport,
    Heartbeat,
    Lease,
    LeaseReturned,
    Partial,
    Sampling,
    Status,
    TrainStep,
)

LIMIT = 1 << 20
MESSAGES = get_args(AnyMessage)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
headers = st.builds(
    ArrayHeader,
    name=st.text(max_size=5),
    dtype=st.sampled_from(sorted(wire.ITEM_BYTES)),
    shape=st.lists(st.integers(0, 5), max_size=3),
)


def values(hint: Any) -> st.SearchStrategy:
    """Values of a message's field, from its annotation."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is object:
        return plain
    if hint is ArrayHeader:
        return headers
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return messages(hint)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (typing.Union, types.UnionType):
        # float before int would come back as int; a reader cannot tell 1.0 from 1 either, and equality holds
        return st.one_of(*map(values, inner))
    if origin is list:
        return st.lists(values(inner[0]), max_size=3)
    if origin is dict:
        keys = st.text(max_size=5) if inner[0] is str else values(inner[0])
        return st.dictionaries(keys, values(inner[1]), max_size=3)
    return {
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=8),
        bytes: st.binary(max_size=8),
        bool: st.booleans(),
        type(None): st.none(),
    }[hint]


def messages(kind: type) -> st.SearchStrategy:
    hints = {k: v for k, v in typing.get_type_hints(kind).items() if k in kind.__struct_fields__}
    return st.fixed_dictionaries({name: values(hint) for name, hint in hints.items()}).map(lambda f: kind(**f))


def envelopes(kind: type) -> st.SearchStrategy:
    natural = st.integers(0, 2**63 - 1)
    return st.builds(
        Envelope,
        protocol=st.just(PROTOCOL),
        term=natural,
        sender=st.text(max_size=8),
        rank=st.integers(-1, 100),
        incarnation=natural,
        sequence=st.integers(1, 2**63 - 1) if kind.reliable else st.just(0),
        request=natural,
        reply_to=natural,
        body=messages(kind),
    )


def payload(message: Any) -> list[bytes]:
    """Frames that fit the headers of a message."""
    return [bytes(wire.ITEM_BYTES[h.dtype] * math.prod(h.shape)) for h in wire.array_headers(message)]


def envelope(body: Any, **fields: Any) -> Envelope:
    base = {"protocol": PROTOCOL, "term": 1, "sender": "r", "rank": 0, "incarnation": 1, "request": 5, "reply_to": 0}
    return Envelope(**({**base, "sequence": 3 if body.reliable else 0} | fields), body=body)


def report(*arrays: ArrayHeader) -> GroupReport:
    numbers = dict.fromkeys(("group", "attempt", "lineage", "prompt_length", "oldest", "newest"), 0)
    lists = {name: [] for name in ("rewards", "lengths", "truncated")}
    return GroupReport(**numbers, **lists, parts={}, seconds=0.0, arrays=list(arrays))


def raw(**changes: Any) -> bytes:
    """A Goodbye's envelope as the plain msgpack package writes it, with some fields changed (None: left out)."""
    fields = msgpack.unpackb(wire.encode(envelope(Goodbye(cause="c")), (), LIMIT)[0]) | changes
    return msgpack.packb({key: value for key, value in fields.items() if value is not None})


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_survives_the_trip_and_any_msgpack_reader_reads_it(kind):
    @settings(max_examples=12, deadline=None)
    @given(envelopes(kind))
    def check(sent: Envelope) -> None:
        frames = payload(sent.body)
        parts = wire.encode(sent, frames, LIMIT)
        assert wire.decode(parts, LIMIT) == (sent, tuple(frames))
        assert wire.decode([memoryview(part) for part in parts], LIMIT)[0] == sent

        plain_map = msgpack.unpackb(parts[0], strict_map_key=False)
        assert plain_map == msgspec.to_builtins(sent, builtin_types=(bytes,))
        assert plain_map["body"]["type"] == kind.__struct_config__.tag
        assert wire.decode([msgpack.packb(plain_map), *frames], LIMIT)[0] == sent

    check()


def test_names_on_the_wire_are_snake_case_and_distinct():
    tags = [kind.__struct_config__.tag for kind in MESSAGES]
    assert "group_report" in tags and "ack" in tags
    assert len(set(tags)) == len(tags) == len(MESSAGES)


@pytest.mark.parametrize(
    ("changes", "fault", "got"),
    [
        ({"protocol": 2}, "protocol", "version 2"),
        ({"protocol": 2, "body": {"type": "of_tomorrow"}, "trace": [1]}, "protocol", "version 2"),
        ({"protocol": "1"}, "malformed", "Expected `int`, got `str` - at `$.protocol`"),
        ({"body": {"type": "nonsense"}}, "malformed", "nonsense"),
        ({"body": {"type": "goodbye", "cause": 1}}, "malformed", "Expected `str`, got `int`"),
        ({"body": {"type": "goodbye", "cause": "", "more": 1}}, "malformed", "unknown field `more`"),
        ({"body": {"type": "goodbye"}}, "malformed", "missing required field `cause`"),
        ({"surprise": 1}, "malformed", "unknown field `surprise`"),
        ({"sender": None}, "malformed", "missing required field `sender`"),
        ({"sequence": 0}, "malformed", "0"),
        ({"sequence": -4}, "malformed", "-4"),
        ({"term": -1}, "malformed", "-1"),
        ({"sender": "s" * 201}, "malformed", "201"),
        ({"body": {"type": "ack", "sequence": 1}}, "malformed", "3"),
    ],
)
def test_what_is_not_this_protocol_is_named(changes, fault, got):
    with pytest.raises(WireFault) as caught:
        wire.decode([raw(**changes)], LIMIT)
    assert caught.value.fault == fault
    assert got in caught.value.got
    assert caught.value.expected and caught.value.advice
    assert caught.value.as_message().fault == fault


def test_a_fault_tells_the_numbers_of_the_message_if_they_can_be_read():
    with pytest.raises(WireFault) as caught:
        wire.decode([raw(body={"type": "refused", "cause": b"\xff"}, sequence=9, request=8)], LIMIT)
    fault = caught.value
    assert (fault.sequence, fault.request, fault.body_type) == (9, 8, "refused")
    with pytest.raises(WireFault) as caught:
        wire.decode([raw(sequence=True, request="8", body=7)], LIMIT)
    assert (caught.value.sequence, caught.value.request, caught.value.body_type) == (0, 0, "")


def test_a_fault_does_not_echo_megabytes():
    with pytest.raises(WireFault) as caught:
        wire.decode([raw(body={"type": "x" * 500_000})], LIMIT)
    assert len(str(caught.value)) < 600


INT3 = ArrayHeader(name="tokens", dtype="int32", shape=[3])


@pytest.mark.parametrize(
    ("body", "frames", "told"),
    [
        (report(INT3), [], "expected 1 payload frames"),
        (report(INT3), [bytes(12), b""], "got 2"),
        (report(INT3), [bytes(11)], "expected 12 bytes for array 'tokens'"),
        (report(ArrayHeader("a", "object", [1])), [bytes(8)], "got object"),
        (report(ArrayHeader("a", "int8", [-1, -1])), [bytes(1)], "lengths of 0 or more"),
        (report(ArrayHeader("a", "int8", [1] * 9)), [bytes(1)], "at most 8 dimensions"),
        (report(ArrayHeader("a", "int8", [2**62] * 8)), [bytes(1)], "for array 'a' (int8[4611686018427387904, "),
        (Goodbye(cause=""), [b""], "as the headers of Goodbye say, got 1"),
        (Heartbeat(state="", progress=0), [b"x"], "as the headers of Heartbeat say, got 1"),
    ],
)
def test_payload_that_the_headers_do_not_describe_is_malformed(body, frames, told):
    first = msgspec.msgpack.encode(envelope(body))
    with pytest.raises(WireFault, match="malformed") as caught:
        wire.decode([first, *frames], LIMIT)
    assert told in str(caught.value)
    with pytest.raises(WireFault, match="malformed"):
        wire.encode(envelope(body), frames, LIMIT)
    with pytest.raises(WireFault, match="malformed"):
        wire.check_outgoing(body, frames, LIMIT)


def test_the_arrays_of_all_groups_of_a_step_follow_in_order():
    lengths = [ArrayHeader(name="tokens", dtype="int32", shape=[n]) for n in (1, 2, 3)]
    groups = [AssignedGroup(g, 0, "train", 0, [], [], 1.0, list(a)) for g, a in enumerate((lengths[:2], lengths[2:]))]
    hints = typing.get_type_hints(TrainStep)
    step = TrainStep(
        **{n: [] if get_origin(hints[n]) is list else 0 for n in TrainStep.__struct_fields__ if n not in ("groups",)},
        groups=groups,
    )
    assert wire.array_headers(step) == lengths


def test_the_arrays_of_what_is_handed_over_follow_a_return_and_the_lease_that_brings_it():
    begun = [ArrayHeader(name="tokens", dtype="int32", shape=[n]) for n in (1, 2, 3)]
    back = LeaseReturned(1, 1, 1, "handed_back", "", Partial([1, 2], 0, 0, begun))
    assert wire.array_headers(back) == begun
    assert wire.array_headers(LeaseReturned(1, 1, 1, "handed_back", "")) == []
    partials = [Partial([1], 0, 0, begun[:1]), None, Partial([2, 3], 0, 0, begun[1:])]
    hints = typing.get_type_hints(Grant)
    fields = {n: hints[n]() for n in Grant.__struct_fields__ if hints[n] in (int, str, float)}
    rest = {"purpose": "train", "sampling": Sampling(1.0, 1.0, 0, 4)}
    lease = Lease([Grant(**fields, **rest, partial=partial) for partial in partials])
    assert wire.array_headers(lease) == begun


def test_size_limits_are_named():
    big = report(ArrayHeader(name="a", dtype="uint8", shape=[LIMIT]))
    with pytest.raises(WireFault, match=f"too_large: expected at most {LIMIT} bytes in one message"):
        wire.encode(envelope(big), [bytes(LIMIT)], LIMIT)
    with pytest.raises(WireFault, match="too_large") as caught:
        wire.decode([raw(), bytes(LIMIT)], LIMIT)
    assert (caught.value.sequence, caught.value.request) == (3, 5)
    with pytest.raises(WireFault, match=f"at most {wire.MAX_FRAMES} frames"):
        wire.decode([raw(), *[b""] * wire.MAX_FRAMES], LIMIT)
    nearly = report(ArrayHeader(name="a", dtype="uint8", shape=[LIMIT - 250]))
    with pytest.raises(WireFault, match="too_large"):
        wire.check_outgoing(nearly, [bytes(LIMIT - 250)], LIMIT)  # no envelope that `encode` may see is wider
    with pytest.raises(WireFault, match="an envelope of at most"):
        wire.decode([bytes(wire.MAX_ENVELOPE_BYTES + 1)], 1 << 40)


def refused_or_whole(parts: list[bytes]) -> None:
    """`decode` either gives a message that can be sent on, or a WireFault; anything else fails the test."""
    try:
        decoded, frames = wire.decode(parts, LIMIT)
    except WireFault as fault:
        assert fault.fault in wire.ADVICE
        msgspec.msgpack.encode(fault.as_message())
    else:
        assert wire.decode(wire.encode(decoded, frames, 2 * LIMIT), 2 * LIMIT)[0].body == decoded.body


@settings(max_examples=600, deadline=None)
@given(st.lists(st.binary(max_size=80), max_size=3))
def test_any_bytes_are_refused_by_name(parts):
    refused_or_whole(parts)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_messages_are_refused_by_name_or_still_messages(data):
    sent = data.draw(st.sampled_from(MESSAGES).flatmap(envelopes))
    parts = [bytearray(part) for part in wire.encode(sent, payload(sent.body), LIMIT)]
    for _ in range(data.draw(st.integers(1, 6))):
        part = parts[data.draw(st.integers(0, len(parts) - 1))]
        assume(part)
        at = data.draw(st.integers(0, len(part) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                part[at] = data.draw(st.integers(0, 255))
            case "cut":
                del part[at:]
            case "insert":
                part[at:at] = data.draw(st.binary(max_size=4))
    refused_or_whole([bytes(part) for part in parts])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(Envelope.__struct_fields__), plain | st.integers(0, 3), max_size=9))
def test_well_formed_msgpack_of_the_wrong_shape_is_refused_by_name(fields):
    with pytest.raises(WireFault):
        wire.decode([msgpack.packb(fields)], LIMIT)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x91" * 200_000,
        b"\x81\xa4body" * 50_000,
        b"\x81\xa8protocol" + b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\x80\x01",
        b"\x81\xa1\xff\x01",
        b"\xc7\x0c\xff" + b"\xff" * 12,
    ],
)
def test_bytes_made_to_exhaust_the_reader_are_refused(bomb):
    for parts in ([bomb], [raw()[:-5] + bomb]):
        with pytest.raises(WireFault, match="malformed"):
            wire.decode(parts, LIMIT)


def test_deep_nesting_inside_a_free_field_is_refused():
    inner: Any = 0
    for _ in range(400):
        inner = [inner]
    depth = msgspec.msgpack.encode(envelope(Status(run={"a": inner})))
    deeper = depth.replace(b"\x91" * 400, b"\x91" * 300_000)
    with pytest.raises(WireFault, match="malformed"):
        wire.decode([deeper], LIMIT)


def test_an_empty_message_is_malformed():
    with pytest.raises(WireFault, match="a message without frames"):
        wire.decode([], LIMIT)


def test_an_ack_is_small():
    assert len(wire.encode(envelope(Ack(sequence=1)), (), LIMIT)[0]) < 128
