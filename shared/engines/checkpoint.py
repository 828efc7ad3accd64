"""From a transformers model's own tensors to those of its Hugging Face checkpoint, which other engines read.

transformers keeps the experts of a layer in one stack; checkpoints, and the loaders of vLLM and SGLang, have a tensor
an expert. transformers puts the two halves of a vision-language model below one name, which checkpoints do not have,
and which SGLang's loader passes over without a word. Pure views: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

GATE_UP = ".experts.gate_up_proj"
DOWN = ".experts.down_proj"


def checkpoint_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors by their names in a checkpoint.

    A stack of gate and up projections is [experts, 2 x intermediate, hidden], one of down projections
    [experts, hidden, intermediate].
    """
    for own, tensor in tensors.items():
        name = _checkpoint_name(own)
        if name.endswith(GATE_UP):
            layer = name.removesuffix("gate_up_proj")
            for expert, stacked in enumerate(tensor):
                gate, up = stacked.chunk(2)
                yield f"{layer}{expert}.gate_proj.weight", gate
                yield f"{layer}{expert}.up_proj.weight", up
        elif name.endswith(DOWN):
            layer = name.removesuffix("down_proj")
            for expert, down in enumerate(tensor):
                yield f"{layer}{expert}.down_proj.weight", down
        else:
            yield name, tensor


def _checkpoint_name(name: str) -> str:
    for own, published in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(own):
            return published + name.removeprefix(own)
    return name
