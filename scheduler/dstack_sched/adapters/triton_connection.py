"""How to reach a Triton: address, admin headers, TLS. Checked when it is made, before anything connects.

Apart from triton_client so that verbs can state their options without importing gRPC.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dstack_sched.errors import InputError

_HEADER_KEY = re.compile(r"[a-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """One gRPC endpoint. Raises InputError for an address, header or file that cannot be used.

    url: HOST:PORT. headers: sent with each call; keys in lower case (--grpc-restricted-protocol wants
    `triton-grpc-protocol-KEY`). tls: encrypt; implied by any of the PEM files. tls_ca: who may have signed
    the server's certificate (default: gRPC's own roots). tls_cert, tls_key: ours, for mutual TLS.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        host, _, port = self.url.rpartition(":")
        if "/" in self.url or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InputError(f"--url {self.url}: HOST:PORT of Triton's gRPC endpoint is wanted")
        for key, value in self.headers.items():
            _check_header(key, value)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert and --tls-key belong together: give both, or neither")
        for option, path in (("ca", self.tls_ca), ("cert", self.tls_cert), ("key", self.tls_key)):
            if path is not None and not (path.is_file() and os.access(path, os.R_OK)):
                raise InputError(f"--tls-{option} {path}: not a file that can be read; name a PEM file")

    @property
    def encrypted(self) -> bool:
        return self.tls or any((self.tls_ca, self.tls_cert, self.tls_key))


def parse_headers(texts: Iterable[str]) -> dict[str, str]:
    """KEY=VALUE -> key in lower case -> value; KEY=@FILE takes the file's text, so that a secret need not be
    on the command line. Raises InputError."""
    headers: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().lower()
        if not equals or not key:
            raise InputError(f"--header {text}: KEY=VALUE is wanted, or KEY=@FILE")
        if key in headers:
            raise InputError(f"--header {key} is given twice; give it once")
        headers[key] = _from_file(key, Path(value[1:])) if value.startswith("@") else value
    return headers


def _from_file(key: str, path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--header {key}=@{path}: cannot be read ({error})") from None


def _check_header(key: str, value: str) -> None:
    if not _HEADER_KEY.fullmatch(key) or key.endswith("-bin"):
        raise InputError(f"--header {key}: a key of letters, digits, '-', '_' and '.' is wanted, not ...-bin")
    if not value.isascii() or not value.isprintable():
        raise InputError(f"--header {key}: its value must be printable ASCII text on one line")
