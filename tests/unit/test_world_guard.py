"""The guard itself: a pure test that reaches for the world must fail, by whatever door."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess

import pytest


def test_sockets_are_refused() -> None:
    with pytest.raises(RuntimeError, match="opened a socket"):
        socket.socket()
    with pytest.raises(RuntimeError, match="opened a socket"):
        socket.create_connection(("127.0.0.1", 9))


def test_subprocesses_are_refused() -> None:
    with pytest.raises(RuntimeError, match="started a subprocess"):
        subprocess.run(["/bin/true"], check=True)
    with pytest.raises(RuntimeError, match="forked"):
        os.fork()


def test_nvml_is_refused() -> None:
    with pytest.raises(RuntimeError, match="touched NVML"):
        ctypes.CDLL("libnvidia-ml.so.1")
