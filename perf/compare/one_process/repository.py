"""The repository of alternative (g): one Triton model that holds all of them.

Its inputs are those of all models, optional, named MODEL__INPUT; its one output is what the model that was
asked answers, a row a row of the batch. Which model is asked shows from the inputs that are there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_backend.runtime import CpuSession

if TYPE_CHECKING:
    from compare.alternatives import Served

NAME = "one_process"
OUTPUT = "answer"
SEPARATOR = "__"


def write_one_process(
    root: Path, models_dir: Path, served: Mapping[str, Served], kind: str
) -> dict[str, str]:
    """Write it; every model is asked for under the one name."""
    from compare.alternatives import MAX_BATCH_SIZE, link
    from compare.cells import file_of, served_name

    version = root / NAME / "1"
    version.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_name("model.py"), version / "model.py")
    inputs, batch_sizes = [], {}
    for model, how in served.items():
        part = served_name(model)
        file = version / "models" / part / "1" / "model.onnx"
        link(models_dir / f"{file_of(model)}.onnx", file)
        session = CpuSession(file, threads=1, optimize=False)
        for spec in session.inputs:
            dims = ", ".join(str(dim if isinstance(dim, int) else -1) for dim in spec.shape[1:])
            name = f"{part}{SEPARATOR}{spec.name}"
            # Ragged: requests to different models may come in one batch; execute() sorts them.
            inputs.append(
                f'{{ name: "{name}" data_type: {spec.triton_dtype} dims: [ {dims} ] optional: true '
                "allow_ragged_batch: true }"
            )
        session.close()
        batch_sizes[part] = how.batch_size
    (version / "models.json").write_text(json.dumps(batch_sizes))
    (root / NAME / "config.pbtxt").write_text(
        f'backend: "python"\nmax_batch_size: {MAX_BATCH_SIZE}\n'
        f"instance_group [ {{ kind: {kind} count: 1 }} ]\n"
        f"input [\n  {(',' + chr(10) + '  ').join(inputs)}\n]\n"
        f'output [ {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ -1 ] }} ]\n'
        "dynamic_batching { }\n"
    )
    return dict.fromkeys(served, NAME)
