"""TCP ports: choose free ones, or say clearly who has the one that was asked for."""

from __future__ import annotations

import socket

import psutil

from dstack_sched.errors import InputError, MachineError


def choose_ports(address: str, wanted: dict[str, int]) -> dict[str, int]:
    """A port for each use ("http", "grpc", "metrics"): the wanted one if it is free, any free one for 0.

    Free ones are held open until all are chosen, so that they differ. Errors: MachineError for a taken port,
    InputError for an address that is not of this machine.
    """
    held: list[socket.socket] = []
    chosen: dict[str, int] = {}
    try:
        for use, port in wanted.items():
            held.append(bind(address, port, use))
            chosen[use] = held[-1].getsockname()[1]
    finally:
        for each in held:
            each.close()
    return chosen


def bind(address: str, port: int, use: str) -> socket.socket:
    """A socket bound to the port; SO_REUSEADDR as servers set it, so that closed connections do not count."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
    except (OSError, OverflowError) as error:
        sock.close()
        if isinstance(error, OverflowError):
            raise InputError(f"--{use}-port {port}: a port is between 0 and 65535") from error
        if isinstance(error, socket.gaierror) or error.errno == 99:
            raise InputError(f"--address {address} is not an address of this machine") from error
        if isinstance(error, PermissionError):
            raise MachineError(
                f"port {port} ({use}) needs root; choose one above 1023 with --{use}-port"
            ) from error
        raise MachineError(
            f"port {port} ({use}) on {address} is taken{holder_of(port)}; stop that or choose another with"
            f" --{use}-port (0: any free one)"
        ) from error
    return sock


def holder_of(port: int) -> str:
    """' by NAME (pid N)' where the kernel tells us, else ''."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid:
                    return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
                break
    except psutil.Error:
        pass
    return ""
