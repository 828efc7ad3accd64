"""A whole run in real processes, for tests: started as a person does, watched by what it leaves, ended without a trace.

Every process of a run inherits an environment variable of its own, so that whoever outlives the run is found, and
ended, by its process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from services.controller.audit import Audit, audit_run
from shared.records import read_journal

ROOT = Path(__file__).resolve().parents[2]
MARK = "ORRERY_TEST_RUN"
PATIENCE_S = 150.0
"""Longest wait for one event; many times what it takes, since the machine may be busy with other things."""
LOOK_S = 0.02
SUPERVISOR = "supervisor"

SUMS = [(a, b) for a in range(10) for b in range(10)]
RECIPE = """
[run]
name = "short"
seed = 1

[model.build]
hidden_size = 64
intermediate_size = 128
layers = 2
heads = 2
kv_heads = 1
head_dim = 32
context = 96

[data.sums]
kind = "jsonl"
path = "{rows}"

[sft]
dataset = "sums"
batches = 30
batch_size = 16
lr = 5e-3
warmup_steps = 3

[train]
dataset = "sums"
batches = 10
batch_size = 4
samples = 4
lr = 3e-4
filter_equal_rewards = false

[rollout]
slots = 16
max_new_tokens = 24

[[rewards.parts]]
kind = "exact"

[[rewards.parts]]
kind = "format"
weight = 0.5

[evaluation]
every = 100

[evaluation.suites.sums]
problems = 10
max_new_tokens = 24

[checkpoint]
every = 1000

