"""Figures in words, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.report.story import Stage


def duration(seconds: float) -> str:
    """ "42 s", "3 min 05 s", "2 h 10 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def training(figures: Mapping[str, Any]) -> str:
    """ "8742 tokens/s, 41 % MFU, 12.3 GB": what a policy trains, of its devices' peak, and in how much memory."""
    shapes = (
        ("machine/tokens_per_s", 1.0, "{:.0f} tokens/s"),
        ("machine/mfu", 100.0, "{:.0f} % MFU"),
        ("machine/peak_memory_bytes", 1e-9, "{:.1f} GB"),
    )
    found = [(shape, scale * figures[name]) for name, scale, shape in shapes if figures.get(name) is not None]
    return ", ".join(shape.format(value) for shape, value in found)


def stage_lines(stage: Stage) -> list[str]:
    """ "80/80 batches in 1 min 02 s, 170.1 samples/s", the machine's figures, then each role's times."""
    pace = f", {stage.samples_per_s:.1f} samples/s" if stage.samples_per_s is not None else ""
    lines = [f"{stage.done}/{stage.batches} batches in {duration(stage.seconds)}{pace}"]
    rate, share = stage.mean("machine/tokens_per_s"), stage.mean("machine/mfu")
    most = max(stage.series("machine/peak_memory_bytes")[1], default=None)
    if trains := training({"machine/tokens_per_s": rate, "machine/mfu": share, "machine/peak_memory_bytes": most}):
        lines.append(f"while it trains: {trains}")
    for role, shares in sorted(stage.times.items()):
        largest = sorted(shares.items(), key=lambda item: -item[1])
        lines.append(f"{role}: " + ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in largest if share >= 0.01))
    return lines
