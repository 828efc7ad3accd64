"""Lets the wheel of torchvision, which is linked against CUDA, be imported under a CPU build of torch.

Its compiled part cannot be loaded then, and all that its import wants of it is that two operators have a schema. Put
beside it, with a .pth line that imports this module, by `make env-vllm` and `make env-sglang` without a GPU.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Declare(MetaPathFinder):
    """Declares the operators once torchvision is about to be imported, and steps aside."""

    library: Any = None

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                type(self).library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    if not hasattr(torch.ops.torchvision, operator):
                        schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                        self.library.define(schema)
        return None


sys.meta_path.insert(0, _Declare())
