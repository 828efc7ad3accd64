"""Deliberate bugs: each is a small change to the product, and some seed must catch it.

`python -m tests.simulation.mutants [NAME ...]` looks for the first seed that catches each, to fill `CAUGHT_BY`. The
change is made in a copy of the product in a temporary folder, in which the simulator then runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(os.environ.get("MUTATE_ROOT") or Path(__file__).resolve().parents[2])
CORE = "services/controller/core"
MOST_SEEDS = 1000
TIMEOUT_S = 1200


@dataclass(frozen=True)
class Mutant:
    """In each of `edits`, (file, old, new), the old text becomes the new; `seed` is the first one that catches it."""

    name: str
    seed: int
    edits: tuple[tuple[str, str, str], ...]


MUTANTS = [
    Mutant(
        "ready when the transfer is ordered",
        0,
        (
            (
                f"{CORE}/rules/syncing.py",
                "    turn.concerned |= {source.name, receiver.name}\n",
                "    turn.concerned |= {source.name, receiver.name}\n"
                "    state.fleet.hold(receiver, edge.position)\n"
                "    state.fleet.move(receiver, 'ready', state.now)\n",
            ),
        ),
    ),
    Mutant(
        "settled when the checkpoint is ordered",
        1,
        (
            (
                f"{CORE}/rules/saving.py",
                "SavePoint(writer.name, state.lineages.committed, export, until)\n",
                "SavePoint(writer.name, state.lineages.committed, export, until)\n"
                "    state.lineages.settled = state.lineages.committed\n"
                "    state.lineages.path = f'checkpoints/{state.lineages.committed.step}'\n",
            ),
        ),
    ),
    Mutant(
        "a report of any attempt is taken",
        94,
        (
            (
                f"{CORE}/refusals.py",
                "if group is None or group.attempt != message.attempt:",
                "if group is None:",
            ),
            (
                f"{CORE}/refusals.py",
                "if (group.replica, group.incarnation) != (replica.name, replica.incarnation):",
                "if False:",
            ),
        ),
    ),
    Mutant(
        "a step is assigned again under the same attempt",
        0,
        ((f"{CORE}/steps.py", "        self.attempt += 1\n", "        self.attempt = max(self.attempt, 1)\n"),),
    ),
    Mutant(
        "the leases of a lost replica are forgotten",
        0,
        (
            (
                f"{CORE}/rules/losing.py",
                "    for group in state.ledger.held_by(replica.name):\n",
                "    for group in []:\n",
            ),
        ),
    ),
    Mutant(
        "leased again under the same attempt",
        4,
        ((f"{CORE}/ledger.py", "        group.attempt += 1\n", "        group.attempt = 1\n"),),
    ),
    Mutant(
        "acknowledged before it is on the disk",
        0,
        (
            (
                "services/controller/shell.py",
                "self._decided.durable[incoming.peer] = (envelope.sequence, incoming.session)",
                "self._bus.durable(incoming.peer, envelope.sequence, incoming.session)",
            ),
        ),
    ),
    Mutant(
        "payloads are not synced",
        0,
        (("services/controller/shell.py", "        self._spool.sync()\n", ""),),
    ),
    Mutant(
        "committed before the vote",
        0,
        (
            (
                f"{CORE}/rules/training.py",
                "not all(step.votes.get(n) for n in step.shares)",
                "any(not vote for vote in step.votes.values())",
            ),
        ),
    ),
    Mutant(
        "ready whatever the digest",
        1,
        ((f"{CORE}/rules/syncing.py", "if edge.loaded != publication.digest:", "if False:"),),
    ),
    Mutant(
        "nobody hears that a mesh was revoked",
        16,
        (
            (
                f"{CORE}/rules/syncing.py",
                "turn.send(state.fleet.replicas[name], RevokeMesh(epoch, cause))",
                "pass",
            ),
        ),
    ),
    Mutant(
        "no rollback when the state is lost",
        15,
        ((f"{CORE}/rules/losing.py", "    _roll_back(turn)\n    return True\n", "    return False\n"),),
    ),
    Mutant(
        "rolled back to the committed state",
        15,
        (
            (
                f"{CORE}/lineages.py",
                "Position(lineage, self.settled.version, self.settled.step)",
                "Position(lineage, self.committed.version, self.committed.step)",
            ),
        ),
    ),
    Mutant(
        "a snapshot that lacks its last event",
        0,
        (
            (
                "services/controller/journal.py",
                "_Snapshot(CORE_VERSION, self.number, _crc(self.number, state), state)",
                "_Snapshot(CORE_VERSION, self.number - 1, _crc(self.number - 1, state), state)",
            ),
        ),
    ),
    Mutant(
        "a replaced process may come back",
        6,
        ((f"{CORE}/fleet.py", "register.nonce in self.starts.get(register.replica, [])[:-1]", "False"),),
    ),
    Mutant(
        "gaps in a session are skipped",
        15,
        (("shared/bus/channel.py", "if sequence > self.received + 1:", "if sequence > self.received + 9:"),),
    ),
    Mutant(
        "a new session goes on with the old one's orders",
        0,
        (("shared/bus/session.py", "for item in self._channel.reset():", "for item in self._channel.reset()[:0]:"),),
    ),
    # bugs that the simulator found in the product, put back
    Mutant(
        "weights of another lineage count as the same",
        15,
        (
            (
                f"{CORE}/fleet.py",
                'current = f" {_weights(committed)}"',
                'current = f"/{committed.version}"',
            ),
        ),
    ),
    Mutant(
        "a discarded group keeps its slot",
        15,
        (
            (
                f"{CORE}/ledger.py",
                "        self._count_discard(lineage, cause)\n        self._remove(group)\n",
                "        self._count_discard(lineage, cause)\n"
                "        self._move(group, 'consumed') if group.state == 'leased' else self._remove(group)\n",
            ),
        ),
    ),
    Mutant(
        "neither the commit rule nor the due rule",
        19,
        (
            (
                f"{CORE}/rules/training.py",
                '    if last and batch.stage == "train":\n        least',
                "    if False:\n        least",
            ),
            (
                f"{CORE}/rules/training.py",
                "    due = state.version - turn.bound\n",
                "    due = -1\n",
            ),
        ),
    ),
    Mutant(
        "payloads freed while groups need them",
        0,
        ((f"{CORE}/ledger.py", "return min((place.segment", "return max((place.segment"),),
    ),
    Mutant(
        "the welcome of one process goes to another",
        65,
        (
            (
                "services/controller/shell.py",
                "self._registers[register.replica, register.rank, register.nonce] = incoming",
                "self._registers[register.replica, register.rank, 0] = incoming",
            ),
            (
                "services/controller/shell.py",
                "self._registers.pop((effect.replica, effect.rank, effect.nonce), None)",
                "self._registers.pop((effect.replica, effect.rank, 0), None)",
            ),
        ),
    ),
    Mutant(
        "the wall clock moves deadlines",
        8,
        (
            (
                "services/controller/shell.py",
                "return max(wall + self._clock.steady() - steady, self._core.state.now)",
                "return max(self._clock.wall(), self._core.state.now)",
            ),
        ),
    ),
    Mutant(
        "samples of unchecked weights are taken",
        1926,
        ((f"{CORE}/core.py", "report.newest > _checked_version(turn, group)", "False"),),
    ),
    Mutant(
        "sampling seeds follow from ids",
        14,
        (
            (
                f"{CORE}/ledger.py",
                'key = f"{self.seed}/{purpose}/{epoch}/{row}".encode()',
                'key = f"{self.seed}/{self.next_id}".encode()',
            ),
        ),
    ),
    Mutant(
        "a batch that was struck off whole stays",
        44,
        ((f"{CORE}/rules/training.py", "    if not batch.plan:\n", "    elif not batch.plan:\n"),),
    ),
    # bugs of partial rollout: groups that are handed over part-way
    Mutant(
        "a continued group's age is its new lease's",
        217,
        (
            (
                f"{CORE}/ledger.py",
                "return self.version if self.partial is None else min(self.version, self.partial.oldest)",
                "return self.version",
            ),
            (f"{CORE}/refusals.py", "    if oldest < group.sampled_at:\n", "    if oldest < 0:\n"),
        ),
    ),
    Mutant(
        "tokens are gone on from however old they are",
        217,
        (
            (
                f"{CORE}/rules/leasing.py",
                "if group.partial is not None and not _comes_in_time(turn, group.partial.oldest, version):",
                "if False:",
            ),
        ),
    ),
    Mutant(
        "payloads of leases that leave together are mixed up",
        6,
        (
            (
                f"{CORE}/outcome.py",
                "payload = [*before.payload, *effect.payload]",
                "payload = [*effect.payload, *before.payload]",
            ),
        ),
    ),
    Mutant(
        "what was handed over is freed",
        217,
        ((f"{CORE}/ledger.py", "for place in (g.spooled, g.partial_at) if", "for place in (g.spooled,) if"),),
    ),
    Mutant(
        "an acknowledged hand-over is forgotten",
        6,
        ((f"{CORE}/ledger.py", "group.partial, group.partial_at = partial, spooled\n", "pass\n"),),
    ),
    # bugs that only a run with evaluators of its own can have
    Mutant(
        "an evaluator gets new weights in mid-round",
        15,
        (
            (
                f"{CORE}/rules/syncing.py",
                "    return not _round_on_older_weights(turn) and round_due(turn) is not None\n",
                "    return True\n",
            ),
        ),
    ),
    Mutant(
        "a lost evaluator's rows are forgotten",
        35,
        (
            (
                f"{CORE}/rules/losing.py",
                '        if group.state == "leased":  # an earlier one may have taken its whole wave back already\n',
                '        if group.state == "leased" and replica.role != "evaluator":\n',
            ),
        ),
    ),
    Mutant(
        "a round that nobody can finish stays open",
        80,
        (
            (
                f"{CORE}/rules/judging.py",
                '    drop_round(turn, "round_cancelled")\n    return True\n',
                "    return False\n",
            ),
        ),
    ),
    Mutant(
        "training waits for every verdict",
        15,
        (
            (
                f"{CORE}/rules/judging.py",
                "return why is not None and (waits or turn.recipe.run.deterministic)",
                "return why is not None",
            ),
        ),
    ),
    Mutant(
        "rollouts get no weights while evaluators judge",
        19,
        (
            (
                f"{CORE}/rules/syncing.py",
                'return not _round_on_older_weights(turn) if judge else state.stages.name == "train"',
                'return not _round_on_older_weights(turn) and (judge or state.stages.name == "train")',
            ),
        ),
    ),
    Mutant(
        "a joiner is a member whatever its digest",
        41,
        ((f"{CORE}/rules/joining.py", "    if join.sent != join.received:\n", "    if False:\n"),),
    ),
    Mutant(
        "committed before the joiner has proved its state",
        85,
        ((f"{CORE}/rules/training.py", "    if undecided(turn):\n        return False\n", ""),),
    ),
    Mutant(
        "a policy joins in the middle of a batch",
        38,
        ((f"{CORE}/rules/members.py", "batch.index == 0 and _stands(turn, join)", "_stands(turn, join)"),),
    ),
    Mutant(
        "a step waits for ever for a mesh that was revoked",
        16,
        (
            (
                f"{CORE}/rules/joining.py",
                "step.mesh is None or step.mesh in state.meshes.meshes:",
                "step.mesh is None or True:",
            ),
        ),
    ),
    Mutant(
        "a policy that missed a commit stays as it is",
        8,
        ((f"{CORE}/rules/joining.py", "replica.name not in holding]", "False]"),),
    ),
    Mutant(
        "a step of several begins before their mesh has formed",
        8,
        (
            (
                f"{CORE}/rules/members.py",
                'if mesh is not None and mesh.state == "formed" else None',
                "if mesh is not None else None",
            ),
        ),
    ),
    Mutant(
        "processes of a lost replica of several ranks come back",
        0,
        ((f"{CORE}/fleet.py", "        return over or register.nonce in", "        return register.nonce in"),),
    ),
    Mutant(
        "ranks of several starts make a replica",
        0,
        (
            (
                f"{CORE}/fleet.py",
                "if replica is not None and replica.live and replica.nonce == register.nonce else None",
                "if replica is not None and replica.live and register.rank not in replica.pids else None",
            ),
        ),
    ),
    Mutant(
        "in a new term one rank speaks for all",
        1,
        ((f"{CORE}/core.py", "if not replica.confirmed and not replica.absent:", "if not replica.confirmed:"),),
    ),
    Mutant(
        "a replica loads with its first rank",
        0,
        (
            (
                f"{CORE}/core.py",
                'if replica.state == "joining" and not replica.missing:',
                'if replica.state == "joining":',
            ),
        ),
    ),
    Mutant(
        "only the silence of rank 0 is noticed",
        21,
        (
            (
                "services/controller/liveness.py",
                "if now - at > self._lost_after_s]",
                "if now - at > self._lost_after_s and not rank[2]]",
            ),
        ),
    ),
]


@contextmanager
def mutated(mutant: Mutant) -> Iterator[Path]:
    """A folder with a copy of the product that has this bug, and the simulator beside it."""
    with tempfile.TemporaryDirectory(prefix="orrery-mutant-") as name:
        folder = Path(name)
        for part in ("services/controller", "shared", "tests/simulation"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file, old, new in mutant.edits:
            path = folder / file
            text = path.read_text()
            if text.count(old) != 1:
                raise LookupError(
                    f"mutant {mutant.name!r}: expected its old text once in {file}, found it {text.count(old)} times; "
                    f"write the mutant anew for the code as it is now. The old text: {old!r}"
                )
            path.write_text(text.replace(old, new))
        yield folder


def run(folder: Path, first: int, seeds: int) -> subprocess.CompletedProcess[str]:
    """The simulator on these seeds, with the product in `folder`."""
    command = [sys.executable, "-m", "tests.simulation.simulate", f"--first={first}", f"--seeds={seeds}", "--brief"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def main() -> int:
    """Look for the seeds."""
    missed = 0
    for mutant in MUTANTS:
        if sys.argv[1:] and mutant.name not in sys.argv[1:]:
            continue
        with mutated(mutant) as folder:
            done = run(folder, 0, MOST_SEEDS)
        lines = [line for line in done.stdout.splitlines() if line.startswith("seed ")]
        if done.returncode == 1 and lines:
            print(f"{mutant.name}: {lines[0][:200]}", flush=True)
        else:
            missed += 1
            print(f"{mutant.name}: NOT CAUGHT {done.stdout[-300:]} {done.stderr[-600:]}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
