"""Messages survive their encoding; what is not a message is refused with a sentence, whatever its bytes."""

from __future__ import annotations

import msgspec
import pytest
from hyperpodrun.protocol import messages, names, text
from hyperpodrun.protocol.plan import Holding, RestorePlan, Transfer
from hypothesis import given
from hypothesis import strategies as st

FROM_WORKER = [
    messages.Attach(123, 60.0),
    messages.Attach(123, None),
    messages.Arrive(epoch=-1, call=1, step=0, healthy=True),
    messages.Arrive(1, 1, 7, True, holding=Holding("shard 0", 7, 6, ((0, 5), (1, 5)), 4, (3,))),
    messages.Registered(1, "shard 0"),
    messages.Fault(3, "ValueError: boom", "Traceback ...", False, 10**18),
    messages.Stepped(3, 17, 1, 2, 3),
    messages.Completed(3),
    messages.Completed(3, "it left manager.steps(10) at step 5", {"0": 17}),
    messages.Waits(3, 1, True),
]
FROM_AGENT = [
    messages.Start(4, {"RANK": "1"}, RestorePlan(17, 0, (Transfer(0, 1), Transfer(0, 2)), lost_steps=1)),
    messages.Start(0, {}, None),
    messages.FaultNotice(3, "rank 1 raised", (("127.0.0.1", 4242),)),
    messages.Finish(4),
    messages.Returned(4, 2, {"0": 17}),
]


@pytest.mark.parametrize("message", FROM_WORKER, ids=lambda message: type(message).__name__)
def test_what_a_worker_says_arrives_as_it_was(message):
    assert messages.decode_from_worker(messages.encode(message)) == message


@pytest.mark.parametrize("message", FROM_AGENT, ids=lambda message: type(message).__name__)
def test_what_an_agent_says_arrives_as_it_was(message):
    assert messages.decode_from_agent(messages.encode(message)) == message


def test_a_name_that_cannot_be_encoded_arrives_with_an_escape_in_it():
    sent = messages.Holds(1, 2, {"caf\udce9": "0123456789abcdef"})
    assert messages.decode_from_worker(messages.encode(sent)).digests == {"caf\\udce9": "0123456789abcdef"}


def test_a_worker_cannot_speak_as_an_agent():
    with pytest.raises(messages.MessageError):
        messages.decode_from_worker(messages.encode(messages.Finish(4)))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data):
    for decode in (messages.decode_from_worker, messages.decode_from_agent):
        try:
            decode(data)
        except messages.MessageError as error:
            assert str(error)


@given(st.sampled_from(FROM_WORKER), st.data())
def test_a_message_with_a_changed_field_is_valid_or_refused(message, data):
    fields = msgspec.to_builtins(message)
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = data.draw(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.text(), st.booleans()))
    try:
        messages.decode_from_worker(msgspec.msgpack.encode(fields))
    except messages.MessageError as error:
        assert str(error)


def test_unknown_fields_and_oversized_messages_are_refused():
    with pytest.raises(messages.MessageError, match="extra"):
        messages.decode_from_worker(msgspec.msgpack.encode({"type": "Completed", "epoch": 1, "extra": 1}))
    with pytest.raises(messages.MessageError, match="exceeds"):
        messages.encode(messages.Start(1, {"x": "x" * (messages.MAX_MESSAGE_BYTES + 1)}, None))
    with pytest.raises(messages.MessageError, match="exceeds"):
        messages.decode_from_worker(b"x" * (messages.MAX_MESSAGE_BYTES + 1))


def test_a_long_text_keeps_both_its_ends():
    text = messages.shorten("begin" + "x" * 100_000 + "end", 1000)
    assert len(text) < 1100
    assert text.startswith("begin")
    assert text.endswith("end")
    assert messages.shorten("short") == "short"


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_an_identity_is_read_as_it_was_written(local_rank, incarnation):
    assert names.parse_identity(names.format_identity(local_rank, incarnation)) == (local_rank, incarnation)


@given(st.text(max_size=20))
def test_any_text_is_an_identity_or_refused(text):
    try:
        local_rank, incarnation = names.parse_identity(text)
    except ValueError:
        return
    assert local_rank >= 0
    assert incarnation >= 0


@pytest.mark.parametrize(
    "message",
    [
        messages.Attach(-1, None),
        messages.Attach(1, float("nan")),
        messages.Attach(1, float("-inf")),
        messages.Attach(1, -1.0),
        messages.Arrive(epoch=-2, call=1, step=0, healthy=True),
        messages.Arrive(epoch=0, call=1, step=-1, healthy=True),
        messages.Stepped(3, -17, 1, 2, 3),
        messages.Stepped(3, 17, 1, 2, -3),
        messages.Stepped(2**64 - 1, 17, 1, 2, 3),
        messages.Completed(-5),
    ],
    ids=repr,
)
def test_a_number_that_the_agent_cannot_calculate_with_is_refused(message):
    with pytest.raises(messages.MessageError):
        messages.decode_from_worker(messages.encode(message))


def test_what_a_worker_is_told_never_exceeds_the_limit_in_a_world_of_80_000() -> None:
    plan = RestorePlan(9, 79_999, tuple(Transfer(79_999, rank) for rank in range(79_999)))
    sent = messages.starting(4, {"RANK": "79999"}, plan)
    assert all(len(messages.encode(message)) < messages.MAX_MESSAGE_BYTES // 4 for message in sent)
    *parts, start = [messages.decode_from_agent(messages.encode(message)) for message in sent]
    stale = messages.Transfers(3, (Transfer(1, 2),))
    assert messages.joined([stale, *parts], start) == messages.Start(4, {"RANK": "79999"}, plan)
    listeners = tuple((f"fe80:1234:5678:9abc:def0:1234:{n:x}:ffff", 65_535) for n in range(80_000))
    notice = messages.decode_from_agent(
        messages.encode(messages.FaultNotice(4, "\N{GRINNING FACE}" * 1_000_000, listeners))
    )
    assert isinstance(notice, messages.FaultNotice)
    assert notice.gloo_listeners == listeners[: messages.MAX_LISTENERS]


def test_an_ordinary_start_is_one_message() -> None:
    plan = RestorePlan(7, 0, (Transfer(0, 1),))
    assert messages.starting(4, {}, plan) == [messages.Start(4, {}, plan)]
    assert messages.starting(4, {}, None) == [messages.Start(4, {}, None)]


def test_other_nodes_get_the_last_frames_of_a_traceback() -> None:
    whole = (
        "Traceback (most recent call last):\n" + "".join(f"  frame {n}\n" for n in range(5000)) + "ValueError: boom\n"
    )
    short = text.last_frames(whole)
    assert len(short) <= text.MAX_FRAMES
    assert short.endswith("  frame 4999\nValueError: boom\n")
    first, second, *_ = short.splitlines()
    assert "characters left out" in first
    assert second.startswith("  frame ")
    assert text.last_frames(short) == short
    assert len(text.last_frames("x" * 70_000)) <= text.MAX_FRAMES
    assert text.last_frames("ValueError: boom") == "ValueError: boom"
