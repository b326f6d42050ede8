"""A scrape of a real endpoint, read by Prometheus' own parser."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from dstack_sched.domain.metrics import Kind, Metric


@dataclass(frozen=True)
class Scrape:
    """The families of one scrape."""

    families: tuple[Any, ...]

    def names(self) -> set[str]:
        """As in the table: counters with _total."""
        return {each.name + ("_total" if each.type == "counter" else "") for each in self.families}

    def samples(self, metric: Metric | str) -> list[Any]:
        name = metric if isinstance(metric, str) else metric.name
        return [
            sample
            for family in self.families
            for sample in family.samples
            if sample.name == name or (sample.name.startswith(name + "_") and family.name == name)
        ]

    def value(self, metric: Metric | str, **labels: str) -> float:
        """The one series with these labels; further labels may be there."""
        found = [
            each
            for each in self.samples(metric)
            if labels.items() <= each.labels.items() and "le" not in each.labels
        ]
        assert len(found) == 1, (metric, labels, found)
        return found[0].value

    def total(self, metric: Metric | str, **labels: str) -> float:
        """The sum over all series with these labels."""
        return sum(each.value for each in self.samples(metric) if labels.items() <= each.labels.items())

    def buckets(self, metric: Metric, **labels: str) -> list[tuple[float, float]]:
        """(upper bound, cumulative count) of a histogram."""
        return [
            (float(each.labels["le"]), each.value)
            for each in self.samples(metric)
            if "le" in each.labels and labels.items() <= each.labels.items()
        ]

    def check(self, metrics: tuple[Metric, ...]) -> None:
        """Names, kinds, help and labels are those of the table."""
        known = {metric.name: metric for metric in metrics}
        for family in self.families:
            metric = known[family.name + ("_total" if family.type == "counter" else "")]
            assert (family.type, family.documentation) == (metric.kind.value, metric.help)
            for sample in family.samples:
                bucket = {"le"} if metric.kind is Kind.HISTOGRAM else set()
                assert set(sample.labels) - bucket == set(metric.labels), sample


def scrape(url: str) -> Scrape:
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return Scrape(tuple(text_string_to_metric_families(answer.read().decode())))
