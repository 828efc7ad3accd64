"""Quantised rollout where no kernel computes in the narrow type: weights are rounded to it and kept in their own.

What comes out is what a kernel of weight-only quantisation computes up to the order of its sums, so that a run on any
machine meets the mismatch that such an engine brings. Used by the transformers engine right after each update.
Invariant: pure functions of the weight; the result has its type, shape and device, and is computed in float32.

Blocks lie along the last dimension, the one that a linear layer sums over: `weight` is [..., out, in].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shared.config.schema import Quantization
from shared.engines.base import EngineError

FP8_MAX, FP4_MAX = 448.0, 6.0
"""Largest numbers of E4M3 (without infinities) and of E2M1."""
FP8_EXPONENT, FP4_EXPONENT = 8, 2
"""Their exponents, which a block's largest exponent is moved to in the MX formats."""
SMALLEST_SCALE, LARGEST_SCALE = -127, 127
"""Exponents of E8M0, the type of the MX formats' scales."""


def quantize_dequantize(weight: Tensor, quantization: Quantization) -> Tensor:
    """The numbers that `weight` [..., out, in] stands for once it was stored in the format.

    - fp8:       E4M3, one scale an output channel, amax / 448
    - fp8_block: E4M3, one scale a block of 128 x 128        (DeepSeek-V3, arXiv 2412.19437, 3.3.2)
    - mxfp8:     E4M3, one power of two a block of 32        (OCP Microscaling Formats v1.0, 5.2 and 6.3)
    - mxfp4:     E2M1, one power of two a block of 32        (the same)
    - nvfp4:     E2M1, one E4M3 scale a block of 16, one float32 scale a tensor, amax / (448 x 6)
                 (NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149)

    ValueError if the shape does not fit the format's blocks.
    """
    block = BLOCK[quantization]
    if weight.shape[-1] % block:
        raise ValueError(f"expected a last dimension that is a multiple of {block}, got shape {tuple(weight.shape)}")
    return _FORMATS[quantization](weight.float()).to(weight.dtype)


def quantized_weights(model: nn.Module, quantization: Quantization) -> dict[str, nn.Parameter]:
    """The parameters that a quantised engine stores narrow: those of linear layers and of stacked experts, by name.

    Embeddings, the output head, norms, biases and routers keep their type, as in the checkpoints and engines of the
    field. EngineError if there is none, or one whose shape does not fit.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and not name.endswith((".gate", ".router")):
            found |= {f"{name}.{own}": it for own, it in module.named_parameters(recurse=False) if own == "weight"}
        elif name.endswith(".experts"):
            found |= {f"{name}.{own}": it for own, it in module.named_parameters(recurse=False) if it.dim() == 3}
    block = BLOCK[quantization]
    unfit = [name for name, it in found.items() if it.shape[-1] % block]
    if unfit or not found:
        what = f"{unfit[0]} has shape {tuple(found[unfit[0]].shape)}" if unfit else "the model has no linear layers"
        fitting = [name for name, size in BLOCK.items() if all(it.shape[-1] % size == 0 for it in found.values())]
        raise EngineError(
            f"rollout.quantization = {quantization!r} wants linear layers whose inputs are a multiple of {block} wide, "
            f"but {what}; for this model the transformers engine can do: {', '.join(fitting) if found else 'none'}"
        )
    return found


def _fp8(weight: Tensor) -> Tensor:
    return _scaled_fp8(weight, weight.abs().amax(-1, keepdim=True))


def _fp8_block(weight: Tensor) -> Tensor:
    # blocks at the edges may be smaller, as in the kernels: zeros beside them change no largest number
    size = 128
    rows, columns = weight.shape[-2:]
    padded = nn.functional.pad(weight, (0, -columns % size, 0, -rows % size))
    blocks = padded.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # [..., R, 128, C, 128]
    narrow = _scaled_fp8(blocks, blocks.abs().amax((-3, -1), keepdim=True))
    return narrow.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]


def _scaled_fp8(values: Tensor, largest: Tensor) -> Tensor:
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    return _to_e4m3(values / scale) * scale


def _mxfp8(weight: Tensor) -> Tensor:
    return _microscaled(weight, FP8_EXPONENT, _to_e4m3)


def _mxfp4(weight: Tensor) -> Tensor:
    return _microscaled(weight, FP4_EXPONENT, _to_e2m1)


def _microscaled(weight: Tensor, exponent: int, narrow: Callable[[Tensor], Tensor]) -> Tensor:
    blocks = weight.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    above = torch.frexp(largest).exponent - 1  # floor(log2(largest))
    power = (above - exponent).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return torch.ldexp(narrow(torch.ldexp(blocks, -power)), power).flatten(-2, -1)


def _nvfp4(weight: Tensor) -> Tensor:
    largest = weight.abs().amax((-2, -1), keepdim=True)  # of each expert on its own
    whole = torch.where(largest > 0, largest / (FP8_MAX * FP4_MAX), 1.0)[..., None]
    blocks = weight.unflatten(-1, (-1, 16))
    smallest = torch.finfo(torch.float8_e4m3fn).tiny
    scale = blocks.abs().amax(-1, keepdim=True) / FP4_MAX / whole
    scale = _to_e4m3(scale.clamp(min=smallest)) * whole
    return (_to_e2m1(blocks / scale) * scale).flatten(-2, -1)


def _to_e4m3(values: Tensor) -> Tensor:
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def _to_e2m1(values: Tensor) -> Tensor:
    """Nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with their signs, ties to the even code, beyond 6 to 6."""
    size = values.abs().clamp(max=FP4_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign(torch.round(size / step) * step, values)


BLOCK: dict[Quantization, int] = {"fp8": 1, "fp8_block": 1, "mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
"""What the width of a layer's input must be a multiple of."""
_FORMATS: dict[Quantization, Callable[[Tensor], Tensor]] = {
    "fp8": _fp8,
    "fp8_block": _fp8_block,
    "mxfp8": _mxfp8,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
}
