"""The config editor on configs as people write them: exact texts before and after."""

from __future__ import annotations

import textwrap

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from dstack_sched.adapters import pbtxt
from dstack_sched.adapters.config_pbtxt import ConfigPbtxt, edit_config, read_config
from dstack_sched.domain.model_config import ConfigChange, InstanceGroup
from dstack_sched.errors import InputError

PLAN = ConfigChange(
    parameters={"gpu_percent": "40", "batch_size": "8"}, preferred_batch_sizes=(8,), max_queue_delay_us=1500
)

FROM_THE_DOCUMENTATION = {
    "minimal": 'backend: "dstack"\n',
    "no newline at the end": 'backend: "dstack"',
    "comment only": "# nothing here yet",
    "empty": "",
    "tensors": """\
        platform: "tensorrt_plan"
        max_batch_size: 8
        input [
          {
            name: "input0"
            data_type: TYPE_FP32
            dims: [ 16 ]
          },
          {
            name: "input1"
            data_type: TYPE_FP32
            dims: [ 16 ]
            reshape: { shape: [ ] }
          }
        ]
        output [ { name: "output0" data_type: TYPE_FP32 dims: [ -1, 4 ] label_filename: "labels.txt" } ]
        version_policy: { specific: { versions: [1,3]}}
        """,
    "scheduling": """\
        name: "resnet"  # the team's favourite
        backend: 'dstack'
        max_batch_size : 64;
        dynamic_batching {
          preferred_batch_size: [ 4, 8 ]   # measured in May
          max_queue_delay_microseconds: 100
          default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 200 }
          priority_levels: 2, default_priority_level: 1
          priority_queue_policy { key: 1 value: { max_queue_size: 100 } }
        }
        instance_group [
          { count: 2 kind: KIND_GPU gpus: [ 0 ]
            rate_limiter { resources [ { name: "R1" count: 4 } ] priority: 2 } }
        ]
        parameters: {
          key: "gpu_percent"
          value: {
            string_value: "55"   # by hand
          }
        }
        parameters: { key: "other" value: { string_value: "kept" } }
        model_warmup [ { name: "w" batch_size: 1
                         inputs { key: "x" value: { data_type: TYPE_FP32 dims: 3 zero_data: true } } } ]
        response_cache { enable: true }
        optimization { execution_accelerators {
          gpu_execution_accelerator : [ {
            name : "tensorrt" parameters { key: "precision_mode" value: "FP16" } } ]
        }}
        """,
}


