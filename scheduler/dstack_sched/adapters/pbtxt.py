"""Protobuf text format as a concrete syntax tree over its own text.

Every node is a span of the source, so comments, order, separators, unknown fields and white space are kept
by construction: an edit replaces one span and leaves every other byte alone. No schema is needed; what the
fields mean is the caller's business. Grammar: https://protobuf.dev/reference/protobuf/textformat-spec/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from dstack_sched.errors import InputError

MAX_DEPTH = 100

_TOKEN = re.compile(
    r"""
    (?P<trivia>  (?: [ \t\n\v\f\r]+ | \#[^\n]* )+ )
  | (?P<number>  0[xX][0-9a-fA-F]+
               | (?: [0-9]+\.[0-9]* | \.[0-9]+ ) (?: [eE][+-]?[0-9]+ )? [fF]?
               | [0-9]+ (?: [eE][+-]?[0-9]+ [fF]? | [fF] )?  )
  | (?P<ident>   [A-Za-z_][A-Za-z0-9_]* )
  | (?P<string>  " (?: [^"\\\n] | \\[^\n] )* " | ' (?: [^'\\\n] | \\[^\n] )* ' )
  | (?P<punct>   [{}<>\[\]:;,\-./] )
    """,
    re.VERBOSE,
)
_ESCAPE = re.compile(
    r"\\(?:x(?P<hex>[0-9a-fA-F]{1,2})|(?P<oct>[0-7]{1,3})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})|(?P<c>.))",
    re.DOTALL,
)
_SIMPLE_ESCAPES = {
    "a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92, "'": 39, '"': 34, "?": 63,
}  # fmt: skip
_CLOSING = {"{": "}", "<": ">"}


@dataclass(frozen=True, slots=True)
class Token:
    """`text[start:end]`; kind is trivia, number, ident, string, punct or end."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number, identifier or (concatenated) string, with its sign."""

    start: int
    end: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """Fields between braces or angle brackets; the root message has no brackets of its own.

    inner_start and inner_end bound what is between the brackets.
    """

    start: int
    end: int
    inner_start: int
    inner_end: int
    fields: tuple[Field, ...]

    def all(self, name: str) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if field.name == name)


@dataclass(frozen=True, slots=True)
class ListValue:
    """`[ item, item ]`."""

    start: int
    end: int
    items: tuple[Value, ...]


Value: TypeAlias = Scalar | Message | ListValue


@dataclass(frozen=True, slots=True)
class Field:
    """`name: value` with the separator after it, if any: end excludes the separator, separator_end has it."""

    name: str
    start: int
    end: int
    separator_end: int
    value: Value


def tokens(text: str, where: str) -> Iterator[Token]:
    """All tokens, trivia included: their texts joined are `text`. Raises InputError at `where:line`."""
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise syntax_error(text, at, where, _bad_character(text[at]))
        kind = match.lastgroup or ""
        end = match.end()
        if kind == "number" and end < len(text) and (text[end].isalnum() or text[end] == "_"):
            raise syntax_error(text, at, where, f"{text[at : end + 1]!r} is not a number")
        yield Token(kind, at, end)
        at = end


def _bad_character(character: str) -> str:
    if character in "\"'":
        return "a string is not closed on its line"
    return f"unexpected character {character!r}"


def line_of(text: str, offset: int) -> int:
    """The line, counted from 1, that holds this offset."""
    return text.count("\n", 0, offset) + 1


def syntax_error(text: str, offset: int, where: str, what: str) -> InputError:
    return InputError(f"{where}:{line_of(text, offset)}: {what}")


def parse(text: str, where: str) -> Message:
    """The root message of a text. Raises InputError, one line `where:line: what is wrong`."""
    return _Parser(text, where).root()


