"""ports.ModelLook: a model's config, files and graph, seen with protobuf and with the backend's own code."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from dstack_backend.errors import BackendError
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.adapters.triton_client import message_to_dict
from dstack_sched.domain.adoption import ModelFacts, Suitability
from dstack_sched.errors import InputError, MachineError


class DiskModelLook:
    """Looks at the models of one repository. `check` reads whole model files, one at a time."""

    def __init__(self, repository: DiskRepository) -> None:
        self._repository = repository

    def facts(self, model: str) -> ModelFacts:
        folder = self._repository.model_dir(model)
        text = self._repository.read_config(model)
        stated = model_config_pb2.ModelConfig()
        # Bytes that are not UTF-8 do no harm in comments, and elsewhere name nothing that is there.
        readable = (text or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        try:
            text_format.Parse(readable, stated, allow_unknown_field=True)
        except text_format.ParseError as error:
            where = self._repository.config_path(model)
            raise InputError(f"{where}: is not a model config ({' '.join(str(error).split())})") from None
        folders = sorted(path for path in folder.iterdir() if path.is_dir())
        return ModelFacts(
            model,
            message_to_dict(stated),
            text,
            frozenset(path.name for path in folders[0].iterdir()) if folders else frozenset(),
            tuple(sorted(int(path.name) for path in folders if path.name.isdecimal())),
            tuple(sorted(path.name for path in folder.glob("configs/*.pbtxt"))),
        )

    def check(self, facts: ModelFacts, found: Suitability) -> None:
        try:
            from dstack_backend.instance import check_model
        except ImportError as error:
            raise MachineError(
                f"models are looked at with onnxruntime: pip install onnxruntime ({error})"
            ) from None
        parameters = {key: {"string_value": value} for key, value in found.parameters.items()}
        config = {
            **facts.config,
            "name": facts.name,
            "parameters": {**facts.config["parameters"], **parameters},
        }
        for version in found.versions:
            try:
                check_model(config, self._version_dir(facts.name, version))
            except BackendError as error:
                raise InputError(f"version {version}: {error}") from None

    def _version_dir(self, model: str, version: int) -> Path:
        """Triton reads 01 as version 1, too."""
        folders = self._repository.model_dir(model).iterdir()
        return next(path for path in folders if path.name.isdecimal() and int(path.name) == version)
