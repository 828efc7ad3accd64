"""The audit: prove from the journal alone that no prompt group was lost or doubled.

Folds the *facts* of every record as plain maps, without the core that made them, and checks what must hold of them:

- per lineage: ids issued = consumed + discarded(cause) + open, each id in exactly one of the three;
- a group is consumed by a committed step, after a report of its last attempt, and at most once in a lineage;
- an attempt goes on from tokens exactly if an earlier one handed them over, and its report is no younger than they are;
- trained version - oldest sampled version <= the bound, recomputed from the reports;
- a verdict on a version is made of answers by exactly that version;
- steps commit in order, each once in a lineage, and only an attempt that was assigned;
- a rollback begins at the last settled position; terms rise by one.

    python -m services.controller.audit RUN_FOLDER
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.records import read_journal

MOST_FAULTS = 20


@dataclass
class Book:
    """The ids of one lineage, each in one of the sets."""

    issued: set[int] = field(default_factory=set)
    consumed: set[int] = field(default_factory=set)
    settled: set[int] = field(default_factory=set)
    discarded: dict[int, str] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)

    @property
    def open(self) -> set[int]:
        """Issued and neither consumed nor discarded."""
        return self.issued - self.consumed - self.discarded.keys()

    def is_open(self, group: int) -> bool:
        """Whether this one is; asked of every group of a run, so at no cost that grows with their number."""
        return group in self.issued and group not in self.consumed and group not in self.discarded


@dataclass
class Audit:
    """What the journal says. `faults` are the broken rules, in words; empty means clean."""

    books: dict[int, Book] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    records: int = 0
    terms: int = 0
    staleness: int = 0
    bound: int = 0
    handed_over: int = 0
    continued: int = 0
    partials_dropped: Counter[str] = field(default_factory=Counter)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    gone: Counter[str] = field(default_factory=Counter)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    outcome: str = "unfinished"

    @property
    def clean(self) -> bool:
        """Whether every rule held."""
        return not self.faults

    def lines(self) -> list[str]:
        """A table for a person."""
        text = [f"journal: {self.records} records, {self.terms} terms, {len(self.books)} lineages, run {self.outcome}"]
        for lineage, book in sorted(self.books.items()):
            causes = Counter(book.discarded.values())
            discarded = ", ".join(f"{cause} {count}" for cause, count in sorted(causes.items())) or "none"
            text.append(
                f"lineage {lineage}: issued {len(book.issued)} = consumed {len(book.consumed)} + discarded "
                f"{len(book.discarded)} ({discarded}) + open {len(book.open)}; settled {len(book.settled)}, "
                f"{len(book.steps)} steps"
            )
        for back in self.rollbacks:
            text.append(
                f"rollback: lineage {back['before']} -> {back['lineage']} at version {back['version']} "
                f"(step {back['step']}), {back['redo_batches']} batches trained again from the spool"
            )
        text.append(f"staleness: at most {self.staleness}, bound {self.bound}")
        if self.handed_over or self.partials_dropped:
            dropped = ", ".join(f"{cause} {count}" for cause, count in sorted(self.partials_dropped.items())) or "never"
            text.append(
                f"handed over part-way: {self.handed_over} times, {self.continued} consumed groups were continued; "
                f"tokens dropped: {dropped}"
            )
        if self.gone:
            text.append("replicas gone: " + ", ".join(f"{state} {count}" for state, count in sorted(self.gone.items())))
        if self.comparisons:
            last, different = self.comparisons[-1], sum(bool(each["different"]) for each in self.comparisons)
            verdict = f"different: {', '.join(last['different'])}" if last["different"] else "equal"
            text.append(
                f"policies compared {len(self.comparisons)} times, {different} with a difference; "
                f"the last time, at step {last['step']}, {len(last['digests'])} of them were {verdict}"
            )
        for evaluation in self.evaluations:
            share = evaluation["correct"] / evaluation["n"]
            text.append(
                f"evaluated version {evaluation['version']} ({evaluation['why']}) on {evaluation['suite']}: "
                f"{evaluation['correct']:g}/{evaluation['n']} = {share:.1%}"
            )
        text += [f"FAULT {fault}" for fault in self.faults[:MOST_FAULTS]]
        if len(self.faults) > MOST_FAULTS:
            text.append(f"... and {len(self.faults) - MOST_FAULTS} more")
        text.append("audit: clean" if self.clean else f"audit: {len(self.faults)} faults")
        return text


def audit_run(folder: Path) -> Audit:
    """Fold the journal of the run in `folder`. JournalDamaged if it cannot be read."""
    auditor = Auditor()
    for number, record in read_journal(folder):
        auditor.take(number, record)
    return auditor.audit


class Auditor:
    """Folds records one by one, in order; `audit` is what they say so far."""

    def __init__(self) -> None:
        self.audit = Audit()
        self._fold = _Fold(self.audit)

    def take(self, number: int, record: dict[str, Any]) -> None:
        """The next record, as a plain map."""
        audit = self.audit
        audit.records = number
        event = record["event"]
        if event["type"] == "term_began":
            audit.terms += 1
            audit.outcome = "unfinished"
            if event["term"] != audit.terms:
                audit.faults.append(f"record {number}: term {event['term']} follows term {audit.terms - 1}")
        for fact in record["facts"]:
            getattr(self._fold, fact["type"], self._fold.ignore)(fact)


class _Fold:
    """One method for each fact that the audit looks at, by the fact's name."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._purpose: dict[int, str] = {}
        self._attempt: dict[int, int] = {}
        self._reported: dict[int, tuple[int, int]] = {}
        self._partial: dict[int, tuple[int, int]] = {}
        self._begun: dict[int, int] = {}
        self._assigned: dict[tuple[int, int, int], set[int]] = {}
        self._trained: dict[tuple[int, int], set[int]] = {}
        self._settled = (0, 0)

    def ignore(self, fact: dict[str, Any]) -> None:
        """A fact that the books don't need."""

    def issued(self, fact: dict[str, Any]) -> None:
        lineage, group = fact["lineage"], fact["group"]
        book = self._book(lineage)
        if group in book.issued:
            self._fault(f"group {group} was issued twice in lineage {lineage}")
        book.issued.add(group)
        self._purpose[group] = fact["purpose"]
        if fact["carried"]:
            before = self._book(lineage - 1)
            if group not in before.issued or group in before.settled or group in before.discarded:
                self._fault(f"group {group} was carried into lineage {lineage} though it was closed in {lineage - 1}")
            before.consumed.discard(group)
            before.discarded[group] = "rollback"

    def leased(self, fact: dict[str, Any]) -> None:
        if fact["attempt"] != self._attempt.get(fact["group"], 0) + 1:
            self._fault(
                f"group {fact['group']}: attempt {fact['attempt']} follows {self._attempt.get(fact['group'], 0)}"
            )
        self._attempt[fact["group"]] = fact["attempt"]
        self._reported.pop(fact["group"], None)
        tokens, _ = self._partial.get(fact["group"], (0, 0))
        if fact["begun"] != tokens:
            self._fault(f"group {fact['group']}: leased with {fact['begun']} tokens, {tokens} were handed over")
        self._begun[fact["group"]] = fact["begun"]

    def handed_over(self, fact: dict[str, Any]) -> None:
        if fact["attempt"] != self._attempt.get(fact["group"]):
            self._fault(f"group {fact['group']}: handed over by attempt {fact['attempt']}, not by the last lease")
        self._check_age(fact)
        self._partial[fact["group"]] = (fact["tokens"], fact["oldest"])
        self._audit.handed_over += 1

    def partial_dropped(self, fact: dict[str, Any]) -> None:
        tokens, _ = self._partial.pop(fact["group"], (0, 0))
        if fact["tokens"] != tokens:
            self._fault(f"group {fact['group']}: {fact['tokens']} tokens dropped, {tokens} were handed over")
        self.partial_refused(fact)

    def partial_refused(self, fact: dict[str, Any]) -> None:
        self._audit.partials_dropped[fact["cause"]] += 1

    def reported(self, fact: dict[str, Any]) -> None:
        if fact["attempt"] != self._attempt.get(fact["group"]):
            self._fault(f"group {fact['group']}: a report of attempt {fact['attempt']}, not of the last lease")
        self._check_age(fact)
        self._partial.pop(fact["group"], None)
        self._reported[fact["group"]] = (fact["oldest"], fact["newest"])

    def discarded(self, fact: dict[str, Any]) -> None:
        book = self._book(fact["lineage"])
        if not book.is_open(fact["group"]):
            self._fault(f"group {fact['group']} was discarded in lineage {fact['lineage']} though it was not open")
        book.discarded[fact["group"]] = fact["cause"]

    def assigned(self, fact: dict[str, Any]) -> None:
        key = (fact["lineage"], fact["step"], fact["attempt"])
        self._assigned.setdefault(key, set()).update(group["group"] for group in fact["message"]["groups"])

    def committed(self, fact: dict[str, Any]) -> None:
        book = self._book(fact["lineage"])
        groups = self._assigned.get((fact["lineage"], fact["step"], fact["attempt"]))
        if groups is None:
            self._fault(f"step {fact['step']} attempt {fact['attempt']} committed without being assigned")
            groups = set()
        expected = book.steps[-1] + 1 if book.steps else self._settled[1]
        if fact["step"] != expected:
            self._fault(f"lineage {fact['lineage']}: step {fact['step']} committed, expected step {expected}")
        book.steps.append(fact["step"])
        self._trained.setdefault((fact["lineage"], fact["version"]), set()).update(groups)

    def consumed(self, fact: dict[str, Any]) -> None:
        lineage, version = fact["lineage"], fact["version"]
        book = self._book(lineage)
        trained = self._trained.get((lineage, version), set())
        self._audit.bound = max(self._audit.bound, fact["bound"])
        for group in fact["groups"]:
            if not book.is_open(group):
                self._fault(f"group {group} was consumed in lineage {lineage} though it was not open")
            if group not in trained:
                self._fault(f"group {group} was consumed without a committed step of version {version}")
            if group not in self._reported:
                self._fault(f"group {group} was consumed without a report of its last attempt")
            elif self._purpose.get(group) == "train":
                staleness = version - self._reported[group][0]
                self._audit.staleness = max(self._audit.staleness, staleness)
                self._audit.continued += self._begun.get(group, 0) > 0
                if staleness > fact["bound"]:
                    self._fault(f"group {group} was trained {staleness} versions late, the bound is {fact['bound']}")
            book.consumed.add(group)

    def judged(self, fact: dict[str, Any]) -> None:
        book = self._book(fact["lineage"])
        if not book.is_open(fact["group"]):
            self._fault(f"evaluation group {fact['group']} was judged though it was not open")
        sampled = self._reported.get(fact["group"])
        if sampled != (fact["version"], fact["version"]):
            self._fault(f"evaluation group {fact['group']} was judged as of version {fact['version']}, not {sampled}")
        book.consumed.add(fact["group"])

    def settled(self, fact: dict[str, Any]) -> None:
        book = self._book(fact["lineage"])
        for group in fact["groups"]:
            if group not in book.consumed:
                self._fault(f"group {group} was settled in lineage {fact['lineage']} though it was not consumed")
        book.settled.update(fact["groups"])
        self._settled = (fact["version"], fact["step"])

    def rolled_back(self, fact: dict[str, Any]) -> None:
        self._audit.rollbacks.append(fact)
        if (fact["version"], fact["step"]) != self._settled:
            self._fault(
                f"lineage {fact['lineage']} began at {fact['version'], fact['step']}, settled was {self._settled}"
            )

    def gone(self, fact: dict[str, Any]) -> None:
        self._audit.gone[fact["state"]] += 1

    def evaluated(self, fact: dict[str, Any]) -> None:
        self._audit.evaluations.append(fact)

    def compared(self, fact: dict[str, Any]) -> None:
        self._audit.comparisons.append(fact)

    def finished(self, fact: dict[str, Any]) -> None:
        self._audit.outcome = fact["outcome"]
        if fact["outcome"] == "complete":
            for lineage, book in self._audit.books.items():
                if book.open:
                    self._fault(f"lineage {lineage}: the run is complete and {len(book.open)} groups are still open")

    def _book(self, lineage: int) -> Book:
        return self._audit.books.setdefault(lineage, Book())

    def _check_age(self, fact: dict[str, Any]) -> None:
        """What was handed over, or reported, holds the tokens that its lease went on from."""
        known = self._partial.get(fact["group"])
        if known is not None and fact["oldest"] > known[1]:
            self._fault(
                f"group {fact['group']}: its oldest token is said to be of version {fact['oldest']}, but its lease "
                f"went on from one of {known[1]}"
            )

    def _fault(self, text: str) -> None:
        self._audit.faults.append(text)


if __name__ == "__main__":
    found = audit_run(Path(sys.argv[1]))
    print("\n".join(found.lines()))
    sys.exit(0 if found.clean else 1)