def protobuf(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize("name", FROM_THE_DOCUMENTATION)
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_documented_configs_take_a_plan_and_keep_every_line(name: str, line_break: str) -> None:
    """Guards against an edit that reformats or drops what the operator wrote."""
    text = textwrap.dedent(FROM_THE_DOCUMENTATION[name]).replace("\n", line_break)
    edited = edit_config(text, PLAN, "c")
    before, after = protobuf(text), protobuf(edited)
    assert after.parameters["gpu_percent"].string_value == "40"
    assert after.dynamic_batching.preferred_batch_size == [8]
    assert after.dynamic_batching.max_queue_delay_microseconds == 1500
    for message in (before, after):
        message.ClearField("parameters")
        message.dynamic_batching.ClearField("preferred_batch_size")
        message.dynamic_batching.ClearField("max_queue_delay_microseconds")
        if not message.dynamic_batching.ListFields():
            message.ClearField("dynamic_batching")
    assert before == after
    lost = set(text.splitlines()) - set(edited.splitlines())
    ours = ("gpu_percent", '"55"', "preferred", "max_queue_delay")
    assert all(any(mark in line for mark in ours) for line in lost)
    if line_break in text:
        assert "\n" not in edited.replace(line_break, "")


def test_a_minimal_config_grows_readable_lines() -> None:
    assert edit_config('backend: "dstack"\n', PLAN, "c") == textwrap.dedent("""\
        backend: "dstack"
        dynamic_batching { preferred_batch_size: [ 8 ] max_queue_delay_microseconds: 1500 }
        parameters { key: "gpu_percent" value { string_value: "40" } }
        parameters { key: "batch_size" value { string_value: "8" } }
        """)


def test_only_the_values_move_in_a_full_config() -> None:
    text = textwrap.dedent(FROM_THE_DOCUMENTATION["scheduling"])
    edited = edit_config(text, PLAN, "c")
    expected = (
        text.replace("[ 4, 8 ]   # measured in May", "[ 8 ]   # measured in May")
        .replace("max_queue_delay_microseconds: 100", "max_queue_delay_microseconds: 1500")
        .replace('string_value: "55"   # by hand', 'string_value: "40"   # by hand')
        .replace(
            'value: { string_value: "kept" } }\n',
            'value: { string_value: "kept" } }\n'
            'parameters { key: "batch_size" value { string_value: "8" } }\n',
        )
    )
    assert edited == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "dynamic_batching { }",
            "dynamic_batching { preferred_batch_size: [ 8 ] max_queue_delay_microseconds: 5 }",
        ),
        (
            "dynamic_batching {}",
            "dynamic_batching { preferred_batch_size: [ 8 ] max_queue_delay_microseconds: 5 }",
        ),
        (
            "dynamic_batching <>",
            "dynamic_batching < preferred_batch_size: [ 8 ] max_queue_delay_microseconds: 5 >",
        ),
        (
            "dynamic_batching {\n}\n",
            "dynamic_batching {\n  preferred_batch_size: [ 8 ]\n  max_queue_delay_microseconds: 5\n}\n",
        ),
        (
            "dynamic_batching { # ours\n}\n",
            "dynamic_batching { # ours\n  preferred_batch_size: [ 8 ]\n"
            "  max_queue_delay_microseconds: 5\n}\n",
        ),
        (
            "dynamic_batching {\n\tpreferred_batch_size: 4\n\tpreferred_batch_size: 2\n"
            "\tpreserve_ordering: true\n}",
            "dynamic_batching {\n\tpreferred_batch_size: [ 8 ]\n\tpreserve_ordering: true\n"
            "\tmax_queue_delay_microseconds: 5\n}",
        ),
    ],
)
def test_dynamic_batching_in_every_shape(before: str, after: str) -> None:
    edited = edit_config(before, ConfigChange(preferred_batch_sizes=(8,), max_queue_delay_us=5), "c")
    assert edited == after
    protobuf(edited)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('parameters { key: "a" value { string_value: "1" } }\nbackend: "x"\n', 'backend: "x"\n'),
        ('parameters [ { key: "a" }, { key: "b" } ]', 'parameters [ { key: "b" } ]'),
        ('parameters [ { key: "b" } # b,\n , { key: "a" } ]', 'parameters [ { key: "b" } # b,\n   ]'),
        ('parameters [ { key: "a" } ]', ""),
        ('backend: "x", parameters { key: "a" }, name: "n"', 'backend: "x", name: "n"'),
    ],
)
def test_a_parameter_leaves_with_its_separator(before: str, after: str) -> None:
    edited = edit_config(before, ConfigChange(parameters={"a": None}), "c")
    assert edited == after
    assert "a" not in protobuf(edited).parameters


def test_a_repeated_key_is_read_and_set_as_protobuf_does() -> None:
    """Guards against editing the entry that does not hold."""
    entry = 'parameters { key: "a" value { string_value: "%d" } } '
    text = entry % 1 + entry % 2
    assert read_config(text, "c").parameters == {"a": "2"}
    assert (
        protobuf(edit_config(text, ConfigChange(parameters={"a": "3"}), "c")).parameters["a"].string_value
        == "3"
    )


def test_one_instance_group_is_edited_in_place() -> None:
    text = 'instance_group [ { name: "g" kind: KIND_GPU, rate_limiter { priority: 2 } } ]\n'
    edited = edit_config(text, ConfigChange(instance_groups=(InstanceGroup("KIND_GPU", 2, (1,)),)), "c")
    assert edited == (
        'instance_group [ { name: "g" kind: KIND_GPU, rate_limiter { priority: 2 } count: 2 gpus: [ 1 ] } ]\n'
    )


def test_an_ensemble_gets_no_dynamic_batching() -> None:
    text = 'platform: "ensemble"\nensemble_scheduling { step [ { model_name: "a" model_version: -1 } ] }\n'
    assert read_config(text, "c").scheduler == "ensemble_scheduling"
    with pytest.raises(InputError, match=r"^c:2: ensemble_scheduling is set"):
        edit_config(text, PLAN, "c")


