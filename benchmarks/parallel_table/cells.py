"""The layouts and the families of the table."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shared.weights.slices import Parallel

COMMON = (
    "fsdp2", "tp2", "tp2+sp", "cp2", "pp2", "replicate2", "fsdp2xtp2", "pp2xtp2", "cp2xtp2", "cp2xtp2+sp",
    "fsdp2xcp2xtp2", "pp2xfsdp2xtp2", "pp2xfsdp2xtp2+sp",
)  # fmt: skip
EXPERTS = ("ep2", "ep2xfsdp2", "ep2xtp2", "ep2xtp2+sp", "pp2xep2", "ep2xcp2")
VISION = ("fsdp2", "tp2", "tp2+sp", "fsdp2xtp2", "pp2", "cp2")
LAYOUTS = {
    "qwen2": COMMON,
    "qwen3": COMMON,
    "qwen3_moe": (*COMMON, *EXPERTS),
    "qwen2_5_vl": VISION,
}
"""Family -> its layouts."""
COVERING = (
    ("qwen3", "fsdp2"), ("qwen3", "cp2"), ("qwen2", "pp2xtp2"), ("qwen2", "cp2xtp2+sp"), ("qwen3_moe", "ep2xtp2"),
    ("qwen3_moe", "ep2xfsdp2"), ("qwen2_5_vl", "fsdp2xtp2"), ("qwen3_moe", "tp2+sp"), ("qwen3", "pp2xfsdp2xtp2"),
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
    def sequence(self) -> bool:
        """Whether tensor parallel ranks share the sequence."""
        return self.layout.endswith("+sp")


def all_cells() -> list[Cell]:
    """Every cell, family by family."""
    return [Cell(family, layout) for family, layouts in LAYOUTS.items() for layout in layouts]
