"""Names that vLLM's front and its workers share; importing them imports no vLLM."""

from __future__ import annotations

BACKEND = "orrery-shared-memory"
"""The weight-transfer backend that `vllm_worker` registers."""
EXTENSION = "shared.engines.vllm_worker.WorkerExtension"
