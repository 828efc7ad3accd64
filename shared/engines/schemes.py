"""What an engine can do on this machine: its own schemes for narrow formats, and layouts of a model over its ranks.

Kernels for either exist in an engine for some machines only; an engine that is started with another one dies, or
falls back to something hundreds of times slower. So it is refused before the start, with what is possible.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from shared.config.schema import EngineParallelTable, Quantization
from shared.engines.base import EngineError

CAPABILITY: dict[Quantization, tuple[int, int]] = {
    "fp8": (8, 9),
    "fp8_block": (9, 0),
    "mxfp8": (10, 0),
    "mxfp4": (10, 0),
    "nvfp4": (10, 0),
}
"""The oldest CUDA compute capability with arithmetic for a format: Ada, Hopper, Blackwell."""

Schemes = Mapping[Quantization, str]


def scheme_for(
    engine: str, quantization: Quantization | None, on_gpu: Schemes, on_cpu: Schemes, with_amx: Schemes
) -> str | None:
    """The engine's own name of what quantises to that format on this machine, None for none; EngineError if it cannot.

    `on_gpu`, `on_cpu` and `with_amx` are what the engine has for GPUs, for any CPU, and for one with AMX besides.
    """
    if quantization is None:
        return None
    machine, able = _here(on_gpu, on_cpu, with_amx)
    if quantization not in able:
        raise EngineError(
            f"rollout.quantization = {quantization!r}: {engine} on {machine} quantises to "
            f"{', '.join(able) or 'no format'}; choose what it can, or rollout.engine = 'transformers', which "
            "emulates all of them"
        )
    return able[quantization]


def check_layout(engine: str, parallel: EngineParallelTable, gpu_only: Iterable[str]) -> None:
    """EngineError for a layout whose workers would die or hang here; the axes of `gpu_only` want a GPU."""
    if torch.cuda.is_available():
        return
    for axis in gpu_only:
        ranks = getattr(parallel, axis)
        if ranks > 1:
            raise EngineError(
                f"rollout.parallel.{axis} = {ranks}: {engine} wants a GPU for that; without one, leave {axis} at 1"
            )


def _here(on_gpu: Schemes, on_cpu: Schemes, with_amx: Schemes) -> tuple[str, Schemes]:
    """This machine, for a person, and what can be done on it."""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()} (compute capability {'.'.join(map(str, capability))})"
        return name, {format: own for format, own in on_gpu.items() if capability >= CAPABILITY[format]}
    if torch.cpu._is_amx_tile_supported():
        return "a CPU with AMX", {**on_cpu, **with_amx}
    return "a CPU without AMX", on_cpu
