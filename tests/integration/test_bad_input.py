"""What a person sees when something cannot work: one error by `orrery up` itself, the right exit code, nothing lost.

docs/errors.md lists every row; those that need no process are in tests/unit/deploy/test_bad_input.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import NewRun
from tests.integration.run import SUPERVISOR, Run, signal, write_recipe

pytestmark = pytest.mark.integration

BAD_INPUT, FATAL = 2, 3
WAIT_S = 60.0


def assert_ends(run: Run, code: int, *words: str) -> None:
    """The command ends with `code` and one error that has all of `words`; no traceback, no restart, nobody left."""
    assert run.wait(WAIT_S) == code, run.story()
    said = run.outputs.read_text(errors="replace")
    errors = [line for line in said.splitlines() if line.startswith("error ")]
    assert len(errors) == 1, said
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in said
    assert "starting it again" not in said
    run.wait_for(run.all_gone, "the end of every process of the run", timeout_s=10)


def test_a_port_in_use(new_run: NewRun, recipe: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        run = new_run().up(recipe, f"bus.bind={address}")
        assert_ends(run, BAD_INPUT, address, "already in use", "bus.bind")


def test_an_address_off_loopback(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, "bus.bind=tcp://192.0.2.1:7000")
    assert_ends(run, BAD_INPUT, "192.0.2.1", "loopback")


def test_a_run_folder_that_holds_a_run(new_run: NewRun, recipe: Path) -> None:
    run = new_run()
    run.folder.mkdir()
    (run.folder / "config.toml").write_text("kept = true")
    assert_ends(run.up(recipe), BAD_INPUT, "holds a run already", "orrery resume")
    assert (run.folder / "config.toml").read_text() == "kept = true"


def test_a_run_folder_that_another_controller_uses(new_run: NewRun, recipe: Path) -> None:
    run = new_run()
    run.folder.mkdir()
    with (run.folder / "controller.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_ends(run.up(recipe), BAD_INPUT, str(run.folder), "another controller")


def test_a_run_that_is_running_already_goes_on(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe)
    run.wait_for(lambda: (run.folder / "controller.address").exists(), "the controller to listen", WAIT_S)
    with Run(run.folder) as second:
        second.outputs = run.folder.parent / "second.out"
        assert_ends(second.resume(), BAD_INPUT, "already run by process", "orrery down")
    assert run.pids("controller"), run.story()
    run.kill(SUPERVISOR, signal.SIGINT)
    assert run.wait(WAIT_S) == 130, run.story()


@pytest.mark.parametrize("place", ["/proc/nowhere/run", "file/run"], ids=["no-rights", "under-a-file"])
def test_a_place_that_cannot_be_written(new_run: NewRun, recipe: Path, place: str) -> None:
    (recipe.parent / "file").write_text("no folder")
    run = new_run()
    run.launch("deploy.cli", "up", str(recipe), "--run-folder", place)
    assert_ends(run, BAD_INPUT, f"run folder {place}", "can be made and written", "--run-folder")


def test_every_bad_row_is_found_before_anything_is_made(new_run: NewRun, recipe: Path) -> None:
    rows = recipe.parent / "sums.jsonl"
    lines = rows.read_text().splitlines()
    lines[57] = lines[57].replace('"prompt"', '"question"')
    rows.write_text("\n".join(lines))
    run = new_run().up(recipe)
    assert_ends(
        run, BAD_INPUT, "1 of 100 rows", "line 58", "column 'prompt'", "columns found: question", "mend the row"
    )
    assert not run.folder.exists()


def test_prompts_that_are_all_longer_than_the_model_takes(new_run: NewRun, recipe: Path) -> None:
    rows = recipe.parent / "sums.jsonl"
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    rows.write_text("\n".join(json.dumps(row | {"prompt": "1+" * 33 + row["prompt"]}) for row in read))
    run = new_run().up(recipe, "sft.batches=1")
    assert_ends(run, FATAL, "100 rows in a row", "a prompt of at most 72 tokens", "24 of 96 tokens are kept")
    assert run.audit().outcome == "failed"


def test_a_message_that_is_larger_than_the_bus_takes(new_run: NewRun, recipe: Path) -> None:
    run = new_run().up(recipe, "bus.max_message_mb=1", "sft.batch_size=6000", "sft.batches=1")
    assert_ends(run, FATAL, "at most 1048576 bytes", "bus.max_message_mb", "train.batch_size")


# --- a disk that is full ------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(new_run: NewRun) -> Iterator[Callable[[str], Run]]:
    """A run whose folder is a disk of its own; called again with another size, the disk grows to it."""
    run, mounted = new_run(), False

    def make(size: str) -> Run:
        nonlocal mounted
        run.folder.mkdir(exist_ok=True)
        options = f"remount,size={size}" if mounted else f"size={size}"
        answer = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(run.folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode:
            pytest.skip(f"a small disk wants the right to mount one: {answer.stderr.strip()}")
        mounted = True
        return run

    yield make
    run.close()
    if mounted:
        run.wait_for(run.all_gone, "the end of every process on the disk", timeout_s=10)
        subprocess.run(["umount", "-l", str(run.folder)], check=True)


needs_mount = pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="only root mounts a disk")


@needs_mount
def test_a_disk_that_fills_up_under_the_journal(small_disk: Callable[[str], Run], recipe: Path) -> None:
    run = small_disk("120k").up(recipe, "train.batches=2")
    assert run.wait(WAIT_S) == FATAL, run.story()
    said = run.outputs.read_text()
    assert f"error the run folder {run.folder} cannot be written" in said, said
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert "starting it again" not in said
    acknowledged = len(run.metrics())
    run.outputs.write_text("")
    small_disk("60m")
    assert run.resume().wait(WAIT_S) == 0, run.story()
    assert len(run.assert_complete().books[1].steps) >= acknowledged


@needs_mount
def test_a_disk_that_fills_up_under_the_checkpoints(small_disk: Callable[[str], Run], recipe: Path) -> None:
    run = small_disk("300k").up(recipe, "checkpoint.every=2")
    assert run.wait(WAIT_S) == FATAL, run.story()
    said = run.outputs.read_text()
    assert "checkpoints in a row could not be written" in said
    assert "No space left on device" in said
    assert "free space or mend the rights" in said
    assert "Traceback" not in said
    assert list((run.folder / "checkpoints").iterdir()) == []


# --- checkpoints that cannot be used ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run that was stopped with a checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    with Run(folder / "run") as run:
        run.up(write_recipe(folder))
        run.wait_for_steps(2, "sft")
        run.kill(SUPERVISOR, signal.SIGINT)
        assert run.wait(WAIT_S) == 130, run.story()
        yield run


def checkpoint_of(run: Run) -> Path:
    return run.folder / run.facts("settled")[-1]["path"]


def copied(stopped: Run, run: Run) -> Run:
    shutil.copytree(stopped.folder, run.folder)
    return run


def test_a_torn_checkpoint(stopped: Run, new_run: NewRun) -> None:
    run = copied(stopped, new_run())
    weights = checkpoint_of(run) / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert_ends(run.resume(), FATAL, str(checkpoint_of(run)), "model.safetensors of", "it is torn")
    assert weights.exists()


def test_a_checkpoint_of_another_model(stopped: Run, new_run: NewRun) -> None:
    run = copied(stopped, new_run())
    config = run.folder / "config.toml"
    config.write_text(config.read_text().replace("hidden_size = 64", "hidden_size = 32"))
    assert_ends(run.resume(), FATAL, str(checkpoint_of(run)), "it is of another model", "check [model] in the recipe")
    assert run.audit().clean
