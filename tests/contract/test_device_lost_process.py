"""An instance whose device is lost answers with an error and ends its process, with a status of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dstack_backend.instance import EXIT_LOST
from fakes.feature_models import plus, save

PROGRAM = """
import json, sys, threading
import numpy as np
from dstack_backend.errors import DeviceLostError
from dstack_backend.instance import Instance
from fakes.backend import FakeRequest

instance = Instance({
    "model_config": json.dumps({
        "max_batch_size": 4, "parameters": {},
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [4]}],
    }),
    "model_name": "one",
    "model_version": "1", "model_instance_name": "one_0", "model_instance_kind": "CPU",
    "model_instance_device_id": "0", "model_repository": sys.argv[1],
})
request = FakeRequest(np.zeros((1, 4), np.float32))
instance.submit([request])
print("answered", request.wait().outputs["y"].tolist(), flush=True)

def lost(*_, **__):
    raise DeviceLostError("cuStreamSynchronize: the MPS server is gone (806)")

instance._session.launch = lost
request = FakeRequest(np.zeros((1, 4), np.float32))
instance.submit([request])
print("failed", request.wait().error, flush=True)
threading.Event().wait(60)
"""


def test_the_process_ends_with_its_own_status_after_its_answers(tmp_path: Path) -> None:
    save(plus(1.0), tmp_path / "1" / "model.onnx")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "DSTACK_ARBITER_SOCKET": str(tmp_path / "none")},
    )  # fmt: skip
    assert run.returncode == EXIT_LOST, run.stderr
    assert run.stdout.splitlines() == [
        "answered [[1.0, 1.0, 1.0, 1.0]]",
        "failed cuStreamSynchronize: the MPS server is gone (806)",
    ]
