"""What waits and is prepared in Triton, from its Prometheus endpoint: the control API does not tell."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Collection

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 1.0
WAITING = ("nv_inference_pending_request_count", "dstack_waiting_rows")
PREPARING = ("dstack_preparing_programs",)
STAGES = ("dstack_stage_seconds", "dstack_stage_samples")  # counters, whose families go without "_total"


class TritonMetrics:
    """Triton's metrics at HOST:PORT. Nothing fails: an endpoint that is not there shows nothing."""

    def __init__(self, address: str) -> None:
        self.url = f"http://{address}/metrics"

    def waiting(self) -> dict[str, int]:
        """Model -> what waits in Triton's queue (requests) and in the backend's (rows)."""
        return self._sums(WAITING)

    def preparing(self) -> dict[str, int]:
        """Model -> CUDA programs that its instances still make."""
        return self._sums(PREPARING)

    def stages(self) -> dict[str, dict[str, tuple[float, int]]]:
        """Model -> stage of a batch -> (seconds, batches) so far; a second old at most."""
        try:
            return stages_by_model(self._text())
        except (urllib.error.URLError, OSError, ValueError, http.client.HTTPException):
            return {}

    def _sums(self, names: Collection[str]) -> dict[str, int]:
        try:
            return sums_by_model(self._text(), names)
        except (urllib.error.URLError, OSError, ValueError, http.client.HTTPException):
            return {}

    def _text(self) -> str:
        with urllib.request.urlopen(self.url, timeout=TIMEOUT_S) as answer:  # noqa: S310  http only
            return str(answer.read().decode("utf-8", "replace"))


def stages_by_model(text: str) -> dict[str, dict[str, tuple[float, int]]]:
    """As TritonMetrics.stages, from the text of /metrics, summed over versions and instances.

    Errors: ValueError where it is not in Prometheus' format.
    """
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for family in text_string_to_metric_families(text):
        if family.name not in STAGES:
            continue
        for sample in family.samples:
            stages = found.setdefault(sample.labels["model"], {})
            seconds, count = stages.get(sample.labels["stage"], (0.0, 0))
            if family.name == STAGES[0]:
                seconds += sample.value
            else:
                count += int(sample.value)
            stages[sample.labels["stage"]] = (seconds, count)
    return found


def sums_by_model(text: str, names: Collection[str]) -> dict[str, int]:
    """Model -> sum of the metrics so named over its versions and instances, from the text of /metrics.

    Errors: ValueError where it is not in Prometheus' format.
    """
    found: dict[str, int] = {}
    for family in text_string_to_metric_families(text):
        if family.name not in names:
            continue
        for sample in family.samples:
            model = sample.labels.get("model")
            if model:
                found[model] = found.get(model, 0) + int(sample.value)
    return found
