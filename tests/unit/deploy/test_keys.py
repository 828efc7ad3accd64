"""`orrery keys`: files that others cannot read, changes that are whole, errors that say what to do."""

from __future__ import annotations

import multiprocessing
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deploy.checks.recipe import look
from deploy.cli import console
from deploy.cli.app import app
from deploy.keys import add_key, list_keys, make_keys, remove_key, renew_key
from shared.bus import KeysRefused
from shared.bus.keys import ALLOWED, VARIABLE, read_allowed, read_pair
from shared.config import load_recipe

Orrery = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def orrery(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Orrery:
    """Runs a command in `tmp_path`; `output` is what it printed, `exception` what the command line would tell."""
    from rich.console import Console

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)

    def run(*words: str) -> Result:
        for name in ("out", "err"):
            monkeypatch.setattr(console, name, Console(width=200, color_system=None, highlight=False, soft_wrap=True))
        return CliRunner().invoke(app, list(words))

    return run


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_are_private_whatever_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_keys(tmp_path / "keys")
        add_key(tmp_path / "keys", "rollout-1")
    finally:
        os.umask(before)
    assert mode(tmp_path / "keys") == 0o700
    files = sorted((tmp_path / "keys").iterdir())
    names = ["allowed.keys", "controller.key", "evaluator.key", "person.key", "policy.key", "rollout-1.key"]
    assert [path.name for path in files] == [*names, "rollout.key"]
    assert {mode(path) for path in files} == {0o600}


def test_making_keys_again_changes_nothing_and_adds_what_is_missing(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert make_keys(folder) == []
    assert make_keys(folder, ("policy", "rollout-3")) == ["rollout-3"]
    allowed = before.pop(folder / ALLOWED).decode()
    assert {path: path.read_bytes() for path in before} == before
    assert (folder / ALLOWED).read_text().startswith(allowed)


def test_a_removed_name_is_off_the_list_and_its_secret_gone(folder: Path) -> None:
    remove_key(folder, "rollout")
    assert "rollout" not in read_allowed(folder / ALLOWED).values()
    assert not (folder / "rollout.key").exists()
    with pytest.raises(KeysRefused, match="rollout is not on the list of .*; on it: evaluator, person, policy"):
        remove_key(folder, "rollout")


def test_a_renewed_key_is_another_one_under_the_same_name(folder: Path) -> None:
    old = read_pair(folder / "policy.key")
    renew_key(folder, "policy")
    new = read_pair(folder / "policy.key")
    assert new["public"] != old["public"] and new["controller"] == old["controller"]
    names = read_allowed(folder / ALLOWED)
    assert names[new["public"]] == "policy" and old["public"] not in names


def test_a_name_gets_no_second_key(folder: Path) -> None:
    with pytest.raises(KeysRefused, match="policy has a key .*orrery keys renew policy"):
        add_key(folder, "policy")


def test_a_folder_that_others_can_look_into_is_not_used(folder: Path) -> None:
    folder.chmod(0o755)
    for act in (lambda: make_keys(folder), lambda: add_key(folder, "rollout-1"), lambda: list_keys(folder)):
        with pytest.raises(KeysRefused, match=rf"folder {folder}: expected mode 0700, got 0755; run 'chmod 700"):
            act()


def test_a_lost_key_of_the_controller_is_not_replaced_behind_its_clients_backs(folder: Path) -> None:
    (folder / "controller.key").unlink()
    with pytest.raises(KeysRefused, match="expected controller.key beside allowed.keys, found none"):
        make_keys(folder)


def _add(folder: Path, number: int) -> None:
    add_key(folder, f"rollout-{number}")


def test_commands_at_the_same_time_lose_nobody(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add, args=(folder, number)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert {f"rollout-{number}" for number in range(6)} <= set(read_allowed(folder / ALLOWED).values())


def test_the_commands_say_what_they_did_and_show_no_secret(orrery: Orrery, tmp_path: Path) -> None:
    made = orrery("keys", "make")
    assert made.exit_code == 0
    assert "controller, policy, rollout, evaluator, person" in made.output
    assert f'bus.keys = "{tmp_path / "keys"}"' in made.output
    assert "has them all" in orrery("keys", "make").output
    assert orrery("keys", "add", "rollout-1").exit_code == 0
    assert orrery("keys", "add", "person-alice").exit_code == 0
    (tmp_path / "keys" / "rollout-1.key").unlink()
    shown = orrery("keys", "list").output
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert "any rollout-N" in lines["rollout"]
    assert "rollout-1 alone" in lines["rollout-1"] and "handed over" in lines["rollout-1"]
    assert "a person, or a launcher" in lines["person-alice"]
    pairs = {path.stem: read_pair(path) for path in (tmp_path / "keys").glob("*.key")}
    assert all(pair["public"] in lines[name] and pair["secret"] not in shown for name, pair in pairs.items())
    assert orrery("keys", "renew", "person-alice").exit_code == 0
    assert orrery("keys", "remove", "person-alice").exit_code == 0
    assert "person-alice" not in orrery("keys", "list").output


def test_the_variable_says_where_keys_lie(orrery: Orrery, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    orrery("keys", "make")
    assert (tmp_path / "elsewhere" / "controller.key").exists()
    assert not (tmp_path / "keys").exists()


def test_a_recipe_is_told_of_its_keys_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    quickstart = Path(__file__).parents[3] / "recipes" / "quickstart.toml"

    def faults(*overrides: str) -> list[str]:
        found = look(load_recipe(quickstart, overrides), starting=True).faults
        return [fault for fault in found if "bus" in fault]

    everywhere = 'bus.bind="tcp://0.0.0.0:*"'
    (fault,) = faults(everywhere)
    assert "expected a loopback address" in fault and "orrery keys make" in fault
    make_keys(tmp_path / "keys")
    assert faults(everywhere, "bus.keys=keys") == []
    remove_key(tmp_path / "keys", "person")
    (fault,) = faults(everywhere, "bus.keys=keys")
    assert "expected a file of keys" in fault and "person.key" in fault
