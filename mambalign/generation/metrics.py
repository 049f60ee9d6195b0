"""What a server measures, in Prometheus' format; a registry of its own for every server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Also what a `Worker` counts into."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"mambalign_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"mambalign_{name}_seconds", text, buckets=buckets, registry=self.registry)

        self.requests = counter(
            "requests", "HTTP requests by path and status; 499: the client went away.", "path", "status"
        )
        self._read = counter("prompt_tokens", "Prompt tokens that were read.")
        self._cached = counter("cached_prompt_tokens", "Prompt tokens that a kept state made it unnecessary to read.")
        self._generated = counter("generated_tokens", "Tokens that were generated.")
        self._first = histogram(
            "time_to_first_token", "From a request's arrival, its time in the queue included.", _SECONDS
        )
        self._each = histogram("time_per_token", "Between two tokens of an answer.", _TOKEN_SECONDS)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A number that is asked for when the metrics are."""
        Gauge(f"mambalign_{name}", text, registry=self.registry).set_function(read)

    def prompt(self, read: int, cached: int) -> None:
        self._read.inc(read)
        self._cached.inc(cached)

    def generated(self, count: int) -> None:
        self._generated.inc(count)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def token(self, seconds: float) -> None:
        self._each.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
