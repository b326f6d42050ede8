"""ports.ModelRepository of a Triton whose repository is not visible here: configs travel with the load call.

A config is read from the server, as it is in force (completed fields included), and written by handing it to
the next load in place of the one on disk. So it replaces that one as a whole; it does not survive a restart
of the server; and a load without it is ignored until a file over there is newer. Texts are JSON, as Triton
takes them.

    client = PushingClient(connection)
    repository = PushedRepository(client, state / "pushed")
    repository.write_config("resnet50", text)
    client.load("resnet50")                            # loads with the text
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2

from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.domain.model_config import ConfigChange, InstanceGroup, ModelConfig
from dstack_sched.errors import InputError

# Upper-case parameters are nobody's in the backend; a new value makes an equal config a new one.
RELOAD_PARAMETER = "DSTACK_RELOADS"
_SCHEDULERS = ("sequence_batching", "ensemble_scheduling")


class PushingClient(TritonClient):
    """A TritonClient whose loads carry the configs that were pushed, each until the next one is.

    waiting: the models whose config no load has put in force yet.
    """

    def __init__(self, connection: ConnectionOptions | str) -> None:
        super().__init__(connection)
        self.pushed: dict[str, str] = {}
        self.waiting: set[str] = set()

    def push(self, model: str, config: str) -> None:
        self.pushed[model] = config
        self.waiting.add(model)

    def load(self, model: str, config: str | None = None) -> None:
        super().load(model, config or self.pushed.get(model))
        self.waiting.discard(model)


class PushedRepository:
    """The models that a server has loaded. `folder` is ours: journals and locks need a directory.

    Raises InputError for a model that is not loaded: only of loaded ones the server tells the config.
    """

    def __init__(self, client: PushingClient, folder: Path) -> None:
        self._client = client
        self.name = f"Triton at {client.url}"
        self.root = folder / re.sub(r"[^A-Za-z0-9.-]", "_", client.url)
        self.root.mkdir(parents=True, exist_ok=True)

    def models(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, state in self._client.models().items() if state == "READY"))

    def config_path(self, model: str) -> Path:
        """A name for messages, no place."""
        return Path(f"{self._client.url}/{model}")

    def read_config(self, model: str) -> str | None:
        """What was written last, until a load has put it in force; then what is in force."""
        if model in self._client.waiting:
            return self._client.pushed[model]
        return _text(self._message(model))

    def write_config(self, model: str, text: str | None) -> None:
        if text is None:
            raise InputError(f"{self.name}: {model} cannot be without a config")
        self._client.push(model, text)

    def config(self, model: str) -> ModelConfig:
        config = self._message(model)
        batching = config.dynamic_batching
        return ModelConfig(
            backend=config.backend,
            platform=config.platform,
            max_batch_size=config.max_batch_size,
            parameters={key: value.string_value for key, value in config.parameters.items()},
            preferred_batch_sizes=tuple(batching.preferred_batch_size),
            max_queue_delay_us=batching.max_queue_delay_microseconds,
            dynamic_batching=config.HasField("dynamic_batching"),
            instance_groups=tuple(
                InstanceGroup(_kinds().Name(each.kind), each.count, tuple(each.gpus))
                for each in config.instance_group
            ),
            scheduler=next((name for name in _SCHEDULERS if config.HasField(name)), ""),
        )

    def edited(self, model: str, change: ConfigChange) -> str:
        config = self._message(model)
        change_message(config, change)
        return _text(config)

    def check_writable(self, model: str) -> None:
        """The server is not asked: a load that it refuses changes nothing."""

    def make_newer(self, model: str) -> None:
        """The next load of the model is a full one, with the config that is in force."""
        config = self._message(model)
        count = config.parameters[RELOAD_PARAMETER].string_value
        config.parameters[RELOAD_PARAMETER].string_value = str(int(count) + 1 if count.isdecimal() else 1)
        self._client.push(model, _text(config))

    def sweep(self) -> None:
        """Nothing is left lying at a server."""

    def drop_unneeded_originals(self) -> None:
        """No model is adopted this way: adopt where the repository is."""

    def _message(self, model: str) -> model_config_pb2.ModelConfig:
        if not self._client.is_model_ready(model):
            raise InputError(
                f"{self.name}: {model} is not loaded, so its config cannot be seen; load it first, or name "
                "the repository"
            )
        return self._client.config_message(model)


def change_message(config: model_config_pb2.ModelConfig, change: ConfigChange) -> None:
    """Make the change on a message, as config_pbtxt.edit_config does on a text. Raises InputError."""
    if change.backend is not None:
        config.backend = change.backend
    if change.max_batch_size is not None:
        config.max_batch_size = change.max_batch_size
    if change.preferred_batch_sizes is not None or change.max_queue_delay_us is not None:
        other = next((name for name in _SCHEDULERS if config.HasField(name)), "")
        if other:
            raise InputError(f"{config.name}: {other} is set: a model has one scheduler")
        config.dynamic_batching.SetInParent()
    if change.preferred_batch_sizes is not None:
        config.dynamic_batching.preferred_batch_size[:] = change.preferred_batch_sizes
    if change.max_queue_delay_us is not None:
        config.dynamic_batching.max_queue_delay_microseconds = change.max_queue_delay_us
    if change.instance_groups is not None:
        _set_groups(config, change.instance_groups)
    for key, value in change.parameters.items():
        if value is None:
            config.parameters.pop(key, None)
        else:
            config.parameters[key].string_value = value


def _set_groups(config: model_config_pb2.ModelConfig, groups: tuple[InstanceGroup, ...]) -> None:
    """One group that stays one keeps its other fields."""
    if len(groups) != 1 or len(config.instance_group) != 1:
        del config.instance_group[:]
        entries = [config.instance_group.add() for _ in groups]
    else:
        entries = list(config.instance_group)
    for entry, group in zip(entries, groups, strict=True):
        entry.kind = _kinds().Value(group.kind)
        entry.count = group.count
        entry.gpus[:] = group.gpus


def _kinds() -> Any:
    return model_config_pb2.ModelInstanceGroup.Kind


def _text(config: model_config_pb2.ModelConfig) -> str:
    return json_format.MessageToJson(config, preserving_proto_field_name=True, indent=None, sort_keys=True)
