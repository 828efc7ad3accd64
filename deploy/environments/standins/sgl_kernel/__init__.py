"""Stand-in for SGLang's package of compiled kernels, which exists for GPUs only.

SGLang imports these names whatever the machine. Here no kernel is registered, so that it takes its own paths in plain
PyTorch; one function, which it calls in any case, is written out. Put beside SGLang by `make env-sglang` on machines
without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

__version__ = "0.0.0+torch"

# bound by name when SGLang's model files are imported on a CPU; never called by the models that run here
_DECLARED = (
    "fused_gdn_gating_cpu",
    "fused_linear_sigmoid_mul",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_qkvzba_split_reshape_cat_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu",
    "fused_sigmoid_mul_cpu",
    "gdn_attention",
    "qkv_proj_with_rope_fused_weight",
)
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _name in _DECLARED:
    _library.define(f"{_name}() -> ()")


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new cache places, which lie one after the other in `out_cache_loc`, into its row."""
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no version for machines without a GPU here")

    return missing
