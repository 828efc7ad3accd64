"""Fully sharded data parallelism: torch's FSDP2, a unit a layer, gradients summed and not averaged.

Denominators of the loss are global (services/policy/losses.py), so what ranks add up to is the gradient already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from services.policy.layouts.grid import Axis


def shard(layers: Iterable[nn.Module], decoder: nn.Module, axis: Axis, device: torch.device) -> None:
    """Keep a part of each weight, gather a layer's when it is computed, and sum gradients over the axis.

    Sums are in float32 whatever the weights are. What belongs to no layer is a unit of its own, the decoder's. Weights
    without memory get it here on `device`, one unit after the other, so that no more than one is ever whole.
    """
    if axis.group is None:
        give_memory(decoder, device)
        return
    mesh = DeviceMesh.from_group(axis.group, device.type, mesh_dim_names=("fsdp",))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*layers, decoder):
        # weights of snapshots are copied over the parts, which must not stay gathered: not even the decoder's
        give_memory(module, device)
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # Gloo knows no other


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Memory of arbitrary contents for those weights that have none, on the meta device; values are read into it."""

    def real(parameter: nn.Parameter) -> nn.Parameter:
        if not parameter.is_meta:
            return parameter
        return nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)

    exchange(module, real)


def exchange(module: nn.Module, new: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put `new` of each parameter in its place; tied ones stay tied."""
    done: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for key, parameter in list(part.named_parameters(recurse=False)):
            if parameter not in done:
                done[parameter] = new(parameter)
            part.register_parameter(key, done[parameter])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a weight or gradient, of which it shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