class _Parser:
    def __init__(self, text: str, where: str) -> None:
        self._text = text
        self._where = where
        self._tokens = [token for token in tokens(text, where) if token.kind != "trivia"]
        self._tokens.append(Token("end", len(text), len(text)))
        self._at = 0

    def root(self) -> Message:
        fields = self._fields("no bracket", 0)
        return Message(0, len(self._text), 0, len(self._text), fields)

    def _fields(self, closing: str, depth: int) -> tuple[Field, ...]:
        fields: list[Field] = []
        while self._peek().kind != "end" and self._word() != closing:
            fields.append(self._field(depth))
        return tuple(fields)

    def _field(self, depth: int) -> Field:
        start = self._peek().start
        name = self._field_name()
        colon = self._take_if(":")
        value = self._value(depth + 1)
        if not colon and not _is_message(value):
            raise self._error(start, f"':' is missing after {name}")
        separator_end = value.end
        if self._word() in (";", ","):
            separator_end = self._next().end
        return Field(name, start, value.end, separator_end, value)

    def _field_name(self) -> str:
        token = self._next()
        if token.kind == "ident":
            return self._text[token.start : token.end]
        if self._slice(token) != "[":
            raise self._error(token.start, f"a field name is wanted, found {self._found(token)}")
        while self._word() != "]":
            part = self._next()
            if part.kind not in ("ident", "number") and self._slice(part) not in (".", "/", "-"):
                raise self._error(part.start, f"an extension name is wanted, found {self._found(part)}")
        end = self._next().end
        return self._text[token.start : end]

    def _value(self, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise self._error(self._peek().start, f"nested deeper than {MAX_DEPTH} levels")
        word = self._word()
        if word in _CLOSING:
            return self._message(depth)
        if word == "[":
            return self._list(depth)
        return self._scalar()

    def _message(self, depth: int) -> Message:
        opening = self._next()
        closing = _CLOSING[self._slice(opening)]
        fields = self._fields(closing, depth)
        if self._peek().kind == "end":
            raise self._error(opening.start, f"'{self._slice(opening)}' is never closed")
        close = self._next()
        return Message(opening.start, close.end, opening.end, close.start, fields)

    def _list(self, depth: int) -> ListValue:
        opening = self._next()
        items: list[Value] = []
        while self._word() != "]":
            if items and not self._take_if(","):
                raise self._error(
                    self._peek().start, f"',' or ']' is wanted, found {self._found(self._peek())}"
                )
            if self._word() == "[":
                raise self._error(self._peek().start, "a list cannot hold a list")
            items.append(self._value(depth + 1))
        return ListValue(opening.start, self._next().end, tuple(items))

    def _scalar(self) -> Scalar:
        first = self._next()
        parts = [first]
        if self._slice(first) == "-":
            parts.append(self._next())
            if parts[1].kind not in ("number", "ident"):
                raise self._error(
                    parts[1].start, f"a number is wanted after '-', found {self._found(parts[1])}"
                )
        elif first.kind == "string":
            while self._peek().kind == "string":
                parts.append(self._next())
            for part in parts:
                self._check_escapes(part)
        elif first.kind not in ("number", "ident"):
            raise self._error(first.start, f"a value is wanted, found {self._found(first)}")
        return Scalar(first.start, parts[-1].end, tuple(parts))

    def _check_escapes(self, token: Token) -> None:
        try:
            unescape(self._slice(token))
        except ValueError as error:
            raise self._error(token.start, str(error)) from None

    def _peek(self) -> Token:
        return self._tokens[self._at]

    def _next(self) -> Token:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def _word(self) -> str:
        """The text of the next token if it is punctuation."""
        token = self._peek()
        return self._slice(token) if token.kind == "punct" else ""

    def _take_if(self, word: str) -> bool:
        if self._word() != word:
            return False
        self._next()
        return True

    def _slice(self, token: Token) -> str:
        return self._text[token.start : token.end]

    def _found(self, token: Token) -> str:
        return "the end of the file" if token.kind == "end" else repr(self._slice(token))

    def _error(self, offset: int, what: str) -> InputError:
        return syntax_error(self._text, offset, self._where, what)


def _is_message(value: Value) -> bool:
    return isinstance(value, Message) or (
        isinstance(value, ListValue) and all(isinstance(item, Message) for item in value.items)
    )


def unescape(literal: str) -> bytes:
    """The bytes of one quoted literal. Raises ValueError for an escape that protobuf does not know."""
    out = bytearray()
    at = 0
    body = literal[1:-1]
    for match in _ESCAPE.finditer(body):
        out += body[at : match.start()].encode("utf-8", "surrogateescape")
        out += _escaped(match)
        at = match.end()
    return bytes(out + body[at:].encode("utf-8", "surrogateescape"))


def _escaped(match: re.Match[str]) -> bytes:
    if digits := match["hex"]:
        return bytes([int(digits, 16)])
    if digits := match["oct"]:
        if int(digits, 8) > 0xFF:
            raise ValueError(f"octal escape {match[0]} does not fit in a byte")
        return bytes([int(digits, 8)])
    if digits := match["u"] or match["U"]:
        try:
            return chr(int(digits, 16)).encode()
        except (ValueError, UnicodeEncodeError):
            raise ValueError(f"escape {match[0]} is not a Unicode character") from None
    if match["c"] not in _SIMPLE_ESCAPES:
        raise ValueError(f"unknown escape {match[0]} in a string")
    return bytes([_SIMPLE_ESCAPES[match["c"]]])


def quote(value: str) -> str:
    """A string literal that every protobuf parser reads back as `value`; non-ASCII as octal bytes."""
    out = []
    for byte in value.encode("utf-8", "surrogateescape"):
        if byte in (0x22, 0x5C):
            out.append("\\" + chr(byte))
        elif 0x20 <= byte < 0x7F:
            out.append(chr(byte))
        else:
            out.append(f"\\{byte:03o}")
    return '"' + "".join(out) + '"'
