"""Prometheus endpoints of the verbs, wired: options, the arbiter's status as a collector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from prometheus_client import CollectorRegistry

from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.prometheus import MetricsEndpoint, PrometheusMetrics, Snapshots
from dstack_sched.app.arbiter_metrics import down, samples
from dstack_sched.cli.options import Verb, grouped, option
from dstack_sched.domain.metrics import Sample
from dstack_sched.errors import DstackError, InputError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """Where to serve metrics. port None: nowhere; 0: any free one. Errors: InputError."""

    port: int | None = None
    address: str = LOOPBACK

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port < 65536:
            raise InputError(f"--metrics-port {self.port}: a port in 0..65535 is wanted (0: any free one)")


_OPTIONS = (
    option(
        "metrics_port", int | None, None,
        typer.Option("--metrics-port", metavar="PORT", help="Serve Prometheus metrics; 0: at any free port."),
    ),
    option(
        "metrics_address", str, LOOPBACK,
        typer.Option("--metrics-address", metavar="ADDRESS", help="Where to; 0.0.0.0: to everybody."),
    ),
)  # fmt: skip


def exports(verb: Verb) -> Verb:
    """A verb's parameter `metrics: EndpointOptions` becomes --metrics-port and --metrics-address."""
    return grouped(
        verb,
        "metrics",
        _OPTIONS,
        lambda metrics_port, metrics_address: EndpointOptions(metrics_port, metrics_address),
    )


def arbiter_samples(socket: Path) -> Callable[[], tuple[Sample, ...]]:
    """Reads the arbiter at a socket, one status a call; one that does not answer is down, not an error."""

    def read() -> tuple[Sample, ...]:
        try:
            with closing(SocketArbiterClient(socket)) as client:
                return tuple(samples(client.request("status")))
        except DstackError:
            return down()

    return read


def serve_arbiter_metrics(socket: Path, options: EndpointOptions) -> MetricsEndpoint:
    """Serve the metrics of the arbiter at a socket. Errors: MachineError where it cannot listen."""
    registry = CollectorRegistry()
    registry.register(Snapshots(arbiter_samples(socket)))
    return MetricsEndpoint(registry, options.port or 0, options.address)


@contextmanager
def served(
    metrics: PrometheusMetrics, options: EndpointOptions, *more: Callable[[], Iterable[Sample]]
) -> Iterator[str | None]:
    """Serve metrics while the block runs, and what each of `more` reads at a scrape. Gives the URL; None
    where no endpoint is wanted. Errors: MachineError where it cannot listen."""
    for read in more:
        metrics.registry.register(Snapshots(read))
    if options.port is None:
        yield None
        return
    endpoint = MetricsEndpoint(metrics.registry, options.port, options.address)
    try:
        yield endpoint.url
    finally:
        endpoint.close()
