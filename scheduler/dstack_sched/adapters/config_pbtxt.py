"""A lossless editor of `config.pbtxt`: reads the fields that matter to us, rewrites only those.

    config = ConfigPbtxt(text, "models/resnet50/config.pbtxt")
    config.set_parameter("gpu_percent", "40")
    config.text                                     # all else byte for byte as it was

A setter that finds the wanted value already there changes nothing, however that value is spelled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dstack_sched.adapters import pbtxt, pbtxt_edit
from dstack_sched.adapters.pbtxt import Field, ListValue, Message, Scalar, Value
from dstack_sched.domain.model_config import ConfigChange, InstanceGroup, ModelConfig
from dstack_sched.errors import InputError

_KINDS = ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")  # in the order of their numbers
_SCHEDULERS = ("sequence_batching", "ensemble_scheduling")
_GROUP_FIELDS = frozenset({"kind", "count", "gpus"})
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0[0-7]+|0|[1-9][0-9]*)")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_config(text: str, where: str) -> ModelConfig:
    """The fields of `text` that matter to us. Raises InputError `where:line: what is wrong`."""
    return ConfigPbtxt(text, where).read()


def edit_config(text: str, change: ConfigChange, where: str) -> str:
    """`text` with the change in it. Raises InputError as read_config does."""
    config = ConfigPbtxt(text, where)
    if change.backend is not None:
        config.set_backend(change.backend)
    if change.max_batch_size is not None:
        config.set_max_batch_size(change.max_batch_size)
    if change.preferred_batch_sizes is not None or change.max_queue_delay_us is not None:
        config.set_dynamic_batching(change.preferred_batch_sizes, change.max_queue_delay_us)
    if change.instance_groups is not None:
        config.set_instance_groups(change.instance_groups)
    for key, value in change.parameters.items():
        if value is None:
            config.remove_parameter(key)
        else:
            config.set_parameter(key, value)
    return config.text


class ConfigPbtxt:
    """One config text under edit; `where` names it. Raises InputError for a text that does not parse."""

    def __init__(self, text: str, where: str) -> None:
        self._where = where
        self._set(text)

    @property
    def text(self) -> str:
        return self._text

    def read(self) -> ModelConfig:
        batching = self._message("dynamic_batching")
        delay = self._one(batching, "max_queue_delay_microseconds") if batching else None
        size = self._one(self._root, "max_batch_size")
        return ModelConfig(
            backend=self._root_string("backend"),
            platform=self._root_string("platform"),
            max_batch_size=self._integer(size.value) if size else None,
            parameters=self.parameters(),
            preferred_batch_sizes=self._preferred(batching) if batching else (),
            max_queue_delay_us=self._integer(delay.value) if delay else None,
            dynamic_batching=batching is not None,
            instance_groups=tuple(self._group(item) for item in self._messages("instance_group")),
            scheduler=next((name for name in _SCHEDULERS if self._root.all(name)), ""),
        )

    # -- backend, max_batch_size ------------------------------------------------------------------------

    def set_backend(self, name: str) -> None:
        if self._root_string("backend") != name:
            self._set_field(self._root, "backend", pbtxt.quote(name))

    def set_max_batch_size(self, size: int) -> None:
        field = self._one(self._root, "max_batch_size")
        if field is None or self._integer(field.value) != size:
            self._set_field(self._root, "max_batch_size", str(size))

    # -- parameters -------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, str]:
        """Key -> string value; of a key stated twice the last holds, as in any protobuf map."""
        return {self._entry_key(entry): self._entry_value(entry) for entry in self._messages("parameters")}

    def set_parameter(self, key: str, value: str) -> None:
        entries = [entry for entry in self._messages("parameters") if self._entry_key(entry) == key]
        if not entries:
            snippet = (
                f"parameters {{ key: {pbtxt.quote(key)} value {{ string_value: {pbtxt.quote(value)} }} }}"
            )
            others = self._root.all("parameters")
            self._set(
                pbtxt_edit.insert_after(self._text, others[-1], snippet)
                if others
                else pbtxt_edit.append_field(self._text, self._root, snippet)
            )
        elif self._entry_value(entries[-1]) != value:
            holder = self._one(entries[-1], "value")
            if holder is None:
                self._append(entries[-1], f"value {{ string_value: {pbtxt.quote(value)} }}")
            else:
                self._set_field(self._as_message(holder), "string_value", pbtxt.quote(value))

    def remove_parameter(self, key: str) -> None:
        while True:
            found = next((f for f in self._root.all("parameters") if self._holds_key(f, key)), None)
            if found is None:
                return
            if isinstance(found.value, ListValue) and len(found.value.items) > 1:
                keys = [self._entry_key(self._expect_message(item)) for item in found.value.items]
                self._set(pbtxt_edit.remove_item(self._text, found.value, keys.index(key)))
            else:
                self._set(pbtxt_edit.remove_field(self._text, found))

    def _holds_key(self, field: Field, key: str) -> bool:
        return any(self._entry_key(entry) == key for entry in self._items(field))

    def _entry_key(self, entry: Message) -> str:
        field = self._one(entry, "key")
        return self._string(field.value) if field else ""

    def _entry_value(self, entry: Message) -> str:
        holder = self._one(entry, "value")
        field = self._one(self._as_message(holder), "string_value") if holder else None
        return self._string(field.value) if field else ""

    # -- dynamic_batching -------------------------------------------------------------------------------

    def set_dynamic_batching(self, preferred: Sequence[int] | None, max_queue_delay_us: int | None) -> None:
        """State these two (None: leave alone) and keep the queue policies and all else that is there."""
        if self._message("dynamic_batching") is None:
            other = next((field for name in _SCHEDULERS for field in self._root.all(name)), None)
            if other:
                raise self._error(
                    other.start, f"{other.name} is set: a model has one scheduler, not dynamic_batching too"
                )
            self._append(self._root, "dynamic_batching { }")
        if preferred is not None and self._preferred(self._batching()) != tuple(preferred):
            self._set_repeated(self._batching(), "preferred_batch_size", preferred)
        if max_queue_delay_us is None:
            return
        delay = self._one(self._batching(), "max_queue_delay_microseconds")
        if delay is None or self._integer(delay.value) != max_queue_delay_us:
            self._set_field(self._batching(), "max_queue_delay_microseconds", str(max_queue_delay_us))

    def _batching(self) -> Message:
        message = self._message("dynamic_batching")
        assert message is not None
        return message

    def _preferred(self, batching: Message) -> tuple[int, ...]:
        return self._integers(batching, "preferred_batch_size")

    # -- instance_group ---------------------------------------------------------------------------------

    def set_instance_groups(self, groups: Sequence[InstanceGroup]) -> None:
        """State exactly these groups. One group that stays one is edited in place, its other fields kept.

        Raises InputError where groups would have to go that state more than kind, count and gpus.
        """
        present = self._messages("instance_group")
        if tuple(self._group(item) for item in present) == tuple(groups):
            return
        if len(present) == len(groups) == 1:
            self._edit_group(groups[0])
            return
        for item in present:
            extra = next((field for field in item.fields if field.name not in _GROUP_FIELDS), None)
            if extra:
                raise self._error(
                    extra.start, f"instance_group.{extra.name} would be lost: merge the groups by hand"
                )
        snippet = f"instance_group [ {', '.join(_group_text(group) for group in groups)} ]"
        fields = self._root.all("instance_group")
        if not fields:
            self._append(self._root, snippet)
            return
        text = self._text
        for field in reversed(fields[1:]):  # backwards: earlier spans stay right
            text = pbtxt_edit.remove_field(text, field)
        self._set(pbtxt_edit.splice(text, fields[0].start, fields[0].end, snippet))

    def _edit_group(self, group: InstanceGroup) -> None:
        def current() -> tuple[Message, InstanceGroup]:
            message = self._messages("instance_group")[0]
            return message, self._group(message)

        message, old = current()
        if old.kind != group.kind:
            self._set_field(message, "kind", group.kind)
        message, old = current()
        if old.count != group.count:
            self._set_field(message, "count", str(group.count))
        message, old = current()
        if old.gpus != group.gpus:
            self._set_repeated(message, "gpus", group.gpus)

    def _group(self, message: Message) -> InstanceGroup:
        kind, count = self._one(message, "kind"), self._one(message, "count")
        return InstanceGroup(
            kind=self._kind(kind.value) if kind else "KIND_AUTO",
            count=self._integer(count.value) if count else 1,
            gpus=self._integers(message, "gpus"),
        )

    def _kind(self, value: Value) -> str:
        word = self._word(value)
        if word.isdigit() and int(word) < len(_KINDS):
            return _KINDS[int(word)]
        if not _IDENTIFIER.fullmatch(word):
            raise self._error(
                value.start, f"instance_group.kind: one of {', '.join(_KINDS)} is wanted, found {word}"
            )
        return word

    # -- the tree ---------------------------------------------------------------------------------------

    def _set(self, text: str) -> None:
        self._root = pbtxt.parse(text, self._where)
        self._text = text

    def _append(self, parent: Message, snippet: str) -> None:
        self._set(pbtxt_edit.append_field(self._text, parent, snippet))

    def _set_field(self, parent: Message, name: str, value: str) -> None:
        """Replace the value of a singular field, or append the field."""
        field = self._one(parent, name)
        if field is None:
            self._append(parent, f"{name}: {value}")
        else:
            self._set(pbtxt_edit.replace_value(self._text, field.value, value))

    def _set_repeated(self, parent: Message, name: str, values: Sequence[int]) -> None:
        """Replace all values of a repeated integer field of a message."""
        fields = parent.all(name)
        text = self._text
        for field in reversed(fields[1:] if values else fields):
            text = pbtxt_edit.remove_field(text, field)
        new = _list_text(values)
        if fields and values:
            text = pbtxt_edit.replace_value(text, fields[0].value, new)
        elif values:
            text = pbtxt_edit.append_field(text, parent, f"{name}: {new}")
        self._set(text)

    def _one(self, parent: Message, name: str) -> Field | None:
        fields = parent.all(name)
        if len(fields) > 1:
            first = pbtxt.line_of(self._text, fields[0].start)
            raise self._error(fields[1].start, f"{name} is set a second time (first on line {first})")
        return fields[0] if fields else None

    def _message(self, name: str) -> Message | None:
        field = self._one(self._root, name)
        return self._as_message(field) if field else None

    def _as_message(self, field: Field) -> Message:
        return self._expect_message(field.value)

    def _expect_message(self, value: Value) -> Message:
        if not isinstance(value, Message):
            raise self._error(value.start, f"'{{' is wanted, found {self._snippet(value)}")
        return value

    def _messages(self, name: str) -> list[Message]:
        return [item for field in self._root.all(name) for item in self._items(field)]

    def _items(self, field: Field) -> list[Message]:
        items = field.value.items if isinstance(field.value, ListValue) else (field.value,)
        return [self._expect_message(item) for item in items]

    def _integers(self, parent: Message, name: str) -> tuple[int, ...]:
        values: list[int] = []
        for field in parent.all(name):
            items = field.value.items if isinstance(field.value, ListValue) else (field.value,)
            values.extend(self._integer(item) for item in items)
        return tuple(values)

    def _integer(self, value: Value) -> int:
        word = self._word(value)
        if not _INTEGER.fullmatch(word):
            raise self._error(value.start, f"a whole number is wanted, found {word}")
        sign, digits = (-1, word[1:]) if word[0] == "-" else (1, word)
        base = 8 if len(digits) > 1 and digits[0] == "0" and digits[1] not in "xX" else 0
        return sign * int(digits, base)

    def _root_string(self, name: str) -> str:
        field = self._one(self._root, name)
        return self._string(field.value) if field else ""

    def _string(self, value: Value) -> str:
        if not isinstance(value, Scalar) or value.tokens[0].kind != "string":
            raise self._error(value.start, f"a string in quotes is wanted, found {self._snippet(value)}")
        data = b"".join(pbtxt.unescape(self._text[token.start : token.end]) for token in value.tokens)
        return data.decode("utf-8", "surrogateescape")

    def _word(self, value: Value) -> str:
        return (
            pbtxt_edit.scalar_text(self._text, value) if isinstance(value, Scalar) else self._snippet(value)
        )

    def _snippet(self, value: Value) -> str:
        line = self._text[value.start : value.end].splitlines()[0]
        return line if len(line) <= 30 else line[:27] + "..."

    def _error(self, offset: int, what: str) -> InputError:
        return pbtxt.syntax_error(self._text, offset, self._where, what)


def _group_text(group: InstanceGroup) -> str:
    gpus = f" gpus: {_list_text(group.gpus)}" if group.gpus else ""
    return f"{{ count: {group.count} kind: {group.kind}{gpus} }}"


def _list_text(values: Sequence[int]) -> str:
    return f"[ {', '.join(map(str, values))} ]"
