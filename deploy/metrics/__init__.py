"""Carries a run's figures to where people look at them: TensorBoard always, W&B and Prometheus by a key of [metrics].

Everything here follows `metrics.jsonl` and `eval/*.json`, in a thread of the supervisor's process; no service knows.
"""

from deploy.metrics.follow import MetricsWriters

__all__ = ["MetricsWriters"]
