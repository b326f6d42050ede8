"""Export well-known networks with random weights to ONNX, for studies of speed.

    python perf/export_models.py run/models [--models resnet50,bert_base] [--workers 8]

Needs torch with torchvision and transformers (the GPU host has them; nothing is downloaded). Each model
becomes DIR/NAME.onnx with a free batch dimension and tensor names that start with NAME. It is compared with
torch on a small batch through ONNX Runtime's CPU provider where that is at hand, and kept if the file is
there already. One process a model.
The command prints one line a model and exits with 1 when one failed; the others are there all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

OPSET = 17
SEED = 20261122
SEQUENCE = 128
CHECK_ROWS = 2
TOLERANCE = 2e-3  # relative, in norm: float32 through two different runtimes
TIMEOUT_S = 300


def torchvision_model(
    builder: str, side: int = 224, *, pixels: bool = False, **options: Any
) -> Callable[[], tuple[Any, Any, list[str]]]:
    """A network on images. pixels: as services get them, 8 bits a channel, normalised inside the graph."""

    def build() -> tuple[Any, Any, list[str]]:
        import torch
        import torchvision

        model = getattr(torchvision.models, builder)(weights=None, **options)
        if not pixels:
            return model, (torch.randn(CHECK_ROWS, 3, side, side),), ["image"]

        class OnPixels(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, image: Any) -> Any:
                return self.model((image.to(torch.float32) - 118.0) / 58.0)

        return OnPixels(), (torch.randint(0, 256, (CHECK_ROWS, 3, side, side), dtype=torch.uint8),), ["image"]

    return build


def bert(
    layers: int, hidden: int, heads: int, *, first_only: bool = False
) -> Callable[[], tuple[Any, Any, list[str]]]:
    """A BERT encoder with explicit attention mask. Its output is the sequence of hidden states, or with
    first_only that of the first token, from which classifiers work."""

    def build() -> tuple[Any, Any, list[str]]:
        import torch
        import transformers

        class Encoder(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                config = transformers.BertConfig(
                    num_hidden_layers=layers,
                    hidden_size=hidden,
                    num_attention_heads=heads,
                    intermediate_size=4 * hidden,
                    attn_implementation="eager",
                )
                self.bert = transformers.BertModel(config, add_pooling_layer=False)

            def forward(self, input_ids: Any, attention_mask: Any) -> Any:
                # The 4-d additive mask is made here: transformers' own mask code does not always trace.
                mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * -1e4
                hidden_states = self.bert.embeddings(input_ids=input_ids)
                for layer in self.bert.encoder.layer:
                    out = layer(hidden_states, mask)
                    hidden_states = out[0] if isinstance(out, tuple) else out
                return hidden_states[:, 0] if first_only else hidden_states

        ids = torch.randint(1, 1000, (CHECK_ROWS, SEQUENCE))
        return Encoder(), (ids, torch.ones_like(ids)), ["input_ids", "attention_mask"]

    return build


MODELS: dict[str, Callable[[], tuple[Any, Any, list[str]]]] = {
    "alexnet": torchvision_model("alexnet"),
    "mobilenet_v2": torchvision_model("mobilenet_v2"),
    "resnet50": torchvision_model("resnet50"),
    "vgg19": torchvision_model("vgg19"),
    "inception_v3": torchvision_model("inception_v3", side=299, aux_logits=True, init_weights=False),
    "resnext50": torchvision_model("resnext50_32x4d"),
    "shufflenet_v2": torchvision_model("shufflenet_v2_x1_0"),
    "bert_base": bert(12, 768, 12),
    # The same networks as services see them, small tensors in and out: for studies with many clients.
    "alexnet_u8": torchvision_model("alexnet", pixels=True),
    "mobilenet_v2_u8": torchvision_model("mobilenet_v2", pixels=True),
    "resnet50_u8": torchvision_model("resnet50", pixels=True),
    "vgg19_u8": torchvision_model("vgg19", pixels=True),
    "inception_v3_u8": torchvision_model(
        "inception_v3", side=299, pixels=True, aux_logits=True, init_weights=False
    ),
    "resnext50_u8": torchvision_model("resnext50_32x4d", pixels=True),
    "shufflenet_v2_u8": torchvision_model("shufflenet_v2_x1_0", pixels=True),
    "bert_base_cls": bert(12, 768, 12, first_only=True),
    # Small ones, for dry runs on a CPU; not part of the default set.
    "squeezenet": torchvision_model("squeezenet1_1", side=64),
    "bert_tiny": bert(2, 128, 2),
}
DEFAULT_MODELS = tuple(MODELS)[:8]


def export(name: str, path: Path) -> dict[str, Any]:
    """Write one model to `path`; the result says how far it is from torch's answer."""
    import torch

    torch.manual_seed(SEED)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 4))
    model, inputs, tensors = MODELS[name]()
    model.eval()
    # Names of each model's own: several perf_analyzers with shared memory name their regions by tensor.
    input_names = [f"{name}_{tensor}" for tensor in tensors]
    output_names = [f"{name}_output"]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            inputs,
            str(partial),
            input_names=input_names,
            output_names=output_names,
            dynamic_axes={tensor: {0: "batch"} for tensor in (*input_names, *output_names)},
            opset_version=OPSET,
            do_constant_folding=True,
            dynamo=False,
        )
        check = compare(model, inputs, input_names, partial)
    partial.rename(path)
    return {"model": name, "bytes": path.stat().st_size, "check": check}


def compare(model: Any, inputs: Any, input_names: Sequence[str], path: Path) -> str:
    """Compare with torch at a batch size the export did not see. Errors: ValueError when they differ."""
    try:
        import onnxruntime
    except ImportError:
        return "not compared: no onnxruntime"
    import numpy as np
    import torch

    rows = CHECK_ROWS + 1
    fresh = tuple(torch.cat([tensor, tensor[:1].flip(-1)])[:rows] for tensor in inputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    got = session.run(None, {name: t.numpy() for name, t in zip(input_names, fresh, strict=True)})[0]
    wanted = model(*fresh).numpy()
    error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    if got.shape[0] != rows or not error < TOLERANCE:
        raise ValueError(
            f"ONNX Runtime answers otherwise than torch (relative error {error:.2g}, {got.shape})"
        )
    return f"relative error {error:.1e}"


def export_all(folder: Path, names: Sequence[str], workers: int) -> list[str]:
    """Export in processes of their own, at most `workers` at once. Returns the names that failed."""
    waiting, running, failed = list(names), {}, []
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            path = folder / f"{name}.onnx"
            if path.exists():
                print(f"export {name}: there already", flush=True)
                continue
            command = [sys.executable, __file__, str(folder), "--one", name]
            running[name] = (
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT),
                time.time(),
            )
        for name, (process, started) in list(running.items()):
            if process.poll() is None and time.time() - started > TIMEOUT_S:
                process.kill()
            if process.poll() is not None:
                lines = process.stdout.read().decode(errors="replace").strip().splitlines() or ["no output"]
                print(f"export {name}: {time.time() - started:.0f} s, {lines[-1]}", flush=True)
                del running[name]
                if process.returncode:
                    failed.append(name)
        time.sleep(0.05)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--models", default=",".join(DEFAULT_MODELS), help="names, by comma: " + ", ".join(MODELS)
    )
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(export(options.one, options.folder / f"{options.one}.onnx")))
        return 0
    names = options.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    return 1 if export_all(options.folder, names, options.workers) else 0


if __name__ == "__main__":
    sys.exit(main())
