"""Expert parallelism: each rank of the axes ep and tp has some experts whole, and computes them for everybody's tokens.

Tokens and their routing are gathered over ep and what the experts make of them is summed and cut again; over tp, whose
ranks have the same tokens, it is summed. An all-to-all would send a token only where it is routed to; gathering needs
no counts, so that every rank's collectives have sizes that all know, and nothing waits for the router.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from services.policy.layouts.collectives import gather_scatter, keep_sum, scatter_gather, sum_keep
from services.policy.layouts.grid import Axis


def share_experts(experts: Any, ep: Axis, tp: Axis, first: int) -> None:
    """Have the experts `first` ..., whose weights this rank has, do their part of what all of them do."""
    if ep.group is None and tp.group is None:
        return
    own = int(experts.gate_up_proj.shape[0])
    experts.num_experts = own
    experts._is_expert_parallel = True  # transformers' own mark that some tokens may be nobody's here

    def enter(_module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, chosen, weights = args
        hidden, weights = (gather_scatter(keep_sum(each, tp), ep, 0) for each in (hidden, weights))
        with torch.no_grad():
            places = gather_scatter(chosen, ep, 0) - first
        elsewhere = (places < 0) | (places >= own)
        # one past the last expert is nobody
        return hidden, places.masked_fill(elsewhere, own), weights.masked_fill(elsewhere, 0.0)

    def leave(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return sum_keep(scatter_gather(output, ep, 0), tp)

    experts.register_forward_pre_hook(enter)
    experts.register_forward_hook(leave)
