"""Recovery: the core as the journal left it. Every replayed event must decide what it decided then."""

from __future__ import annotations

from pathlib import Path

from services.controller.core.core import Core
from services.controller.core.events import AnyEvent
from services.controller.core.outcome import RecordEvaluation, RecordMetrics
from services.controller.journal import Journal
from services.controller.outputs import Outputs
from shared.config import Recipe
from shared.telemetry import get_logger

log = get_logger()


def open_run(recipe: Recipe, folder: Path, journal: Journal, outputs: Outputs) -> Core:
    """The core as the journal in `folder` left it; facts that replay differently are refused."""
    snapshot = journal.snapshot()
    core = Core.restore(recipe, snapshot) if snapshot is not None else Core(recipe)
    replayed = 0
    for record in journal.replay():
        outcome = core.step(record.event)
        if outcome.facts != record.facts:
            raise DriftedJournal(folder, journal, record.event, outcome.facts, record.facts)
        for effect in outcome.effects:
            if isinstance(effect, RecordMetrics):
                outputs.metrics(effect.line)
            elif isinstance(effect, RecordEvaluation):
                outputs.evaluation(effect.result)
        replayed += 1
    if replayed or snapshot is not None:
        log.info("journal replayed", records=replayed, after_snapshot=snapshot is not None, torn_bytes=journal.cut)
    return core


class DriftedJournal(Exception):
    """Replaying an event gave other facts than those on record: the code or the recipe is not the one that ran."""

    def __init__(self, folder: Path, journal: Journal, event: AnyEvent, got: object, expected: object) -> None:
        super().__init__(
            f"{folder / 'journal'}: replaying {type(event).__name__} at {event.at:.3f} gives {got}, not {expected}; "
            "resume with the recipe in config.toml and the version of Orrery that wrote the journal"
        )
