"""Edits of a protobuf text that touch only what they must: replace, insert after, insert into, remove.

Each takes the text and nodes of its parse, and returns the new text; the caller parses again before the next
edit, because spans move. Configs are small: clarity is worth more than the second parse.
"""

from __future__ import annotations

from dstack_sched.adapters.pbtxt import Field, ListValue, Message, Scalar, Value

_INDENT = "  "


def splice(text: str, start: int, end: int, new: str) -> str:
    return text[:start] + new + text[end:]


def replace_value(text: str, value: Value, new: str) -> str:
    """The value's span becomes `new`; a blank goes in where two words would otherwise run together."""
    before = " " if value.start and _is_word(text[value.start - 1]) and _is_word(new[0]) else ""
    after = " " if value.end < len(text) and _is_word(text[value.end]) and _is_word(new[-1]) else ""
    return splice(text, value.start, value.end, before + new + after)


def append_field(text: str, parent: Message, snippet: str) -> str:
    """Put a new field last in a message: on a line of its own where the message uses lines."""
    if parent.fields:
        return insert_after(text, parent.fields[-1], snippet)
    if parent.start == parent.inner_start:  # the root, without any field: keep its comments on top
        gap = "" if not text or text.endswith("\n") else newline(text)
        return text + gap + snippet + newline(text)
    if "\n" in text[parent.inner_start : parent.inner_end]:
        at = _line_end(text, parent.inner_start)
        return splice(text, at, at, newline(text) + _line_indent(text, parent.start) + _INDENT + snippet)
    tail = "" if text[parent.inner_start : parent.inner_end] else " "
    return splice(text, parent.inner_start, parent.inner_start, f" {snippet}{tail}")


def insert_after(text: str, field: Field, snippet: str) -> str:
    """Put a new field behind an existing one, on a new line if only a comment follows on its line."""
    at = field.separator_end
    line_end = _line_end(text, at)
    rest = text[at:line_end].strip()
    if rest and not rest.startswith("#"):
        gap = "" if text[at].isspace() or text[at] in "}>" else " "
        return splice(text, at, at, f" {snippet}{gap}")
    indent = _line_indent(text, field.start)
    if text[_line_start(text, field.start) : field.start].strip():  # it shares its line with an opening brace
        indent += _INDENT
    ends_file = line_end == len(text)
    return splice(
        text, line_end, line_end, newline(text) + indent + snippet + (newline(text) if ends_file else "")
    )


def remove_field(text: str, field: Field) -> str:
    """Take a field out, with its separator; its lines go too when nothing else is on them."""
    start, end = field.start, field.separator_end
    line_start, line_end = _line_start(text, start), _line_end(text, end)
    if not text[line_start:start].strip() and not text[end:line_end].strip():
        after = line_end + len(_newline_at(text, line_end))
        return splice(text, line_start, after, "")
    while end < len(text) and text[end] in " \t":
        end += 1
    return splice(text, start, end, "")


def remove_item(text: str, items: ListValue, index: int) -> str:
    """Take one item out of a list, with the comma that held it there."""
    item = items.items[index]
    if len(items.items) == 1:
        return splice(text, items.start + 1, items.end - 1, "")
    if index + 1 < len(items.items):
        return splice(text, item.start, items.items[index + 1].start, "")
    # The last one: its comma is the first after the item before it, comments aside.
    comma = _comma_after(text, items.items[index - 1].end)
    text = splice(text, item.start, item.end, "")
    return splice(text, comma, comma + 1, "")


def newline(text: str) -> str:
    """The line ending this text uses."""
    first = text.find("\n")
    return "\r\n" if first > 0 and text[first - 1] == "\r" else "\n"


def scalar_text(text: str, value: Scalar) -> str:
    return "".join(text[token.start : token.end] for token in value.tokens)


def _comma_after(text: str, at: int) -> int:
    while text[at] != ",":
        at = text.index("\n", at) if text[at] == "#" else at + 1
    return at


def _is_word(character: str) -> bool:
    return character.isalnum() or character in "_.+-"


def _line_start(text: str, at: int) -> int:
    return text.rfind("\n", 0, at) + 1


def _line_end(text: str, at: int) -> int:
    """Where the line break of this line begins, or the end of the text."""
    end = text.find("\n", at)
    if end < 0:
        return len(text)
    return end - 1 if end > at and text[end - 1] == "\r" else end


def _newline_at(text: str, at: int) -> str:
    return "\r\n" if text.startswith("\r\n", at) else text[at : at + 1]


def _line_indent(text: str, at: int) -> str:
    start = _line_start(text, at)
    end = start
    while end < at and text[end] in " \t":
        end += 1
    return text[start:end]
