"""Numbers of a server for Prometheus.

Owns their names and units; each server has a registry of its own, so that two in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Measurements:
    """What a server has done since it started."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "pretrain_requests", "HTTP requests that got an answer", ("route", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "pretrain_request_seconds",
            "From a request's head to the end of its answer",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "pretrain_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("pretrain_prompt_tokens", "Tokens of accepted prompts", registry=registry)
        self.new_tokens = Counter("pretrain_new_tokens", "Tokens written", registry=registry)
        self.abandoned = Counter(
            "pretrain_abandoned_answers", "Answers whose client left or whose time was over", registry=registry
        )

    def watch(self, *, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Read these whenever Prometheus asks."""
        for name, text, read in (
            ("pretrain_running_answers", "Answers being computed", running),
            ("pretrain_waiting_answers", "Answers that wait for a place", waiting),
        ):
            Gauge(name, text, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
