"""A model's weights as its safetensors files have them: found by the model's own names, and read slice by slice.

Files name and shape weights otherwise than transformers' models: prefixes have changed, and experts, which a model has
in stacks, are stored one by one. What becomes of a stored name is transformers' own table. Nothing is read before a
slice is asked for, so that a rank which holds a part of the model reads that part alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from shared.config.schema import ModelTable
from shared.models import images
from shared.models.build import CONFIGS
from shared.models.errors import ModelError
from shared.models.folder import checked_path, first_line, weight_files
from shared.models.load import load_config

FAMILIES = (*CONFIGS, *images.FAMILIES)
"""`model_type` of the models that are read this way."""


class Slice(Protocol):
    """A stored tensor that is read in part: what safetensors calls a slice, or several of them that make one weight."""

    def get_shape(self) -> Sequence[int]: ...

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor: ...


class Stack:
    """Experts that are stored one by one, as [experts, rows, columns]; an expert's projections follow each other."""

    def __init__(self, projections: Sequence[Sequence[Slice]]) -> None:
        self._projections = projections

    def get_shape(self) -> list[int]:
        """As many experts as all projections have."""
        rows = sum(one.get_shape()[0] for some in self._projections for one in some[:1])
        columns = [size for some in self._projections for one in some[:1] for size in one.get_shape()[1:]]
        return [min(map(len, self._projections)), rows, *columns[:1]]

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor:
        experts, *inside = place
        assert [(part.start, part.stop) for part in inside] == [(0, size) for size in self.get_shape()[1:]], (
            "an expert is never cut inside"
        )
        return torch.stack(
            [
                torch.cat([projection[expert][:, :] for projection in self._projections])
                for expert in range(experts.start, experts.stop)
            ]
        )


class Alike:
    """A weight that the files have under several names, since the model has it in several places."""

    def __init__(self, path: str, name: str, slices: Sequence[Slice]) -> None:
        self._path, self._name, self._slices = path, name, slices

    def get_shape(self) -> Sequence[int]:
        return self._slices[0].get_shape()

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor:
        first, *others = (each[place] for each in self._slices)
        if not all(torch.equal(first, other) for other in others):
            raise ModelError(
                f"model.path {self._path!r}: expected one value of {self._name}, to which config.json ties another "
                f"weight, got several; set tie_word_embeddings to false in config.json"
            )
        return first


def can_slice(model: ModelTable) -> bool:
    """Whether the model's files are understood here; others are transformers' alone, which loads models whole."""
    if model.build is not None or model.trust_remote_code:
        return False
    config = load_config(model)
    return config.model_type in FAMILIES and getattr(config, "quantization_config", None) is None


def stored_weights(model: ModelTable, skeleton: PreTrainedModel) -> dict[str, Slice]:
    """Where each parameter of `skeleton` is stored, tied ones under their first name; ModelError unless all are."""
    path = checked_path(model, weights=True)
    try:
        files = [safe_open(file, "pt") for file in weight_files(path)]
        stored = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ModelError(
            f"model.path {path!r}: expected safetensors weights of a causal LM, got {first_line(error)}; "
            f"download the model again, or convert its weights to safetensors"
        ) from error
    found = _by_parameter(path, skeleton, stored)
    wanted = {name: list(parameter.shape) for name, parameter in skeleton.named_parameters()}
    missing = sorted(wanted.keys() - found.keys())
    others = sorted(name for name, slice_ in found.items() if list(slice_.get_shape()) != wanted[name])
    for names, problem in ((missing, "without"), (others, "with another shape of")):
        if names:
            raise ModelError(
                f"model.path {path!r}: expected a weight for each parameter of {type(skeleton).__name__}, got files "
                f"{problem} {names[0]} (and {len(names) - 1} more); do config.json and the weights belong together?"
            )
    return found


def _by_parameter(path: str, model: PreTrainedModel, stored: dict[str, Slice]) -> dict[str, Slice]:
    """What is stored, by the model's names; what it has no use for is left out."""
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    sources = {pattern: entry.source_patterns for entry in converters for pattern in entry.source_patterns}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(parameters.items())}
    direct: dict[str, list[Slice]] = defaultdict(list)
    stacked: dict[str, dict[str, list[Slice]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = key, None
        if name not in parameters:
            continue
        if pattern is None:
            direct[first[id(parameters[name])]].append(stored[key])
        else:
            stacked.setdefault(name, {source: [] for source in sources[pattern]})[pattern].append(stored[key])
    found: dict[str, Slice] = {name: Stack([*parts.values()]) for name, parts in stacked.items()}
    for name, slices in direct.items():
        found[name] = slices[0] if len(slices) == 1 else Alike(path, name, slices)
    return found
