"""What a replica tells Prometheus, and the figures of several replicas as one page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Metrics", "merged"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The figures of one replica.

    Args:
        replica: its name, a label of every figure.
        layers: decoder layers, the deepest exit.
    """

    def __init__(self, replica: str, layers: int) -> None:
        self.registry = CollectorRegistry()

        def made(kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **settings: Any) -> Any:
            metric = kind(f"river_{name}", text, ("replica", *labels), registry=self.registry, **settings)
            return metric if labels else metric.labels(replica)

        self._requests = made(Counter, "requests", "Requests that have ended.", ("outcome",))
        self._replica = replica
        self.prompt_tokens = made(Counter, "prompt_tokens", "Tokens read.")
        self.generated_tokens = made(Counter, "generated_tokens", "Tokens made.")
        self.drafted = made(Counter, "drafted_tokens", "Tokens drafted in exact mode.")
        self.accepted = made(Counter, "accepted_tokens", "Drafted tokens that verification kept.")
        self.exit_depth = made(
            Histogram,
            "exit_depth",
            "Backbone layers that ran for a token, outside exact mode.",
            buckets=[float(depth) for depth in range(layers + 1)],
        )
        self.rows = made(Histogram, "pass_streams", "Streams of a pass or round.", buckets=_ROWS)
        self.queue_length = made(Gauge, "queue_length", "Requests that wait for a slot.")
        self.active = made(Gauge, "active_streams", "Streams that have a slot.")
        self.slots = made(Gauge, "slots", "Streams that can have one.")
        self.first_token = made(
            Histogram, "time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=_SECONDS
        )
        self.whole = made(Histogram, "request_seconds", "From a request's arrival to its last token.", buckets=_SECONDS)

    def ended(self, outcome: str) -> None:
        """Count a request: "stop", "length", "cancelled", "refused" or "failed"."""
        self._requests.labels(self._replica, outcome).inc()

    def text(self) -> str:
        """All figures, as Prometheus reads them."""
        return str(generate_latest(self.registry).decode())


class _Families:
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def merged(texts: Mapping[str, str]) -> str:
    """The figures of several replicas, by their names, as one text: a family's samples have to stand together."""
    families: dict[str, Metric] = {}
    for text in texts.values():
        for family in text_string_to_metric_families(text):
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            families[family.name].samples += family.samples
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return str(generate_latest(registry).decode())
