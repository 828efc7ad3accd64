"""Figures in words, for the terminal and for the page."""

from __future__ import annotations

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


def stage_lines(stage: Stage) -> list[str]:
    """ "80/80 batches in 1 min 02 s, 170.1 samples/s", then "policy: train 80 %, wait 15 %" for each role."""
    pace = f", {stage.samples_per_s:.1f} samples/s" if stage.samples_per_s is not None else ""
    lines = [f"{stage.done}/{stage.batches} batches in {duration(stage.seconds)}{pace}"]
    for role, shares in sorted(stage.times.items()):
        largest = sorted(shares.items(), key=lambda item: -item[1])
        lines.append(f"{role}: " + ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in largest if share >= 0.01))
    return lines
