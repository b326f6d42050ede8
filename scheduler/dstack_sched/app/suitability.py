"""Which models of a repository can become dstack models, told from their configs and file names alone.

A pure function of what is there. What the model file itself has to say is the backend's own code's to check
(ports.ModelLook). Fields that onnxruntime's backend heeds and ours does not are either translated, or named
in a note where answers stay the same, or a reason to leave the model alone where they do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dstack_sched.domain.adoption import ModelFacts, Suitability
from dstack_sched.domain.model_config import BACKEND

ONNX_FILE = "model.onnx"
# What Triton looks for before model.onnx where a config names no backend (core, AutoCompleteBackendFields).
_EARLIER = {"model.savedmodel": "tensorflow", "model.graphdef": "tensorflow", "model.plan": "tensorrt"}
_LATER = {"model.xml": "openvino", "model.pt": "pytorch", "model.py": "python"}
_MIB = 1 << 20
_MAX_LIMIT_MIB = 1 << 20

# Parameters of onnxruntime's backend that our sessions do not have, and what holds instead.
_UNUSED = {
    "intra_op_thread_count": "threads follow gpu_percent",
    "inter_op_thread_count": "nodes run one after another",
    "execution_mode": "nodes run one after another",
    "enable_mem_arena": "the arena is on",
    "enable_mem_pattern": "memory patterns are on",
    "memory.enable_memory_arena_shrinkage": "the arena keeps its size",
    "session.use_device_allocator_for_initializers": "weights are allocated by the arena",
    "arena_extend_strategy": "the arena grows as onnxruntime's default does",
    "do_copy_in_default_stream": "copies have streams of their own",
}
_SEARCHES = {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"}


def suitability(model: ModelFacts, *, without_accelerators: bool = False) -> Suitability:
    """One model. without_accelerators: those that run on TensorRT or OpenVINO now are taken, too."""
    config = model.config
    if config["backend"] == BACKEND:
        return Suitability("already", "it is a dstack model")
    why = (
        _other_scheduler(config)
        or _other_backend(model)
        or _beyond_us(model)
        or ("" if without_accelerators else _accelerated(config))
    )
    versions = served_versions(config, model.versions)
    if not why and not versions:
        why = "it has no version directory that its version policy serves"
    if why:
        return Suitability("leave", why)
    parameters = _translated(config)
    return Suitability("adopt", "", tuple(_notes(model, parameters)), parameters, versions)


def served_versions(config: Mapping[str, Any], versions: tuple[int, ...]) -> tuple[int, ...]:
    """The versions that Triton loads under a config's version policy (default: the latest one), ascending."""
    policy = config.get("version_policy") or {}
    present = sorted(versions)
    if "all" in policy:
        return tuple(present)
    if "specific" in policy:
        wanted = set(policy["specific"]["versions"])
        return tuple(version for version in present if version in wanted)
    newest = max(1, int((policy.get("latest") or {}).get("num_versions") or 1))
    return tuple(present[-newest:])


def _other_scheduler(config: Mapping[str, Any]) -> str:
    if "ensemble_scheduling" in config or config["platform"] == "ensemble":
        return "an ensemble: it stays, and works over adopted models as before"
    if "sequence_batching" in config:
        return (
            "sequence_batching: requests of a sequence are bound to one instance, D-STACK batches them freely"
        )
    return ""


def _other_backend(model: ModelFacts) -> str:
    backend, platform = model.config["backend"], model.config["platform"]
    named = backend or platform
    if named in ("onnxruntime", "onnxruntime_onnx"):
        return ""
    if named == "python":
        return 'backend "python": it stays; models that it calls (BLS) may be adopted, their names stay'
    if named:
        return f'backend "{named}": only onnxruntime models can be adopted'
    stated_file = model.config["default_model_filename"]
    if stated_file:
        return "" if stated_file == ONNX_FILE else f"names no backend, and {stated_file} tells none"
    for file, found in _EARLIER.items():
        if file in model.first_files:
            return f"names no backend, and {file} makes it one of {found}"
    if ONNX_FILE in model.first_files:
        return ""
    found = next((backend for file, backend in _LATER.items() if file in model.first_files), "")
    if found:
        return f"names no backend, and its files make it one of {found}"
    return f"names no backend and has no {ONNX_FILE}"