def test_groups_that_say_more_are_not_thrown_away() -> None:
    text = 'instance_group { count: 1 host_policy: "h" }\n'
    two = (InstanceGroup("KIND_GPU", 1, (0,)), InstanceGroup("KIND_GPU", 1, (1,)))
    with pytest.raises(InputError, match=r"^c:1: instance_group.host_policy would be lost"):
        edit_config(text, ConfigChange(instance_groups=two), "c")


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('backend: "dstack', 1, "a string is not closed"),
        ("max_batch_size: eight", 1, "a whole number is wanted, found eight"),
        ("max_batch_size: 08", 1, "a whole number is wanted, found 08"),
        ("max_batch_size: 8x", 1, "'8x' is not a number"),
        ("\n\nmax_batch_size 8", 3, "':' is missing after max_batch_size"),
        ("dynamic_batching {\n", 1, "'{' is never closed"),
        ("dynamic_batching { ]", 1, "a field name is wanted, found ']'"),
        ("}", 1, "a field name is wanted, found '}'"),
        ('input [ { name: "a" } { name: "b" } ]', 1, "',' or ']' is wanted, found '{'"),
        ("dims: [ 1, ]", 1, "a value is wanted, found ']'"),
        ("dims: [ 1", 1, "',' or ']' is wanted, found the end of the file"),
        ("dims: [ [ 1 ] ]", 1, "a list cannot hold a list"),
        ("name:", 1, "a value is wanted, found the end of the file"),
        ("backend: dstack", 1, "a string in quotes is wanted, found dstack"),
        ('backend: "a"\nbackend: "b"', 2, "backend is set a second time (first on line 1)"),
        ('name: "\\q"', 1, "unknown escape \\q"),
        ('name: "\\777"', 1, "octal escape \\777 does not fit"),
        ("parameters: 3", 1, "'{' is wanted, found 3"),
        ('instance_group { kind: "GPU" }', 1, "one of KIND_AUTO, KIND_GPU, KIND_CPU, KIND_MODEL is wanted"),
        ("a: " + "{ a: " * 200, 1, "nested deeper than 100 levels"),
        ("backend\x00: 1", 1, "unexpected character '\\x00'"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, line: int, what: str) -> None:
    with pytest.raises(InputError) as caught:
        read_config(text, "m/config.pbtxt")
    assert str(caught.value).startswith(f"m/config.pbtxt:{line}: ")
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("literal", "data"),
    [
        (r'"\a\b\f\n\r\t\v\\\'\"\?"', b"\a\b\f\n\r\t\v\\'\"?"),
        (r'"\x4a\x4\112\7"', b"J\x04J\x07"),
        (r"'\u00e9\U0001F600'", "é😀".encode()),
        ('"é"', "é".encode()),
    ],
)
def test_escapes_follow_the_specification(literal: str, data: bytes) -> None:
    assert pbtxt.unescape(literal) == data


def test_bytes_that_are_not_utf8_survive() -> None:
    """Old configs have comments in Latin-1."""
    text = b'# caf\xe9\nbackend: "x"\n'.decode("utf-8", "surrogateescape")
    edited = edit_config(text, ConfigChange(backend="dstack"), "c")
    assert edited.encode("utf-8", "surrogateescape") == b'# caf\xe9\nbackend: "dstack"\n'


def test_numbers_in_every_base_are_equal_to_themselves() -> None:
    assert edit_config("max_batch_size: 0x10", ConfigChange(max_batch_size=16), "c") == "max_batch_size: 0x10"
    assert edit_config("max_batch_size: 020", ConfigChange(max_batch_size=16), "c") == "max_batch_size: 020"
    assert read_config("max_batch_size: - 1", "c").max_batch_size == -1


def test_where_names_the_file_after_an_edit_too() -> None:
    config = ConfigPbtxt('backend: "x"\n\nmax_batch_size: "8"', "m/config.pbtxt")
    config.set_backend("dstack")
    with pytest.raises(InputError, match=r"^m/config.pbtxt:3: a whole number"):
        config.set_max_batch_size(8)
