"""A pretended accelerator, for machines without one: whatever meets a tensor that was left on the CPU is refused.

Tensors on it are computed by the CPU, so that what depends on values (`.item()`, `.nonzero()`) works; but, as on a
GPU, they meet tensors on the CPU only in what is MIXED, or such of one value, and `.numpy()` does not take them. What
it cannot show is whatever a GPU does in its own way: streams, kernels, numbers.

Torch knows one such device a process, and from then on takes it for the accelerator: for processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = "pretended:0"
MIXED = ("aten::copy_", "aten::index.", "aten::index_put")
"""What a GPU does with tensors on both sides: copies, and looking up by places that are on the CPU."""


@contextmanager
def pretended() -> Iterator[torch.device]:
    """The device, which is there within."""
    _setup_privateuseone_for_python_backend("pretended", backend_module=_Streams())
    # a tensor here has no storage of its own that FSDP could give back and take again
    for name in ("free_storage", "alloc_storage"):
        setattr(_fsdp_param, name, lambda _tensor: None)
    with _Made(), _Computed():
        yield torch.device(DEVICE)


class _Streams(_DummyBackendModule):
    """What FSDP asks its device for: streams as the CPU has them, which are none."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


class Apart(Tensor):
    """A tensor on the device; `here` has its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Apart:
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=torch.device(DEVICE)
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.here.tolist()

    def data_ptr(self) -> int:
        return self.here.data_ptr()


class _Computed(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """What makes tensors of Python's numbers, on their device, without asking any mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_apart(given.get("device")):
            device = given.pop("device")
            return func(*args, **given).to(device)
        return func(*args, **given)


def _is_apart(device: Any) -> bool:
    return device is not None and torch.device(device).type == torch.device(DEVICE).type


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    apart = [each for each in given if isinstance(each, Apart)]
    if not apart and not _is_apart(kwargs.get("device")):
        return func(*args, **kwargs)
    name = func.name()
    comes_back = name == "aten::_local_scalar_dense" or ("device" in kwargs and not _is_apart(kwargs["device"]))
    left = any(each.dim() for each in given if not isinstance(each, Apart))
    if apart and left and not name.startswith(MIXED):
        where = ", ".join(f"{list(each.shape)} on {each.device}" for each in given)
        raise RuntimeError(f"{name}: expected all tensors on one device, got {where}")
    if name == "aten::histc" and not apart[0].is_floating_point():  # GPUs count integers, the CPU does not
        args = (apart[0].float(), *args[1:])
    kwargs = kwargs | {key: value for key, value in (("device", "cpu"), ("pin_memory", False)) if key in kwargs}
    known = {id(each.here): each for each in apart}
    found = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if name == "aten::copy_":
        return args[0]
    return found if comes_back else tree_map(lambda each: known[id(each)] if id(each) in known else _there(each), found)


def _here(value: Any) -> Any:
    return value.here if isinstance(value, Apart) else value


def _there(value: Any) -> Any:
    return Apart(value) if isinstance(value, Tensor) else value
