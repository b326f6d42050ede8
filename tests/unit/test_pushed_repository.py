"""A repository that is elsewhere: what is read from the server, what waits for the next load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2

from dstack_sched.adapters.pushed_repository import PushedRepository
from dstack_sched.domain.model_config import ConfigChange, InstanceGroup
from dstack_sched.errors import InputError

IN_FORCE = """{"name": "m", "backend": "dstack", "runtime": "model.py", "max_batch_size": 8,
"input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["4"]}],
"dynamic_batching": {"priority_levels": "2"},
"instance_group": [{"name": "m_0", "kind": "KIND_CPU", "count": 1, "host_policy": "a"}]}"""


class Server:
    """What PushedRepository needs of a PushingClient; a load puts what was pushed in force."""

    url = "far-away:8001"

    def __init__(self) -> None:
        self.in_force = {"m": IN_FORCE}
        self.pushed: dict[str, str] = {}
        self.waiting: set[str] = set()

    def push(self, model: str, config: str) -> None:
        self.pushed[model] = config
        self.waiting.add(model)

    def load(self, model: str) -> None:
        self.in_force[model] = self.pushed[model]
        self.waiting.discard(model)

    def models(self) -> dict[str, str]:
        return {"m": "READY", "unloaded": "UNAVAILABLE"}

    def is_model_ready(self, model: str) -> bool:
        return model in self.in_force

    def config_message(self, model: str) -> model_config_pb2.ModelConfig:
        return json_format.Parse(self.in_force[model], model_config_pb2.ModelConfig())


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def repository(server: Server, tmp_path: Path) -> PushedRepository:
    return PushedRepository(server, tmp_path)  # type: ignore[arg-type]


def test_a_change_keeps_all_else_that_is_in_force(repository: PushedRepository, server: Server) -> None:
    change = ConfigChange(
        parameters={"gpu_percent": "40"}, preferred_batch_sizes=(4,), max_queue_delay_us=0,
        instance_groups=(InstanceGroup("KIND_GPU", 1, (0, 1)),),
    )  # fmt: skip
    repository.write_config("m", repository.edited("m", change))
    server.load("m")
    want = json.loads(IN_FORCE)
    want["parameters"] = {"gpu_percent": {"string_value": "40"}}
    want["dynamic_batching"]["preferred_batch_size"] = [4]
    want["instance_group"][0] |= {"kind": "KIND_GPU", "gpus": [0, 1]}
    assert json.loads(server.in_force["m"]) == want
    config = repository.config("m")
    assert (config.max_batch_size, config.parameters["gpu_percent"]) == (8, "40")
    assert config.instance_groups == (InstanceGroup("KIND_GPU", 1, (0, 1)),)


def test_several_groups_replace_one(repository: PushedRepository) -> None:
    groups = (InstanceGroup("KIND_GPU", 1, (0,)), InstanceGroup("KIND_GPU", 2, (1,)))
    text = repository.edited("m", ConfigChange(instance_groups=groups))
    assert [each["count"] for each in json.loads(text)["instance_group"]] == [1, 2]


def test_what_was_written_is_read_until_a_load_and_then_what_is_in_force(
    repository: PushedRepository, server: Server
) -> None:
    """Guards the journal: after a crash it tells by the text whether an edit was made."""
    before = repository.read_config("m")
    written = repository.edited("m", ConfigChange(parameters={"gpu_percent": "40"}))
    repository.write_config("m", written)
    assert repository.read_config("m") == written != before
    server.load("m")
    assert repository.read_config("m") == written
    server.in_force["m"] = IN_FORCE  # someone loads from the disk over there
    assert repository.read_config("m") == before


def test_each_newer_config_is_another_one(repository: PushedRepository, server: Server) -> None:
    """An equal config is no change to Triton, so a dead stub would stay dead."""
    seen = {repository.read_config("m")}
    for _ in range(3):
        repository.make_newer("m")
        server.load("m")
        seen.add(repository.read_config("m"))
    assert len(seen) == 4


def test_only_loaded_models_can_be_seen(repository: PushedRepository) -> None:
    assert repository.models() == ("m",)
    with pytest.raises(
        InputError, match=r"^Triton at far-away:8001: unloaded is not loaded, .* load it first"
    ):
        repository.config("unloaded")
    with pytest.raises(InputError, match="cannot be without a config"):
        repository.write_config("m", None)
