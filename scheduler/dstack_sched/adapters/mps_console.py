"""Questions to an MPS control daemon, through NVIDIA's own control program."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from dstack_sched.domain.mps import MpsClient, MpsServer

CONTROL = "nvidia-cuda-mps-control"
PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
ASK_TIMEOUT_S = 5.0


class MpsConsole:
    """The daemon of one pipe directory. An answer of None means that no daemon answers there."""

    def __init__(self, pipe_dir: Path, environ: Mapping[str, str]) -> None:
        self.pipe_dir = pipe_dir
        self._environ = {**environ, PIPE_VARIABLE: str(pipe_dir)}

    def answers(self) -> bool:
        return self.ask("get_server_list") is not None

    def servers(self) -> tuple[MpsServer, ...] | None:
        """Every server with its status and clients."""
        pids = self._numbers("get_server_list")
        if pids is None:
            return None
        listed = _listed(self.ask("ps") or "")
        return tuple(self._server(pid, listed) for pid in pids)

    def _server(self, pid: int, listed: dict[int, tuple[MpsClient, ...]]) -> MpsServer:
        words = (self.ask(f"get_server_status {pid}") or "").split()
        status = words[-1] if words and words[-1].isupper() else ""
        clients = listed.get(pid)
        if clients is None:  # a daemon without `ps`, or a server without clients
            clients = tuple(MpsClient(each) for each in self._numbers(f"get_client_list {pid}") or ())
        return MpsServer(pid, status, clients)

    def default_percent(self) -> float | None:
        """What clients get that name no percentage of their own."""
        try:
            return float((self.ask("get_default_active_thread_percentage") or "").split()[-1])
        except (IndexError, ValueError):
            return None

    def quit(self, timeout_s: float) -> None:
        """Ask it to end: its servers get timeout_s to see their clients off, then they are made to."""
        self.ask(f"quit -t {timeout_s:.0f}", timeout_s + 5.0)

    def ask(self, command: str, timeout_s: float = ASK_TIMEOUT_S) -> str | None:
        """The daemon's answer to one command."""
        if not self.pipe_dir.is_dir():
            return None
        try:
            run = subprocess.run(
                [CONTROL], input=command + "\n", text=True, capture_output=True, timeout=timeout_s,
                env=self._environ,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout if run.returncode == 0 else None

    def _numbers(self, command: str) -> tuple[int, ...] | None:
        answer = self.ask(command)
        return None if answer is None else tuple(int(word) for word in answer.split() if word.isdigit())


def _listed(table: str) -> dict[int, tuple[MpsClient, ...]]:
    """Server -> clients, from `ps`: columns PID ID SERVER DEVICE NAMESPACE COMMAND."""
    lines = [line.split() for line in table.splitlines() if line.strip()]
    if not lines or {"PID", "SERVER", "DEVICE"} - set(lines[0]):
        return {}
    header = lines[0]
    pid_at, server_at, device_at = (header.index(name) for name in ("PID", "SERVER", "DEVICE"))
    found: dict[int, tuple[MpsClient, ...]] = {}
    for words in lines[1:]:
        if len(words) <= max(pid_at, server_at, device_at) or not words[pid_at].isdigit():
            continue
        client = MpsClient(int(words[pid_at]), words[device_at], " ".join(words[len(header) - 1 :]))
        server = int(words[server_at]) if words[server_at].isdigit() else 0
        found[server] = (*found.get(server, ()), client)
    return found
