"""A program that speaks as nvidia-cuda-mps-control does, to be put first on PATH.

Like the real one it runs in the foreground (-f) or behind (-d), keeps its pipe in $CUDA_MPS_PIPE_DIRECTORY,
and answers commands on stdin; the file "asked" there has a line each. Its servers are what the test writes to
servers.json in that directory:
{"SERVER PID": {"status": "ACTIVE", "clients": [[pid, "GPU-uuid", "command"]]}}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROGRAM = """#!{python}
import json, os, pathlib, signal, subprocess, sys, time
pipe = pathlib.Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/nowhere"))
control = pipe / "control"

def alive():
    try:
        os.kill(int(control.read_text()), 0)
        return True
    except (OSError, ValueError):
        return False

def serve():
    if {broken!r}:
        sys.exit("Cannot start: no device")
    (pipe / "environ.json").write_text(json.dumps(dict(os.environ)))
    temporary = pipe / "control.new"
    temporary.write_text(str(os.getpid()))
    temporary.rename(control)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    time.sleep(600)

if sys.argv[1:] == ["-f"]:
    serve()
if sys.argv[1:] == ["-d"]:
    if alive():
        sys.exit("An instance of this daemon is already running")
    if {broken!r}:
        sys.exit("Cannot start: no device")
    subprocess.Popen([sys.executable, __file__, "-f"], start_new_session=True, stdin=subprocess.DEVNULL,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sys.exit(0)
if not alive():
    sys.exit("Cannot find MPS control daemon process")
servers = json.loads((pipe / "servers.json").read_text()) if (pipe / "servers.json").exists() else {{}}
words = sys.stdin.readline().split()
with (pipe / "asked").open("a") as asked:
    asked.write(words[0] + "\\n")
if words[0] == "quit":
    pid = int(control.read_text())
    os.kill(pid, signal.SIGTERM)
    control.unlink()
elif words[0] == "get_server_list":
    print("\\n".join(servers))
elif words[0] == "get_server_status":
    print(servers[words[1]]["status"])
elif words[0] == "get_client_list":
    print("\\n".join(str(each[0]) for each in servers[words[1]]["clients"]))
elif words[0] == "get_default_active_thread_percentage":
    print("100.0")
elif words[0] == "ps" and {has_ps!r}:
    print("PID     ID    SERVER    DEVICE             NAMESPACE    COMMAND")
    for server, about in servers.items():
        for number, (pid, device, command) in enumerate(about["clients"]):
            print(f"{{pid}}  {{number}}  {{server}}  {{device}}  4026531836  {{command}}")
elif words[0] == "ps":
    print("Unknown command: ps")
"""


def install_control(directory: Path, *, broken: bool = False, has_ps: bool = True) -> dict[str, str]:
    """An environment in which this is the control program, and nobody else's daemon is found."""
    directory.mkdir(exist_ok=True)
    program = directory / "nvidia-cuda-mps-control"
    program.write_text(PROGRAM.format(python=sys.executable, broken=broken, has_ps=has_ps))
    program.chmod(0o755)
    return {
        "PATH": f"{directory}:{os.environ['PATH']}",
        "CUDA_MPS_PIPE_DIRECTORY": str(directory / "usual-pipe"),
        "XDG_RUNTIME_DIR": str(directory / "runtime"),
    }


def set_servers(pipe_dir: Path, servers: Mapping[int, Mapping[str, Any]]) -> None:
    """The servers that the daemon of this directory tells from now on."""
    temporary = pipe_dir / "servers.new"
    temporary.write_text(json.dumps({str(pid): dict(about) for pid, about in servers.items()}))
    temporary.rename(pipe_dir / "servers.json")


def times_asked(pipe_dir: Path, command: str) -> int:
    """How often the program has been asked this."""
    asked = pipe_dir / "asked"
    return asked.read_text().split().count(command) if asked.exists() else 0
