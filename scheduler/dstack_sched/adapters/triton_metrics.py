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

    def _sums(self, names: Collection[str]) -> dict[str, int]:
        try:
            with urllib.request.urlopen(self.url, timeout=TIMEOUT_S) as answer:  # noqa: S310  http only
                text = answer.read().decode("utf-8", "replace")
            return sums_by_model(text, names)
        except (urllib.error.URLError, OSError, ValueError, http.client.HTTPException):
            return {}


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
