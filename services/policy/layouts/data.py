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
    come to `device` here, one unit after the other, so that no more than one is ever whole there.
    """
    if axis.group is None:
        bring(decoder, device)
        return
    mesh = DeviceMesh.from_group(axis.group, device.type, mesh_dim_names=("fsdp",))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*layers, decoder):
        # weights of snapshots are copied over the parts, which must not stay gathered: not even the decoder's
        bring(module, device)
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # Gloo knows no other


def bring(module: nn.Module, device: torch.device) -> None:
    """Weights and buffers to `device`.

    Weights that have no memory, on the meta device, get some of arbitrary contents; values are read into it.
    """

    def real(parameter: nn.Parameter) -> nn.Parameter:
        if parameter.device == device:
            return parameter
        there = torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.detach().to(device)
        return nn.Parameter(there, requires_grad=parameter.requires_grad)

    exchange(module, real)
    for part in module.modules():
        for key, buffer in part.named_buffers(recurse=False):
            part.register_buffer(key, buffer.to(device), key not in part._non_persistent_buffers_set)


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
