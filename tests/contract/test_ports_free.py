"""Ports on the real loopback interface."""

from __future__ import annotations

import os
import socket

import pytest

from dstack_sched.adapters.ports_free import choose_ports
from dstack_sched.errors import InputError, MachineError


def test_zero_means_any_free_port_and_all_differ() -> None:
    chosen = choose_ports("127.0.0.1", {"http": 0, "grpc": 0, "metrics": 0})
    assert len(set(chosen.values())) == 3
    assert choose_ports("127.0.0.1", chosen) == chosen, "chosen ports are free to be taken"


def test_a_taken_port_names_its_holder_and_the_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(MachineError) as caught:
            choose_ports("127.0.0.1", {"grpc": port})
    message = str(caught.value)
    assert f"port {port} (grpc)" in message
    assert f"pid {os.getpid()}" in message
    assert "--grpc-port" in message
    assert "\n" not in message


def test_an_address_of_another_machine_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"--address 192\.0\.2\.1 is not an address of this machine"):
        choose_ports("192.0.2.1", {"http": 0})


def test_a_port_out_of_range_is_an_input_error() -> None:
    with pytest.raises(InputError, match="between 0 and 65535"):
        choose_ports("127.0.0.1", {"http": 70000})
