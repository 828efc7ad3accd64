"""Files of keys: what is read, what is refused and how it is said, and who may speak with which key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.keys import add_key, make_keys, renew_key
from shared.bus import KeysRefused, keys_place
from shared.bus.keys import (
    ALLOWED,
    VARIABLE,
    check_name,
    client_keys,
    controller_keys,
    read_allowed,
    read_pair,
    speaks_for,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.mark.parametrize(
    ("name", "speaks", "silent"),
    [
        ("rollout", ["rollout-0", "rollout-17"], ["rollout", "policy-0", "person", "rollouts-1", "controller"]),
        ("rollout-1", ["rollout-1"], ["rollout-0", "rollout-11", "rollout", "person"]),
        ("person", ["person"], ["rollout-0", "person-alice"]),
        ("person-alice", ["person"], ["person-alice", "policy-0"]),
    ],
)
def test_a_key_stands_for_a_role_a_replica_or_a_person(name: str, speaks: list[str], silent: list[str]) -> None:
    assert all(speaks_for(name, sender) for sender in speaks)
    assert not any(speaks_for(name, sender) for sender in silent)


@pytest.mark.parametrize(
    "name", ["controller", "bob", "", "rollout-", "../person", "rollout/1", "rollout-1\n", "Policy"]
)
def test_other_names_get_no_key(name: str) -> None:
    with pytest.raises(KeysRefused, match="cannot have a key: expected a role"):
        check_name(name)


def test_a_replica_takes_its_own_key_before_that_of_its_role(folder: Path) -> None:
    assert client_keys(folder, "rollout-1").name == "rollout"
    add_key(folder, "rollout-1")
    mine = client_keys(folder, "rollout-1")
    assert (mine.name, mine.controller) == ("rollout-1", controller_keys(folder).public)
    assert client_keys(folder, "rollout-2").name == "rollout"
    assert client_keys(folder / "rollout.key", "rollout-3").name == "rollout", "a file does as well as a folder"


def test_the_list_has_every_public_key(folder: Path) -> None:
    names = read_allowed(folder / ALLOWED)
    assert sorted(names.values()) == ["evaluator", "person", "policy", "rollout"]
    assert names[read_pair(folder / "policy.key")["public"]] == "policy"


def test_the_variable_goes_before_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert keys_place(None) is None
    assert keys_place(str(tmp_path)) == tmp_path
    monkeypatch.setenv(VARIABLE, "/run/secrets")
    assert keys_place(str(tmp_path)) == Path("/run/secrets")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606, 0o660, 0o601])
def test_a_file_that_others_may_use_is_refused_by_name(folder: Path, mode: int) -> None:
    for name, read in (
        ("rollout.key", lambda: client_keys(folder, "rollout-0")),
        (ALLOWED, lambda: controller_keys(folder)),
    ):
        path = folder / name
        path.chmod(mode)
        with pytest.raises(KeysRefused, match=rf"{path}: expected mode 0600, got {mode:04o}.*chmod 600"):
            read()
        path.chmod(0o400)
        read()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_that_others_may_write_to_is_refused_by_name(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(KeysRefused, match=rf"folder {folder}: expected mode 0700, got {mode:04o}"):
        client_keys(folder, "rollout-0")


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away wants root")
def test_a_file_of_another_user_is_refused(folder: Path) -> None:
    os.chown(folder / "rollout.key", 1234, 1234)
    with pytest.raises(KeysRefused, match="expected a file of user 0, got one of user 1234"):
        client_keys(folder, "rollout-0")


def test_what_is_no_key_is_refused_without_quoting_it(folder: Path) -> None:
    path = folder / "rollout.key"
    secret = read_pair(path)["secret"]
    for text in (
        f'secret = "{secret}',
        f'name = "rollout"\npublic = "short"\nsecret = "{secret}"',
        f'secret = "{secret}"',
    ):
        path.write_text(text)
        with pytest.raises(KeysRefused, match=str(path)) as refused:
            client_keys(folder, "rollout-0")
        assert secret not in str(refused.value)


def test_missing_keys_say_where_they_were_looked_for_and_what_makes_them(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeysRefused, match=r"none; 'orrery keys make .*nowhere' makes it"):
        controller_keys(tmp_path / "nowhere")
    (folder / "policy.key").unlink()
    with pytest.raises(KeysRefused, match=rf"expected a file of keys at {folder}/policy.key, found none"):
        client_keys(folder, "policy-0")


def test_a_key_of_somebody_else_is_refused_before_anything_is_connected(folder: Path) -> None:
    with pytest.raises(KeysRefused, match="expected a key of policy-0 or policy, got that of rollout"):
        client_keys(folder / "rollout.key", "policy-0")


def test_two_names_cannot_share_a_key(folder: Path) -> None:
    public = read_pair(folder / "policy.key")["public"]
    path = folder / ALLOWED
    path.write_text(path.read_text() + f'"rollout-1" = "{public}"\n')
    with pytest.raises(KeysRefused, match="policy and rollout-1 share one|rollout-1 and policy share one"):
        read_allowed(path)


def test_another_key_of_the_controller_reaches_the_files_of_all(folder: Path) -> None:
    before = {name: client_keys(folder, sender) for name, sender in (("policy", "policy-0"), ("person", "person"))}
    renew_key(folder, "controller")
    for name, old in before.items():
        new = client_keys(folder / f"{name}.key", "person" if name == "person" else "policy-0")
        assert (new.public, new.secret) == (old.public, old.secret)
        assert new.controller == controller_keys(folder).public != old.controller