def _beyond_us(model: ModelFacts) -> str:
    """The first thing that a config asks for and the dstack backend cannot do."""
    config = model.config
    if config["name"] not in ("", model.name):
        return f"its config names it {config['name']!r}, its directory {model.name!r}: Triton refuses it"
    if (config.get("model_transaction_policy") or {}).get("decoupled"):
        return "model_transaction_policy: decoupled models answer any number of times, D-STACK once"
    if config["runtime"]:
        return f'runtime "{config["runtime"]}": a build of the backend of its own'
    if config["cc_model_filenames"]:
        return "cc_model_filenames: the file depends on the kind of GPU, the dstack backend takes one file"
    if (config.get("model_operations") or {}).get("op_library_filename"):
        return "model_operations: custom operators from a library, which the dstack backend does not load"
    if config["batch_input"] or config["batch_output"]:
        return "batch_input or batch_output: ragged batching, which the dstack backend does not do"
    for tensor in config["input"]:
        if tensor["allow_ragged_batch"]:
            return f"input {tensor['name']!r}: allow_ragged_batch, which the dstack backend does not do"
    for tensor in (*config["input"], *config["output"]):
        for field in ("is_shape_tensor", "is_non_linear_format_io"):
            if tensor.get(field):
                return f"tensor {tensor['name']!r}: {field} belongs to TensorRT"
    for group in config["instance_group"]:
        if group["kind"] == "KIND_MODEL":
            return "instance_group: KIND_MODEL leaves the device to the model; set KIND_GPU or KIND_CPU first"
        if group["secondary_devices"]:
            return "instance_group: secondary_devices (DLA), which the dstack backend does not use"
    return _checksummed(config)


def _checksummed(config: Mapping[str, Any]) -> str:
    agents = (config.get("model_repository_agents") or {}).get("agents", ())
    for agent in agents:
        for key in agent["parameters"]:
            if "config.pbtxt" in key:
                return (
                    f"repository agent {agent['name']!r} has a checksum of config.pbtxt, which would change"
                )
    return ""


def _kinds(config: Mapping[str, Any]) -> set[str]:
    return {group["kind"] for group in config["instance_group"]} or {"KIND_AUTO"}


def _accelerators(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Those of the kinds of instances that the model may have."""
    stated = (config.get("optimization") or {}).get("execution_accelerators") or {}
    kinds = _kinds(config)
    if kinds != {"KIND_CPU"}:
        yield from stated.get("gpu_execution_accelerator", ())
    if kinds != {"KIND_GPU"}:
        yield from stated.get("cpu_execution_accelerator", ())


def _accelerated(config: Mapping[str, Any]) -> str:
    for accelerator in _accelerators(config):
        if accelerator["name"] != "cuda":
            return (
                f"execution accelerator {accelerator['name']!r}: it would run on the plain CUDA or CPU "
                "provider; --without-accelerators adopts it all the same"
            )
    return ""


def _translated(config: Mapping[str, Any]) -> dict[str, str]:
    """Our parameters for what the config asks of the CUDA provider; those that are stated already stay."""
    if _kinds(config) == {"KIND_CPU"}:
        return {}
    asked = {key: value["string_value"] for key, value in config["parameters"].items()}
    search = _SEARCHES.get(asked.get("cudnn_conv_algo_search", ""), "")
    options = {"gpu_mem_limit": asked.get("gpu_mem_limit", "")}
    for accelerator in _accelerators(config):
        if accelerator["name"] == "cuda":
            options |= accelerator["parameters"]
    search = search or options.get("cudnn_conv_algo_search", "")
    limit = options["gpu_mem_limit"]
    found = {
        "conv_algo_search": search if search in _SEARCHES.values() else "",
        "gpu_memory_limit_mb": _mebibytes(int(limit)) if limit.isdecimal() else "",
        "tf32": {"0": "false", "1": "true"}.get(options.get("use_tf32", ""), ""),
    }
    return {key: value for key, value in found.items() if value and key not in asked}


def _mebibytes(limit_bytes: int) -> str:
    """A bound in whole MiB, rounded up; none where it is none (0, or all the memory there could be)."""
    mebibytes = -(-limit_bytes // _MIB)
    return str(mebibytes) if 0 < mebibytes < _MAX_LIMIT_MIB else ""


def _notes(model: ModelFacts, parameters: Mapping[str, str]) -> Iterator[str]:
    config = model.config
    for key, instead in _UNUSED.items():
        if key in config["parameters"]:
            yield f"parameter {key} is onnxruntime's and stays without effect: {instead}"
    for key, value in parameters.items():
        yield f"{key} {value} says what its config asks of onnxruntime's CUDA provider"
    for accelerator in _accelerators(config):
        if accelerator["name"] != "cuda":
            yield f"execution accelerator {accelerator['name']!r} stays without effect"
    if not config["max_batch_size"] and not (config["input"] and config["output"]):
        yield "max_batch_size is not stated: it becomes the dstack backend's default, not onnxruntime's"
    if any(tensor["data_type"] == "TYPE_STRING" for tensor in config["input"]):
        yield "text that is not UTF-8 is refused"
    if ((config.get("optimization") or {}).get("graph") or {}).get("level"):
        yield "optimization.graph.level stays without effect: all graph optimizations are on"
    for agent in (config.get("model_repository_agents") or {}).get("agents", ()):
        yield f"repository agent {agent['name']!r} goes on working on the model's files"
    if model.other_configs:
        yield (
            f"configs/ holds {', '.join(model.other_configs)}: a Triton with --model-config-name reads that "
            "one, which is not changed"
        )
