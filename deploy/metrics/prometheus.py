"""Prometheus: the newest value of every figure at http://HOST:PORT/metrics, as gauges named `orrery_...`."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from deploy.readers.figures import Line, Verdict, figures

if TYPE_CHECKING:
    from prometheus_client.metrics_core import GaugeMetricFamily


class PrometheusWriter:
    """Serves from a thread of its own; loopback unless the recipe says otherwise (anybody who connects may read)."""

    def __init__(self, run: str, host: str, port: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ModuleNotFoundError:
            raise RuntimeError(
                "metrics.prometheus_port needs prometheus-client: pip install 'orrery[prometheus]'"
            ) from None
        self._run = run
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise RuntimeError(
                f"cannot listen on {host}:{port} (metrics.prometheus_port): {error}; choose a free port"
            ) from None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One gauge a figure, labelled with the run."""
        from prometheus_client.metrics_core import GaugeMetricFamily

        with self._lock:
            values = sorted(self._values.items())
        for name, value in values:
            safe = "orrery_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
            gauge = GaugeMetricFamily(safe, f"{name}: see docs/metrics.md", labels=["run"])
            gauge.add_metric([self._run], value)
            yield gauge

    def line(self, number: int, line: Line) -> None:
        where = {"step": float(line["step"]), "batch": float(line["batch"]), "batches": float(line["batches"])}
        with self._lock:
            self._values |= figures(line) | where

    def verdict(self, number: int, verdict: Verdict) -> None:
        with self._lock:
            self._values |= verdict.values

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)
