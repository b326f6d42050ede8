"""Model configs for property tests: random messages, in the many ways that the text format allows."""

from __future__ import annotations

import random

from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from dstack_sched.adapters import pbtxt
from dstack_sched.domain.model_config import ConfigChange, InstanceGroup

COMMENTS = ("", " ", "\n", "\t", " # a comment: { [ \"'\n", "\r\n", "\n\n#\n", "  ")
SEPARATORS = ("", "", ";", ",")
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
counts = st.integers(0, 2**31 - 1)
relaxed = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def model_configs(draw: st.DrawFn) -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig()
    if draw(st.booleans()):
        config.name = draw(names)
    if draw(st.booleans()):
        config.backend = draw(st.sampled_from(["dstack", "onnxruntime", "é\n\"'\\"]))
    if draw(st.booleans()):
        config.max_batch_size = draw(st.integers(-(2**31), 2**31 - 1))
    for key, value in draw(st.dictionaries(names, names, max_size=4)).items():
        config.parameters[key].string_value = value
    if draw(st.booleans()):
        config.dynamic_batching.SetInParent()
        config.dynamic_batching.preferred_batch_size.extend(draw(st.lists(counts, max_size=3)))
        config.dynamic_batching.max_queue_delay_microseconds = draw(st.integers(0, 2**63))
        if draw(st.booleans()):
            config.dynamic_batching.default_queue_policy.max_queue_size = 7
    for _ in range(draw(st.integers(0, 3))):
        group = config.instance_group.add()
        group.kind = draw(st.integers(0, 3))
        group.count = draw(st.integers(1, 5))
        group.gpus.extend(draw(st.lists(st.integers(0, 7), max_size=2)))
    for dims in draw(st.lists(st.lists(st.integers(-1, 512), max_size=3), max_size=2)):
        config.input.add(name=draw(names), data_type=draw(st.integers(0, 14)), dims=dims)
    if draw(st.booleans()):
        config.optimization.cuda.graph_spec.add().batch_size = 3
        config.model_warmup.add(name="w").inputs["x"].zero_data = True
        config.version_policy.specific.versions.extend([1, 3])
    return config


class Writer:
    """Prints a message in one of the many ways the text format allows, chosen by a seed."""

    def __init__(self, rng: random.Random) -> None:
        self._choose = rng.choice

    def message(self, message: Message) -> str:
        out = [self._choose(COMMENTS)]
        for field, value in message.ListFields():
            out.append(self.field(field, value))
        return "".join(out)

    def field(self, field: FieldDescriptor, value: object) -> str:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entries = [self._entry(field.message_type, key, value[key]) for key in value]
            return self._repeated(field.name, entries, is_message=True)
        is_message = field.message_type is not None
        if field.is_repeated:
            return self._repeated(field.name, [self._value(field, item) for item in value], is_message)
        return self._single(field.name, self._value(field, value), is_message)

    def _entry(self, entry_type: object, key: object, value: object) -> str:
        fields = entry_type.fields_by_name
        body = self._single("key", self._value(fields["key"], key), is_message=False) + self._single(
            "value", self._value(fields["value"], value), fields["value"].message_type is not None
        )
        return self._brackets(body)

    def _repeated(self, name: str, items: list[str], is_message: bool) -> str:
        if not self._choose((True, False)):
            return "".join(self._single(name, item, is_message) for item in items)
        gap = self._choose(COMMENTS)
        return self._single(name, f"[{gap}{f'{gap},{gap} '.join(items)}{gap}]", is_message)

    def _single(self, name: str, value: str, is_message: bool) -> str:
        colon = self._choose(("", ":", " : ")) if is_message else self._choose((":", ": "))
        end = self._choose(SEPARATORS) or " "
        before, between, after = (self._choose(COMMENTS) for _ in range(3))
        return f"{before}{name}{between}{colon}{after}{value}{end}"

    def _value(self, field: FieldDescriptor, value: object) -> str:
        if field.message_type is not None:
            return self._brackets(self.message(value))
        if field.enum_type is not None:
            return self._choose((str(value), field.enum_type.values_by_number[value].name))
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str):
            return self._string(value)
        if isinstance(value, int):
            return self._choose((str(value), hex(value) if value >= 0 else f"{value}"))
        return repr(value)

    def _string(self, value: str) -> str:
        half = self._choose((0, len(value) // 2))
        parts = [value[:half], value[half:]] if half else [value]
        return self._choose((" ", "\n", " # two halves\n")).join(self._literal(part) for part in parts)

    def _literal(self, value: str) -> str:
        if self._choose((True, False)):
            return pbtxt.quote(value)
        quote = self._choose(("'", '"'))
        escaped = value.replace("\\", "\\\\").replace("\n", "\\n").replace(quote, "\\" + quote)
        return quote + escaped + quote

    def _brackets(self, body: str) -> str:
        opening, closing = self._choose(("{}", "<>"))
        return f"{opening}{body}{self._choose(COMMENTS)}{closing}"


@st.composite
def written_configs(draw: st.DrawFn) -> tuple[str, model_config_pb2.ModelConfig]:
    config = draw(model_configs())
    return Writer(random.Random(draw(st.integers(0, 2**32)))).message(config), config


changes = st.builds(
    ConfigChange,
    backend=st.none() | st.just("dstack"),
    parameters=st.dictionaries(
        st.sampled_from(["gpu_percent", "slo_ms", "batch_size", "", "é"]), st.none() | names, max_size=3
    ),
    max_batch_size=st.none() | st.integers(0, 512),
    preferred_batch_sizes=st.none() | st.lists(st.integers(1, 64), max_size=3).map(tuple),
    max_queue_delay_us=st.none() | st.integers(0, 2**40),
    instance_groups=st.none()
    | st.lists(
        st.builds(
            InstanceGroup,
            kind=st.sampled_from(["KIND_GPU", "KIND_CPU"]),
            count=st.integers(1, 9),
            gpus=st.lists(st.integers(0, 7), max_size=2).map(tuple),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
)


def protobuf(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())
