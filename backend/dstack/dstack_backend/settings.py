"""What an instance is told by Triton (config.pbtxt and the instance), parsed once into a frozen record."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstack_backend.errors import ModelError

# Parameter of config.pbtxt -> what it means; README.md has the table with defaults.
PARAMETERS = {
    "gpu_percent": "share of the GPU (MPS) or of the cores, in (0, 100]",
    "slo_ms": "latency objective; 0 or absent: best effort",
    "batch_size": "planned rows of a batch, at most max_batch_size",
    "on_late": "serve or reject requests that are past their deadline",
    "execution_provider": "cuda or cpu; must fit the instance's kind",
    "model_file": "file name in the version directory",
    "prefetch": "batches that wait in the backend, the rest in Triton's queue; 0: see README",
    "cuda_graphs": "true or false",
    "conv_algo_search": "EXHAUSTIVE, HEURISTIC or DEFAULT",
    "conv_layout": "auto, nchw or nhwc",
    "tf32": "true or false",
    "gpu_memory_limit_mb": "bound of the device memory for the model's weights, buffers and graphs; 0: none",
    "levels": "off, auto, or GPU percentages by comma that a batch can be run at without a reload",
    "process_memory_limit_mb": "bound of the process's GPU memory, set by MPS; 0: none",
}
# Of Triton's onnxruntime backend: an adopted config keeps them, and they are no slips of ours.
ONNXRUNTIME_PARAMETERS = frozenset(
    {
        "arena_extend_strategy",
        "cudnn_conv_algo_search",
        "do_copy_in_default_stream",
        "enable_mem_arena",
        "enable_mem_pattern",
        "execution_mode",
        "gpu_mem_limit",
        "inter_op_thread_count",
        "intra_op_thread_count",
        "memory.enable_memory_arena_shrinkage",
        "session.use_device_allocator_for_initializers",
    }
)
CONV_SEARCHES = ("EXHAUSTIVE", "HEURISTIC", "DEFAULT")
CONV_LAYOUTS = ("auto", "nchw", "nhwc")
AUTO_LEVELS = (25.0, 50.0, 100.0)
LEVELS_DEFAULT = "off"  # or "auto": decision 0068 names the figure that decides. The controller reads this
MAX_LEVELS = 16
DEFAULT_MODEL_FILE = "model.onnx"
MAX_SLO_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Settings:
    """One instance. slo_us 0: best effort. device_id -1: a CPU instance. prefetch: in batches."""

    model: str
    version: str
    instance: str
    model_path: Path
    provider: str
    device_id: int
    max_batch_size: int
    batch_size: int
    gpu_percent: float = 100.0
    slo_us: int = 0
    reject_late: bool = False
    prefetch: float = 2.0
    cuda: Mapping[str, Any] = field(default_factory=dict)


def parse_settings(args: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """The settings of an instance from Triton's initialize() arguments, and warnings worth logging.

    Raises ModelError naming the model, the parameter, its value and what is wanted.
    """
    config = json.loads(args["model_config"])
    model = args["model_name"]
    texts, warnings = parameter_texts(config, model)
    read = _Reader(model, texts)
    max_batch_size = int(config.get("max_batch_size", 0))
    provider, device_id = _device(read, args["model_instance_kind"], int(args["model_instance_device_id"]))
    return (
        Settings(
            model=model,
            version=args["model_version"],
            instance=args["model_instance_name"],
            model_path=model_path(Path(args["model_repository"]) / args["model_version"], config, texts),
            provider=provider,
            device_id=device_id,
            max_batch_size=max_batch_size,
            batch_size=int(
                read.number("batch_size", max(1, max_batch_size), 1, max(1, max_batch_size), whole=True)
            ),
            gpu_percent=read.number("gpu_percent", 100, 0, 100, open_below=True),
            slo_us=round(read.number("slo_ms", 0, 0, MAX_SLO_MS) * 1000),
            reject_late=read.choice("on_late", "serve", ("serve", "reject")) == "reject",
            prefetch=read.number("prefetch", 2, 0, 64),
            cuda={
                "cuda_graphs": read.choice("cuda_graphs", "true", ("true", "false")) == "true",
                "tf32": read.choice("tf32", "true", ("true", "false")) == "true",
                "conv_algo_search": read.choice("conv_algo_search", "HEURISTIC", CONV_SEARCHES),
                "conv_layout": read.choice("conv_layout", "auto", CONV_LAYOUTS),
                "memory_limit_bytes": int(read.number("gpu_memory_limit_mb", 0, 0, 1 << 20)) << 20,
                "levels": read.levels(),
                "levels_needed": read.levels_text() != "auto",
                "process_memory_limit_bytes": int(read.number("process_memory_limit_mb", 0, 0, 1 << 20))
                << 20,
            },
        ),
        warnings,
    )


def parameter_texts(config: Mapping[str, Any], model: str) -> tuple[dict[str, str], list[str]]:
    """Our parameters as texts. A key close to one of ours is refused as a slip; others are left alone.

    Upper-case keys belong to Triton's Python backend, some others to its onnxruntime backend. Unknown ones
    may belong to other tools: a warning.
    """
    texts, warnings = {}, []
    for key, value in (config.get("parameters") or {}).items():
        if key in PARAMETERS:
            texts[key] = str(value.get("string_value", "")).strip()
            continue
        if key == key.upper() or key in ONNXRUNTIME_PARAMETERS:
            continue
        close = difflib.get_close_matches(key.lower(), PARAMETERS, n=1, cutoff=0.65)
        if close:
            raise ModelError(f"model {model!r}: unknown parameter {key!r}; did you mean {close[0]!r}?")
        warnings.append(f"model {model!r}: parameter {key!r} is not one of the dstack backend and is ignored")
    return texts, warnings


def model_path(version_dir: Path, config: Mapping[str, Any], texts: Mapping[str, str]) -> Path:
    """The model file of a version: parameter model_file, else default_model_filename, else model.onnx.

    As in Triton's onnxruntime backend it may be a directory, which holds a model.onnx and its data files.
    """
    name = texts.get("model_file") or config.get("default_model_filename") or DEFAULT_MODEL_FILE
    if Path(name).name != name:
        raise ModelError(f"model_file {name!r}: a file name in the version directory is wanted, not a path")
    path = version_dir / name
    return path / DEFAULT_MODEL_FILE if path.is_dir() else path


def _device(read: _Reader, kind: str, device_id: int) -> tuple[str, int]:
    """Provider and device of an instance: CUDA on a GPU instance, CPU on a CPU instance."""
    fitting = {"GPU": ("cuda", device_id), "CPU": ("cpu", -1)}
    kind = kind.removeprefix("KIND_")
    if kind not in fitting:
        raise ModelError(
            f"model {read.model!r}: instance kind {kind}: set kind: KIND_GPU or KIND_CPU in instance_group"
        )
    provider, device = fitting[kind]
    wanted = read.choice("execution_provider", provider, ("cuda", "cpu"))
    if wanted != provider:
        raise ModelError(
            f"model {read.model!r}: execution_provider {wanted!r} on a KIND_{kind} instance; set kind: "
            f"KIND_{'GPU' if wanted == 'cuda' else 'CPU'} in instance_group, or drop the parameter"
        )
    return provider, device


class _Reader:
    """Reads texts into values; every complaint names the model, the parameter and what is wanted."""

    def __init__(self, model: str, texts: Mapping[str, str]):
        self.model, self.texts = model, texts

    def number(
        self,
        key: str,
        default: float,
        low: float,
        high: float,
        *,
        whole: bool = False,
        open_below: bool = False,
    ) -> float:
        text = self.texts.get(key, "")
        if not text:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        fits = low <= value <= high and not (open_below and value == low) and not (whole and value % 1)
        if not fits:
            kind = "whole number" if whole else "number"
            raise ModelError(
                f"model {self.model!r}: parameter {key} is {text!r}; a {kind} in "
                f"{'(' if open_below else '['}{low:g}, {high:g}] is wanted"
            )
        return value

    def levels(self) -> tuple[float, ...]:
        """GPU percentages, rising; none for "off"."""
        text = self.levels_text()
        if text in ("", "off"):
            return ()
        if text == "auto":
            return AUTO_LEVELS
        try:
            levels = sorted({float(level) for level in text.split(",")})
        except ValueError:
            levels = []
        if not levels or not 0 < levels[0] <= levels[-1] <= 100 or len(levels) > MAX_LEVELS:
            raise ModelError(
                f"model {self.model!r}: parameter levels is {text!r}; off, auto, or at most {MAX_LEVELS} "
                f"numbers in (0, 100] by comma are wanted"
            )
        return tuple(levels)

    def levels_text(self) -> str:
        return self.texts.get("levels", LEVELS_DEFAULT).lower()

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        text = self.texts.get(key, "")
        by_lower = {choice.lower(): choice for choice in choices}
        if text and text.lower() not in by_lower:
            raise ModelError(
                f"model {self.model!r}: parameter {key} is {text!r}; one of {', '.join(choices)} is wanted"
            )
        return by_lower.get(text.lower(), default)