[timeouts]
exit_s = 30.0
"""
"""Seconds of work: one-digit sums from a file. The only checkpoints are at the end of each stage."""


def write_recipe(folder: Path) -> Path:
    """RECIPE and its rows in `folder`; the path of the recipe."""
    rows = folder / "sums.jsonl"
    with rows.open("w") as file:
        for a, b in SUMS:
            response = f"<think>{a}+{b}={a + b}</think><answer>{a + b}</answer>"
            file.write(json.dumps({"prompt": f"{a}+{b}", "answer": a + b, "response": response}) + "\n")
    recipe = folder / "short.toml"
    recipe.write_text(RECIPE.format(rows=rows))
    return recipe


class Run:
    """One run folder and the processes that work on it. Use as a context manager, or call `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = uuid.uuid4().hex
        self._started: list[subprocess.Popen[bytes]] = []
        self.outputs = folder.parent / f"{folder.name}.out"

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- starting and ending -----------------------------------------------------------------------------------------

    def up(self, recipe: Path, *sets: str) -> Run:
        """`orrery up RECIPE --set ...`."""
        return self._supervise("up", str(recipe), "--run-folder", str(self.folder), *_options(sets))

    def resume(self, *sets: str) -> Run:
        """`orrery resume --set ...`."""
        return self._supervise("resume", str(self.folder), *_options(sets))

    def launch(self, *command: str, inside: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """Any `python -m ...` of this run, alone; `inside` is what starts commands in a namespace."""
        return self.begin(*inside, sys.executable, "-m", *command)

    def begin(self, *command: str) -> subprocess.Popen[bytes]:
        """Any command of this run."""
        environment = {**os.environ, MARK: self._mark, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.outputs.open("ab") as sink:
            process = subprocess.Popen(
                command,
                cwd=self.folder.parent,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def kill(self, role: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to the supervisor, or to the (first) process of a service; its process id."""
        if role == SUPERVISOR:
            pid = self._started[-1].pid
        else:
            self.wait_for(lambda: self.pids(role), f"a process of the {role}")
            pid = self.pids(role)[0]
        os.kill(pid, number)
        return pid

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one process of the run."""
        os.kill(pid, number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit code of the command that was started last."""
        self.wait_for(lambda: self._started[-1].poll() is not None, "the command's end", timeout_s)
        return self._started[-1].returncode

    def close(self) -> None:
        """End whatever still runs, by process id; a test that had to be cleaned up after is a failed one."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()
        for process in self.processes():
            process.kill()

    def _supervise(self, *arguments: str) -> Run:
        self.launch("deploy.cli", *arguments)
        return self

    # --- waiting ------------------------------------------------------------------------------------------------------

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Return once `condition` holds; fails with what the run did meanwhile when it never does."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}\n{self.story()}"
            time.sleep(LOOK_S)

    def wait_for_steps(self, count: int, stage: str, *, lineage: int = 1) -> None:
        """Until `count` steps of a stage are committed in a lineage, while the run goes on."""

        def there() -> bool:
            if len(self.steps(stage, lineage)) >= count:
                return True
            ended = self._started[-1].poll()
            assert ended is None, f"the run ended with code {ended} before step {count} of {stage}\n{self.story()}"
            return False

        self.wait_for(there, f"step {count} of stage {stage} in lineage {lineage}")

    # --- looking ------------------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Every live process that belongs to this run, whoever started it."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def commands(self) -> list[tuple[int, list[str]]]:
        """Process id and command line of every live process of this run; one that dies meanwhile is left out."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append((process.pid, process.cmdline()))
        return found

    def pids(self, role: str) -> list[int]:
        """Process ids of the services of a role."""
        return [pid for pid, command in self.commands() if f"services.{role}" in command]

    def pid_of(self, replica: str) -> int:
        """Process id of one replica."""
        found = [pid for pid, command in self.commands() if command[-2:] == ["--replica", replica]]
        assert len(found) == 1, f"{replica}: {found}\n{self.story()}"
        return found[0]

    def all_gone(self) -> bool:
        """Whether no process is left."""
        return not self.processes()

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl."""
        return [json.loads(line) for line in _whole_lines(self.folder / "metrics.jsonl")]

    def steps(self, stage: str, lineage: int) -> list[int]:
        """The committed steps of a stage in a lineage, in the order of the file."""
        return [line["step"] for line in self.metrics() if (line["stage"], line["lineage"]) == (stage, lineage)]

    def records(self) -> Iterator[dict[str, Any]]:
        """The journal's records."""
        return (record for _, record in read_journal(self.folder))

    def facts(self, name: str) -> list[dict[str, Any]]:
        """The journal's facts of one name, in order."""
        return [fact for record in self.records() for fact in record["facts"] if fact["type"] == name]

    def said(self, text: str) -> bool:
        """Whether the commands of this run printed `text`."""
        return text in self.outputs.read_text(errors="replace")

    def audit(self) -> Audit:
        """The audit of the journal as it is now."""
        return audit_run(self.folder)

    def config(self) -> dict[str, Any]:
        """The resolved recipe."""
        return tomllib.loads((self.folder / "config.toml").read_text())

    def story(self) -> str:
        """For a failed test: the ends of everything that was written."""
        parts = []
        logs = self.folder / "logs"
        for path in [self.outputs, self.folder / "metrics.jsonl", *sorted(logs.glob("*.out"))]:
            if path.exists():
                parts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]))
        running = [f"{pid} {' '.join(command)}" for pid, command in self.commands()]
        return "\n".join([*parts, "--- running", *running])

    # --- judging ------------------------------------------------------------------------------------------------------

    def assert_complete(self) -> Audit:
        """The run did all its steps, its books are clean, nobody is left; returns the audit."""
        audit, config = self.audit(), self.config()
        assert audit.clean, "\n".join(audit.lines())
        assert audit.outcome == "complete", "\n".join(audit.lines())
        lines = {(line["lineage"], line["step"]): line for line in self.metrics()}
        assert len(lines) == len(self.metrics()), "a step has two lines in metrics.jsonl"
        newest = {step: line for (_, step), line in sorted(lines.items())}
        assert list(newest) == list(range(len(newest)))
        steps = Counter(line["stage"] for line in newest.values())
        passes = config["train"]["mu"] * config["train"]["minibatches"]
        assert steps == {"sft": config["sft"]["batches"], "train": config["train"]["batches"] * passes}
        assert self.all_gone(), self.story()
        return audit


def _options(sets: tuple[str, ...]) -> list[str]:
    return [part for each in sets for part in ("--set", each)]


def _whole_lines(path: Path) -> list[str]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return text[: text.rfind("\n") + 1].splitlines()
