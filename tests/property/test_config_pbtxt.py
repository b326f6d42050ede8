"""The config editor against protobuf's own parser, on configs no person would write by hand."""

from __future__ import annotations

from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from dstack_sched.adapters import pbtxt
from dstack_sched.adapters.config_pbtxt import ConfigPbtxt, edit_config, read_config
from dstack_sched.adapters.pushed_repository import change_message
from dstack_sched.domain.model_config import ConfigChange
from dstack_sched.errors import InputError
from fakes.config_texts import changes, protobuf, relaxed, written_configs


def expect(config: model_config_pb2.ModelConfig, change: ConfigChange) -> model_config_pb2.ModelConfig:
    """The change made on the message itself, by protobuf's own means: the oracle."""
    out = model_config_pb2.ModelConfig()
    out.CopyFrom(config)
    if change.backend is not None:
        out.backend = change.backend
    if change.max_batch_size is not None:
        out.max_batch_size = change.max_batch_size
    if change.preferred_batch_sizes is not None or change.max_queue_delay_us is not None:
        out.dynamic_batching.SetInParent()
    if change.preferred_batch_sizes is not None:
        out.dynamic_batching.preferred_batch_size[:] = change.preferred_batch_sizes
    if change.max_queue_delay_us is not None:
        out.dynamic_batching.max_queue_delay_microseconds = change.max_queue_delay_us
    if change.instance_groups is not None:
        del out.instance_group[:]
        for group in change.instance_groups:
            kind = model_config_pb2.ModelInstanceGroup.Kind.Value(group.kind)
            out.instance_group.add(kind=kind, count=group.count, gpus=group.gpus)
    for key, value in change.parameters.items():
        if value is None:
            if key in out.parameters:
                del out.parameters[key]
        else:
            out.parameters[key].string_value = value
    return out


@relaxed
@given(written_configs())
def test_the_tokens_of_a_config_are_its_text_and_protobuf_reads_the_same(written):
    """Guards against a parser that loses a byte, or that sees another config than Triton does."""
    text, config = written
    assert protobuf(text) == config, "the test's writer itself is wrong"
    assert "".join(text[t.start : t.end] for t in pbtxt.tokens(text, "c")) == text
    assert ConfigPbtxt(text, "c").text == text
    ours = read_config(text, "c")
    assert ours.backend == config.backend
    assert (ours.max_batch_size or 0) == config.max_batch_size
    assert dict(ours.parameters) == {k: v.string_value for k, v in config.parameters.items()}
    assert ours.dynamic_batching == config.HasField("dynamic_batching")
    assert list(ours.preferred_batch_sizes) == list(config.dynamic_batching.preferred_batch_size)
    assert (ours.max_queue_delay_us or 0) == config.dynamic_batching.max_queue_delay_microseconds
    kinds = [model_config_pb2.ModelInstanceGroup.Kind.Name(g.kind) for g in config.instance_group]
    assert [g.kind for g in ours.instance_groups] == kinds
    assert [list(g.gpus) for g in ours.instance_groups] == [list(g.gpus) for g in config.instance_group]


@relaxed
@given(written_configs(), changes)
def test_an_edit_changes_what_it_says_and_nothing_else(written, change):
    """Guards against an edit that breaks the syntax, drops a neighbour, or is not found again."""
    text, config = written
    edited = edit_config(text, change, "c")
    assert protobuf(edited) == expect(config, change)
    assert edit_config(edited, change, "c") == edited, "stating it again must change nothing"
    if (
        change.instance_groups is None
        and change.preferred_batch_sizes is None
        and None not in change.parameters.values()
    ):
        halves = text.count("# two halves")  # a comment inside a concatenated string goes with the string
        assert len(_comments(edited)) >= len(_comments(text)) - halves, "a comment was lost"


@relaxed
@given(written_configs(), changes)
def test_a_pushed_config_gets_the_same_change_as_a_written_one(written, change):
    """Guards against two editors that mean different things: of texts, and of messages for the load call."""
    text, config = written
    change_message(config, change)
    edited = protobuf(edit_config(text, change, "c"))
    assert config == edited


@relaxed
@given(written_configs())
def test_a_change_that_states_what_is_there_is_byte_identical(written):
    """Guards against needless reloads: Triton reloads on mtime, so an idle rewrite costs a reload."""
    text, _ = written
    found = read_config(text, "c")
    same = ConfigChange(
        backend=found.backend if found.backend else None,
        parameters=dict(found.parameters),
        max_batch_size=found.max_batch_size,
        preferred_batch_sizes=found.preferred_batch_sizes if found.dynamic_batching else None,
        max_queue_delay_us=found.max_queue_delay_us,
        instance_groups=found.instance_groups or None,
    )
    assert edit_config(text, same, "c") == text


@relaxed
@given(written_configs(), st.data())
def test_damaged_text_is_one_clear_line_or_read_as_protobuf_reads_it(written, data):
    """Guards against a traceback on a broken file, and against reading another config than Triton."""
    text, _ = written
    if not text:
        return
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = (
        text[:at]
        + data.draw(st.sampled_from(["", "{", "}", '"', "'", "[", ":", "\\", "#", "-", "\x00", "é"]))
        + text[at + 1 :]
    )
    try:
        theirs = protobuf(damaged)
    except (
        text_format.ParseError,
        UnicodeDecodeError,
        DeprecationWarning,
    ):  # Python takes "\\{"; C++ does not
        theirs = None
    try:
        ours = read_config(damaged, "dir/config.pbtxt")
    except InputError as error:
        assert str(error).startswith("dir/config.pbtxt:")
        assert "\n" not in str(error)
        assert theirs is None, f"protobuf reads it: {error}"
        return
    if theirs is not None:
        assert ours.backend.encode("utf-8", "surrogateescape") == theirs.backend.encode()
        assert (ours.max_batch_size or 0) == theirs.max_batch_size


def _comments(text: str) -> list[str]:
    root = [text[t.start : t.end] for t in pbtxt.tokens(text, "c") if t.kind == "trivia"]
    return [line for trivia in root for line in trivia.split("\n") if "#" in line]
