"""A recorded step again, from a run folder as the controller and a policy leave it."""

from __future__ import annotations

import json
from itertools import filterfalse
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
import xxhash

from services.policy import checkpoint
from services.policy.replay import main
from services.policy.speed import of_the_machine
from services.policy.state import head_of, tensors_of
from shared.config import dump_recipe
from shared.messages import CommitStep, Position, TrainStep
from shared.records import JOURNAL, MAGIC, SPOOL, frame, segment_path
from shared.service import EXIT_DONE, EXIT_RECIPE


class Recorder:
    """Writes what a run leaves: config, journal, spool, metrics, while a trainer does the steps."""

    def __init__(self, tools: Any, folder: Path) -> None:
        self.tools, self.folder = tools, folder
        self.recipe = tools.recipe()
        self.trainer = tools.trainer(self.recipe)
        for name in (JOURNAL, SPOOL):
            (folder / name).mkdir(parents=True)
        (folder / "config.toml").write_text(dump_recipe(self.recipe))
        (folder / JOURNAL / "00000001.log").write_bytes(MAGIC)
        segment_path(folder, 1).touch()
        self._number = 0

    def _record(self, *facts: dict[str, Any]) -> None:
        self._number += 1
        record = {"core": 1, "term": 1, "event": {"type": "tick", "at": 0.0}, "facts": list(facts)}
        with (self.folder / JOURNAL / "00000001.log").open("ab") as journal:
            journal.write(frame(self._number, msgpack.packb(record)))

    def assign(self, step: TrainStep, frames: list[Any], members: int = 1) -> None:
        """The step as given to so many members, each with its share of the groups."""
        for member in range(members):
            groups, payload = step.groups[member::members], []
            for group in groups:
                at = 4 * step.groups.index(group)
                data = b"".join(bytes(part) for part in frames[at : at + 4])
                path = segment_path(self.folder, 1)
                place = {
                    "segment": 1,
                    "offset": path.stat().st_size,
                    "sizes": [len(bytes(p)) for p in frames[at : at + 4]],
                }
                with path.open("ab") as spool:
                    spool.write(data)
                payload.append({**place, "hash": xxhash.xxh3_64_intdigest(data)})
            share = msgspec.structs.replace(step, groups=groups, mesh=1 if members > 1 else None)
            self._record(
                {
                    "type": "assigned", "lineage": step.position.lineage, "step": step.step, "attempt": step.attempt,
                    "version": step.position.version, "replica": f"policy-{member}",
                    "message": msgspec.to_builtins(share), "payload": payload,
                }
            )  # fmt: skip

    def batch(self, members: int = 1, **more: Any) -> dict[str, float]:
        """One committed step; its metrics, which go to metrics.jsonl."""
        here: Position = self.trainer.position
        step, frames = self.tools.step(self.recipe, here, seed=here.step, **more)
        self.assign(step, frames, members)
        metrics: dict[str, float] = self.trainer.compute(step, frames).metrics
        commit = {"type": "committed", "lineage": here.lineage, "step": here.step, "attempt": step.attempt}
        self._record({**commit, "version": here.version})
        self.trainer.apply(CommitStep(here.step, step.attempt, here.lineage))
        with (self.folder / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"lineage": here.lineage, "step": here.step, **metrics}) + "\n")
        return metrics

    def save(self) -> None:
        checkpoint.save(
            head_of(self.trainer), tensors_of(self.trainer), self.folder / "checkpoints", "run", "recipe", 2
        )


@pytest.fixture
def run(tools: Any, tmp_path: Path) -> Recorder:
    return Recorder(tools, tmp_path / "run")


def replayed(run: Recorder, capsys: pytest.CaptureFixture[str], step: int, *more: str) -> tuple[dict[str, float], str]:
    capsys.readouterr()  # what recording the run said
    assert main(["--replay", str(run.folder), "--step", str(step), *more]) == EXIT_DONE
    out = capsys.readouterr().out
    table = out.splitlines()[3:]
    return {line.split()[0]: float(line.split()[1]) for line in table}, out


def test_a_step_after_a_checkpoint_gives_what_the_run_recorded(
    run: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.batch(stage="sft")
    run.save()
    run.batch(stage="sft")
    recorded = [run.batch(hyperparameters={"train.lr": 1e-2}) for _ in range(2)]
    metrics, out = replayed(run, capsys, 3)
    assert "checkpoints/1 at step 1" in out and "committed" in out and "differs" not in out
    for name in filterfalse(of_the_machine, recorded[1]):
        assert metrics[name] == pytest.approx(recorded[1][name], rel=1e-6, abs=1e-12), name


def test_without_a_checkpoint_it_starts_from_the_first_weights(
    run: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.batch(stage="sft")
    recorded = run.batch(stage="sft")
    metrics, out = replayed(run, capsys, 1)
    assert "the recipe's first weights" in out
    assert metrics["loss"] == pytest.approx(recorded["loss"], rel=1e-6)


def test_a_checkpoint_after_the_step_is_not_used(run: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        run.batch(stage="sft")
        run.save()
    _, out = replayed(run, capsys, 2)
    assert "checkpoints/2 at step 2" in out


def test_the_shares_of_several_members_are_repeated_together(run: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = run.batch(members=2)
    metrics, _ = replayed(run, capsys, 0)
    assert metrics["loss"] == pytest.approx(recorded["loss"], rel=1e-5)


def test_a_step_that_was_never_committed_can_be_looked_at(
    run: Recorder, tools: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run.batch(stage="sft")
    step, frames = tools.step(run.recipe, run.trainer.position, stage="sft", attempt=9)
    run.assign(step, frames)
    _, out = replayed(run, capsys, 1)
    assert "attempt 9" in out and "never committed" in out


def test_the_last_lineage_is_taken_unless_another_is_named(run: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    run.batch(stage="sft")
    run.save()
    run.batch(stage="sft")
    checkpoint.load(run.trainer, run.folder / "checkpoints" / "1", Position(1, 1, 1))
    run.batch(stage="sft")
    assert "of lineage 1" in replayed(run, capsys, 1)[1]
    assert "of lineage 0" in replayed(run, capsys, 1, "--lineage", "0")[1]


@pytest.mark.parametrize("fault", ["unknown step", "unknown lineage", "settled payload", "no run"])
def test_what_cannot_be_repeated_is_refused_by_name(
    run: Recorder, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    run.batch(stage="sft")
    arguments = ["--replay", str(run.folder), "--step", "0"]
    if fault == "unknown step":
        arguments[-1], expected = "7", "no step 7"
    elif fault == "unknown lineage":
        arguments, expected = [*arguments, "--lineage", "4"], "lineages with it: [0]"
    elif fault == "settled payload":
        segment_path(run.folder, 1).unlink()
        expected = "payload of step 0"
    else:
        arguments[1], expected = str(run.folder / "nowhere"), "no recipe"
    assert main(arguments) == EXIT_RECIPE
    assert expected in capsys.readouterr().err
