"""A running Triton over gRPC: ports.ModelServer. HTTP loads can stall inference, so control is gRPC only."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tritonclient.grpc as triton
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.domain.fault import NO_STREAM
from dstack_sched.domain.served_model import READY, ServedModel
from dstack_sched.errors import MachineError, ServerError

CALL_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 600.0  # large models read their weights here
STATES = ("UNAVAILABLE", "UNLOADING", "LOADING", "READY")
# A server that was away for minutes is found again within seconds (gRPC's own limit is two minutes). The
# sizes are those that tritonclient sets by itself.
CHANNEL_ARGUMENTS = [
    ("grpc.max_send_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
    ("grpc.max_receive_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
T = TypeVar("T")


class TritonClient:
    """One connection; safe to use from several threads. Close it, or use it as a context manager.

    A text is the HOST:PORT of a gRPC endpoint that needs neither headers nor TLS. Errors: ServerError with
    Triton's own words.
    """

    def __init__(self, connection: ConnectionOptions | str) -> None:
        options = ConnectionOptions(connection) if isinstance(connection, str) else connection
        self.options = options
        self.url = options.url
        self._headers = dict(options.headers) or None
        self._client = triton.InferenceServerClient(
            options.url,
            ssl=options.encrypted,
            root_certificates=_text(options.tls_ca),
            private_key=_text(options.tls_key),
            certificate_chain=_text(options.tls_cert),
            channel_args=CHANNEL_ARGUMENTS,
        )

    def __enter__(self) -> TritonClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def require_ready(self) -> None:
        """Errors: MachineError when no Triton answers there, or it refuses us.

        Live is enough: one model that failed to load makes Triton say that it is not ready as a whole, and
        mending that takes a controller.
        """
        try:
            live = self._client.is_server_live(headers=self._headers, client_timeout=CALL_TIMEOUT_S)
        except InferenceServerException as error:
            raise MachineError(_why_not_ready(error, self.options)) from error
        if not live:
            raise MachineError(f"Triton at {self.url} answers but is not live; look at its log")

    def is_ready(self) -> bool:
        """Whether the server answers and is ready; never raises."""
        try:
            return bool(self._client.is_server_ready(headers=self._headers, client_timeout=CALL_TIMEOUT_S))
        except InferenceServerException:
            return False

    def metadata(self) -> dict[str, Any]:
        """Server name, version, extensions."""
        return self._ask("server metadata", self._client.get_server_metadata)

    def models(self) -> dict[str, str]:
        """Model -> state of its best version: READY, LOADING, UNLOADING, UNAVAILABLE (or never loaded)."""
        return {model: served.state for model, served in self.index().items()}

    def index(self) -> dict[str, ServedModel]:
        """All models of the repository; a model of several versions is as well as its best one."""
        answer = self._call("the repository index", self._client.get_model_repository_index, CALL_TIMEOUT_S)
        found: dict[str, ServedModel] = {}
        for entry in answer.models:
            state = entry.state or "UNAVAILABLE"
            known = found.get(entry.name, ServedModel(state, entry.reason))
            best = max(known.state, state, key=STATES.index)
            reason = known.reason or entry.reason
            found[entry.name] = ServedModel(best, reason, known.ready_versions + (state == READY))
        return found

    def is_model_ready(self, model: str) -> bool:
        """Whether the model can take requests; False for an unknown one."""
        try:
            return bool(
                self._client.is_model_ready(model, headers=self._headers, client_timeout=CALL_TIMEOUT_S)
            )
        except InferenceServerException:
            return False

    def config(self, model: str) -> dict[str, Any]:
        """The configuration in force, auto-completed fields included. Enums are names, int64 are ints."""
        return dict(self._ask(f"{model}: config", self._client.get_model_config, model)["config"])

    def config_message(self, model: str) -> model_config_pb2.ModelConfig:
        """The same as protobuf has it."""
        answer = self._call(f"{model}: config", self._client.get_model_config, CALL_TIMEOUT_S, model)
        return answer.config

    def statistics(self, model: str = "") -> dict[str, Any]:
        """{"model_stats": [one entry a model and version]}; durations in ns. No name: all models."""
        return self._ask(f"{model}: statistics", self._client.get_inference_statistics, model)

    def load(self, model: str, config: str | None = None) -> None:
        """Load or reload; returns when the new version serves. A failed load leaves the old one.

        config: a whole config as JSON in place of the one on disk, until a file there is newer or the server
        restarts; None: from disk.
        """
        self._call(f"{model}: load", partial(self._client.load_model, config=config), LOAD_TIMEOUT_S, model)

    def unload(self, model: str) -> None:
        """Stop serving; returns before the model is gone from memory."""
        self._call(f"{model}: unload", self._client.unload_model, LOAD_TIMEOUT_S, model)

    def takes_loads(self) -> bool:
        """Whether it is in explicit model control, found out by unloading a model that there cannot be."""
        try:
            self.unload("dstackctl-asks-for-the-control-mode")
        except ServerError as error:
            if "explicit model load / unload is not allowed" in str(error):
                return False
            if "restricted" in str(error):
                raise
        return True

    def _ask(self, what: str, call: Callable[..., Message], *args: Any) -> dict[str, Any]:
        return message_to_dict(self._call(what, call, CALL_TIMEOUT_S, *args))

    def _call(self, what: str, call: Callable[..., T], timeout_s: float, *args: Any) -> T:
        try:
            return call(*args, headers=self._headers, client_timeout=timeout_s)
        except InferenceServerException as error:
            words = one_line(error)
            if re.search(NO_STREAM, words):
                words += " (Triton has lost its own CUDA context: start it again, as `dstackctl serve` does)"
            raise ServerError(f"Triton at {self.url}: {what} failed: {words}") from error


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _why_not_ready(error: InferenceServerException, options: ConnectionOptions) -> str:
    """What stands in the way, with its mend."""
    words = one_line(error)
    if "restricted" in words:
        return f"Triton at {options.url} refuses: {words}; give it with --header KEY=VALUE"
    if error.status() != "StatusCode.UNAVAILABLE":
        return f"Triton at {options.url} refuses: {words}"
    if options.encrypted and re.search("ssl|handshake|certificate", words, re.IGNORECASE):
        return (
            f"no TLS with {options.url}: {words}; check --tls-ca, --tls-cert and --tls-key, or leave TLS out"
        )
    return (
        f"no Triton answers at {options.url} (gRPC); start one (dstackctl serve) or give --url HOST:PORT"
        f"{'' if options.encrypted else ' (and --tls, if it wants that)'}"
    )


def one_line(error: InferenceServerException) -> str:
    """Triton's message without line breaks."""
    return " ".join(str(error.message() or error).split())


def message_to_dict(message: Message) -> dict[str, Any]:
    """A protobuf message as plain values: defaults included, enums by name, int64 as int (not text)."""
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            result[field.name] = {key: plain(value[key]) for key in value}
        elif is_repeated(field):
            result[field.name] = [plain(each, field) for each in value]
        elif field.message_type is None or message.HasField(field.name):
            result[field.name] = plain(value, field)
    return result


def is_repeated(field: FieldDescriptor) -> bool:
    """`label` is deprecated in newer protobuf, `is_repeated` absent in older."""
    repeated = getattr(field, "is_repeated", None)
    return bool(repeated if repeated is not None else field.label == FieldDescriptor.LABEL_REPEATED)


def plain(value: Any, field: FieldDescriptor | None = None) -> Any:
    if isinstance(value, Message):
        return message_to_dict(value)
    if field is not None and field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    return value
