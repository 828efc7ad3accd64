"""Inside vLLM's worker processes: weights from the rollout's shared memory, through vLLM's weight-transfer interface.

Imported by each worker as its extension (`worker_extension_cls`), which registers the transfer backend below. Each
worker maps the same memory and its layers' own loaders take the slices that are theirs. Invariant: nothing of the
mapping is kept once an update has ended.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from shared.engines.checkpoint import checkpoint_tensors
from shared.engines.processes import die_with_owner
from shared.engines.ranks import join
from shared.engines.vllm_names import BACKEND
from shared.weights import TensorSpec, area_bytes, open_shared, tensor_views


@dataclass
class _Init(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class _Update(WeightTransferUpdateInfo):
    """Where the weights lie (see shared.weights.memory), and the manifest of that memory, as msgpack."""

    path: str
    manifest: bytes


class SharedMemoryTransfer(WeightTransferEngine[_Init, _Update]):
    """vLLM's three steps of an update: prepare the layers, load, process again what was packed or quantised."""

    init_info_cls = _Init
    update_info_cls = _Update

    def init_transfer_engine(self, init_info: _Init) -> None:
        """There is no connection to make."""

    def start_weight_update(self) -> None:
        """Bring all layers back to the form that their loaders expect."""
        initialize_layerwise_reload(self.model)
        if self.device.type == "cpu":
            _pack_experts_again(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load all weights. (vLLM's own ends with a wait for an accelerator, which a CPU does not have.)"""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: _Update) -> None:
        """Map the memory and hand its tensors to the model's loader, in the type that the engine computes in."""
        manifest = msgspec.msgpack.decode(update_info.manifest, type=list[TensorSpec])
        memory = open_shared(update_info.path, area_bytes(manifest))
        tensors = checkpoint_tensors(tensor_views(memory, manifest))
        self.model.load_weights((name, tensor.to(self.model_config.dtype)) for name, tensor in tensors)

    def finish_weight_update(self) -> None:
        """Pack and quantise the new weights as the old ones were."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu" and self.model_config.hf_text_config.tie_word_embeddings:
            _pack_tied_head_again(self.model)

    def shutdown(self) -> None:
        """There is nothing to give back."""


def _pack_experts_again(model: torch.nn.Module) -> None:
    """On a CPU the experts' weights are packed when their kernel is made: one that is kept would get them unpacked."""
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.quant_method.moe_kernel = None


def _pack_tied_head_again(model: torch.nn.Module) -> None:
    """On a CPU the head has a packed copy of its weight; one tied to the embedding is not loaded, hence not packed."""
    for module in model.modules():
        if isinstance(module, (ParallelLMHead, VocabParallelEmbedding)) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryTransfer)


die_with_owner()
# each update would warn of layers without weights of their own: rotary embeddings, and a head tied to the embedding
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


class WorkerExtension:
    """Mixed into vLLM's worker; its import registers the transfer backend."""

    rank: int  # among all workers of the engine

    def join_replica(self, invitation: bytes) -> None:
        """Be a rank of the replica, on the bus."""
        join(invitation, self.rank)

    def process_id(self) -> int:
        """The worker's."""
        return os.getpid()
