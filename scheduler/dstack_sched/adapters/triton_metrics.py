"""What waits in Triton, from its Prometheus endpoint: the control API does not tell."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 1.0
WAITING = {"nv_inference_pending_request_count": "model", "dstack_waiting_rows": "model"}


class TritonMetrics:
    """Triton's metrics at HOST:PORT. Nothing fails: an endpoint that is not there shows nothing."""

    def __init__(self, address: str) -> None:
        self.url = f"http://{address}/metrics"

    def waiting(self) -> dict[str, int]:
        """Model -> what waits in Triton's queue and in the backend's."""
        try:
            with urllib.request.urlopen(self.url, timeout=TIMEOUT_S) as answer:  # noqa: S310  http only
                text = answer.read().decode("utf-8", "replace")
            return parse_waiting(text)
        except (urllib.error.URLError, OSError, ValueError, http.client.HTTPException):
            return {}


def parse_waiting(text: str) -> dict[str, int]:
    """Model -> requests in Triton's queue plus rows in the backend's, from the text of /metrics.

    Errors: ValueError where it is not in Prometheus' format.
    """
    found: dict[str, int] = {}
    for family in text_string_to_metric_families(text):
        label = WAITING.get(family.name)
        if label is None:
            continue
        for sample in family.samples:
            model = sample.labels.get(label)
            if model:
                found[model] = found.get(model, 0) + int(sample.value)
    return found
