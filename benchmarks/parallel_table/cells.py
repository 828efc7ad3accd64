"""The layouts and the families of the table."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shared.weights.slices import Parallel

OPTIONS = {"sp": "sequence", "gc": "checkpointing", "compile": "compiled"}
"""What a layout's name may have behind a plus, and the argument of `Layout` that it stands for."""
COMMON = (
    "fsdp2", "tp2", "tp2+sp", "cp2", "pp2", "replicate2", "fsdp2xtp2", "pp2xtp2", "cp2xtp2", "cp2xtp2+sp",
    "fsdp2xcp2xtp2", "pp2xfsdp2xtp2", "pp2xfsdp2xtp2+sp",
)  # fmt: skip
EXPERTS = ("ep2", "ep2xfsdp2", "ep2xtp2", "ep2xtp2+sp", "pp2xep2", "ep2xcp2")
VISION = ("fsdp2", "tp2", "tp2+sp", "fsdp2xtp2", "pp2", "cp2")
LAYOUTS = {
    "qwen2": (*COMMON, "cp2xtp2+sp+gc"),
    "qwen3": (*COMMON, "pp2xfsdp2xtp2+gc"),
    "qwen3_moe": (*COMMON, *EXPERTS, "ep2xfsdp2+gc"),
    "qwen2_5_vl": (*VISION, "fsdp2xtp2+gc"),
}
"""Family -> its layouts."""
COVERING = (
    ("qwen3", "fsdp2"), ("qwen3", "cp2"), ("qwen2", "pp2xtp2"), ("qwen2", "cp2xtp2+sp+gc"), ("qwen3_moe", "ep2xtp2"),
    ("qwen3_moe", "ep2xfsdp2+gc"), ("qwen2_5_vl", "fsdp2xtp2"), ("qwen3_moe", "tp2+sp"), ("qwen3", "pp2xfsdp2xtp2+gc"),
)  # fmt: skip
"""Cells in which every axis meets others; what CI runs."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A family in a layout, by the names of the table."""

    family: str
    layout: str

    @property
    def parallel(self) -> Parallel:
        """The layout's axes."""
        found = re.findall(r"(pp|replicate|fsdp|ep|cp|tp)(\d+)", self.layout)
        return Parallel(**{axis: int(size) for axis, size in found})

    @property
    def options(self) -> dict[str, bool]:
        """Arguments of `Layout`: those of `OPTIONS` that the layout's name has."""
        return {OPTIONS[word]: True for word in self.layout.split("+")[1:]}


def all_cells() -> list[Cell]:
    """Every cell, family by family."""
    return [Cell(family, layout) for family, layouts in LAYOUTS.items() for layout in layouts]
