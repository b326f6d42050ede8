"""What there is to profile: an ONNX file, a model directory, or a whole model repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from dstack_sched.errors import InputError

DEFAULT_FILE = "model.onnx"
ONNX_BACKENDS = ("", "dstack", "onnxruntime", "onnxruntime_onnx")


@dataclass(frozen=True)
class ModelFile:
    """A model to measure. shapes: input -> dimensions without the batch, where stated; with max_batch_size 0
    the model is served without a batch dimension, and shapes hold all dimensions. None: not stated."""

    name: str
    path: Path
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    max_batch_size: int | None = None


def find_models(targets: Sequence[Path], only: Sequence[str] = ()) -> list[ModelFile]:
    """The models that the targets name, in order, each name once. only: keep these names.

    Of a repository, models of other backends (ensembles, Python models) are none of ours and left out.
    Errors: InputError for a target that is none of the three, a broken config, or two models of one name.
    """
    found: dict[str, ModelFile] = {}
    for target in targets:
        for model in _models_at(target, only):
            if model.name in found and found[model.name].path.resolve() != model.path.resolve():
                raise InputError(
                    f"{model.path}: there is another model named {model.name}; profile one at a time"
                )
            found[model.name] = model
    for name in only:
        if name not in found:
            there = [each for target in targets for each in _names_at(target)]
            raise InputError(f"no model named {name!r} there; the models are {', '.join(there)}")
    return [model for name, model in found.items() if not only or name in only]


def _models_at(target: Path, only: Sequence[str]) -> list[ModelFile]:
    if target.is_file():
        name = (
            target.parent.parent.name if target.name == DEFAULT_FILE and target.parent.name.isdigit() else ""
        )
        return [_model_in(target.parent.parent) if name else ModelFile(target.stem, target)]
    if not target.is_dir():
        raise InputError(f"{target}: no such file or directory; name an ONNX file, a model or a repository")
    if _is_model(target):
        return [_model_in(target)]
    folders = _folders_in(target)
    models = [
        _model_in(folder)
        for folder in folders
        if (folder.name in only if only else _is_onnx(_stated(folder)))
    ]
    if not models and not (only and folders):
        raise InputError(
            f"{target}: holds no model (NAME/1/{DEFAULT_FILE}); name an ONNX file, a model or a repository"
        )
    return models


def _folders_in(repository: Path) -> list[Path]:
    return [folder for folder in sorted(repository.iterdir()) if folder.is_dir() and _is_model(folder)]


def _names_at(target: Path) -> list[str]:
    if target.is_dir() and not _is_model(target):
        return [folder.name for folder in _folders_in(target)]
    return [model.name for model in _models_at(target, ())]


def _is_model(folder: Path) -> bool:
    return (folder / "config.pbtxt").is_file() or _version(folder) is not None


def _version(folder: Path) -> Path | None:
    """The highest version directory of a model, None where it has none."""
    versions = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    return max(versions, key=lambda path: int(path.name), default=None)


def _stated(folder: Path) -> model_config_pb2.ModelConfig:
    """What the config of a model states; nothing where there is none. Bytes that are no UTF-8 do no harm."""
    config, stated = folder / "config.pbtxt", model_config_pb2.ModelConfig()
    if config.is_file():
        try:
            text = config.read_text(encoding="utf-8", errors="replace")
            text_format.Parse(text, stated, allow_unknown_field=True)
        except text_format.ParseError as error:
            raise InputError(f"{config}: is not a model config ({error})") from None
    return stated


def _is_onnx(stated: model_config_pb2.ModelConfig) -> bool:
    return (stated.backend or stated.platform) in ONNX_BACKENDS


def _model_in(folder: Path) -> ModelFile:
    stated = _stated(folder)
    version = _version(folder)
    if version is None:
        raise InputError(f"{folder}: has no version directory; put the model into {folder}/1/{DEFAULT_FILE}")
    parameters = {key: value.string_value for key, value in stated.parameters.items()}
    file = parameters.get("model_file") or stated.default_model_filename or DEFAULT_FILE
    path = version / file
    if path.is_dir():  # as Triton's onnxruntime backend takes it: model.onnx with its data files
        path = path / DEFAULT_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; put the model there or name it with parameter model_file")
    shapes = {
        tensor.name: tuple(tensor.dims) for tensor in stated.input if tensor.dims and min(tensor.dims) > 0
    }
    # 0 is also what a config says that leaves the size to the backend; one that states inputs means it.
    unstated = stated.max_batch_size == 0 and not stated.input
    return ModelFile(folder.name, path, shapes, None if unstated else stated.max_batch_size)
