"""The checkpoint folder that policies share, as `services.policy.checkpoint` keeps it: one folder a step, the newest
kept, later ones than what was just written belong to a lineage that was given up. A save is all or nothing."""

from __future__ import annotations

from shared.messages import Position


class CheckpointFolder:
    """Checkpoints by path: position and chain."""

    def __init__(self, keep: int) -> None:
        self.saved: dict[str, tuple[Position, str]] = {}
        self._keep = keep

    def save(self, folder: str, position: Position, chain: str) -> str | None:
        """Write it, delete what is too old; the path, or None when a later lineage has that step."""
        path = f"{folder}/{position.step}"
        if path in self.saved and self.saved[path][0].lineage > position.lineage:
            return None
        if path not in self.saved or self.saved[path][0] != position:
            self.saved[path] = (position, chain)
        own = [p.step for p, _ in self.saved.values() if p.lineage <= position.lineage]
        older = sorted((step for step in own if step < position.step), reverse=True)
        later = [step for step in own if step > position.step]
        for step in [*older[max(1, self._keep - 1) :], *later]:
            del self.saved[f"{folder}/{step}"]
        return path

    def superseded(self, path: str) -> bool:
        """Whether it was deleted because later ones were written."""
        step = int(path.rpartition("/")[2])
        return path not in self.saved and any(position.step > step for position, _ in self.saved.values())

    def load(self, path: str, position: Position) -> str | None:
        """The chain of a checkpoint, if it may be loaded as this position."""
        found = self.saved.get(path)
        if found is None:
            return None
        held, chain = found
        fits = (held.version, held.step) == (position.version, position.step) and held.lineage <= position.lineage
        return chain if fits else None
