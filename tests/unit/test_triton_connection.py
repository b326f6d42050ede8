"""How to reach Triton: what is refused before anything connects, in one line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstack_sched.adapters.triton_connection import ConnectionOptions, parse_headers
from dstack_sched.errors import InputError


@pytest.mark.parametrize("url", ["localhost:8001", "10.0.0.1:1", "[::1]:8001", "triton.example.org:65535"])
def test_addresses(url: str) -> None:
    assert ConnectionOptions(url).url == url


@pytest.mark.parametrize(
    "url", ["localhost", "http://localhost:8001", "localhost:8001/", ":8001", "h:0", "h:65536", "h:x", ""]
)
def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(InputError, match=r"^--url .*: HOST:PORT of Triton's gRPC endpoint is wanted$"):
        ConnectionOptions(url)


def test_headers_are_read_and_a_secret_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    texts = ["Triton-Grpc-Protocol-Admin=a=b", f"x-token=@{tmp_path / 'token'}", "empty="]
    assert parse_headers(texts) == {"triton-grpc-protocol-admin": "a=b", "x-token": "s3cret", "empty": ""}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["key"], "KEY=VALUE is wanted"),
        (["=value"], "KEY=VALUE is wanted"),
        (["a=1", "A=2"], "--header a is given twice"),
        (["a=@/nonexistent"], "cannot be read"),
    ],
)
def test_what_is_no_header_is_said(texts: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_headers(texts)


@pytest.mark.parametrize("headers", [{"a b": "1"}, {"token-bin": "1"}, {"a": "1\n2"}, {"a": "\u00e9"}])
def test_headers_that_grpc_cannot_carry_are_said(headers: dict[str, str]) -> None:
    """Guards against a traceback from deep inside gRPC."""
    with pytest.raises(InputError, match=r"^--header "):
        ConnectionOptions("h:1", headers)


def test_tls_is_on_where_asked_for_or_implied(tmp_path: Path) -> None:
    pem = tmp_path / "ca.pem"
    pem.write_text("")
    assert not ConnectionOptions("h:1").encrypted
    assert ConnectionOptions("h:1", tls=True).encrypted
    assert ConnectionOptions("h:1", tls_ca=pem).encrypted
    assert ConnectionOptions("h:1", tls_cert=pem, tls_key=pem).encrypted


def test_tls_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    pem = tmp_path / "ca.pem"
    pem.write_text("")
    with pytest.raises(InputError, match=r"--tls-ca .*gone.pem: not a file that can be read"):
        ConnectionOptions("h:1", tls_ca=tmp_path / "gone.pem")
    with pytest.raises(InputError, match=r"--tls-cert and --tls-key belong together"):
        ConnectionOptions("h:1", tls_cert=pem)
