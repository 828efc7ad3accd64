"""Rendezvous values: for forming meshes only, and no question waits for ever."""

from __future__ import annotations

from services.controller.rendezvous import MOST_BYTES, MOST_KEYS, Rendezvous
from shared.messages import Refused, StoreGet, StoreSet, StoreValue

Answers = list[StoreValue | Refused]


def test_a_value_that_is_there_is_answered_at_once() -> None:
    rendezvous, answers = Rendezvous(), Answers()
    rendezvous.open(1)
    rendezvous.set(StoreSet(1, "rank0", b"here"), answers.append)
    rendezvous.get(StoreGet(1, "rank0", 5.0), 0.0, answers.append)
    assert answers == [StoreValue(1, "rank0", b"here")] * 2


def test_a_question_waits_until_its_value_comes() -> None:
    rendezvous, answers, writer = Rendezvous(), Answers(), Answers()
    rendezvous.open(1)
    for _ in range(2):
        rendezvous.get(StoreGet(1, "rank0", 5.0), 0.0, answers.append)
    assert answers == []
    rendezvous.set(StoreSet(1, "rank0", b"here"), writer.append)
    assert answers == [StoreValue(1, "rank0", b"here")] * 2
    rendezvous.expire(100.0)
    assert len(answers) == 2


def test_a_question_whose_wait_runs_out_is_answered_with_nothing() -> None:
    rendezvous, answers = Rendezvous(), Answers()
    rendezvous.open(1)
    rendezvous.get(StoreGet(1, "rank0", 5.0), 10.0, answers.append)
    rendezvous.expire(14.9)
    assert answers == []
    rendezvous.expire(15.0)
    rendezvous.expire(16.0)
    assert answers == [StoreValue(1, "rank0", None)]


def test_meshes_that_do_not_form_are_refused_by_name() -> None:
    rendezvous, answers = Rendezvous(), Answers()
    rendezvous.set(StoreSet(7, "k", b""), answers.append)
    rendezvous.get(StoreGet(7, "k", 5.0), 0.0, answers.append)
    assert [answer.fault for answer in answers if isinstance(answer, Refused)] == ["epoch", "epoch"]


def test_who_still_waits_is_told_when_the_mesh_is_given_up() -> None:
    rendezvous, answers = Rendezvous(), Answers()
    rendezvous.open(1)
    rendezvous.open(2)
    rendezvous.get(StoreGet(1, "k", 5.0), 0.0, answers.append)
    rendezvous.get(StoreGet(2, "k", 5.0), 0.0, answers.append)
    rendezvous.close(1)
    assert [type(answer) for answer in answers] == [Refused]
    rendezvous.set(StoreSet(1, "k", b"late"), answers.append)
    assert isinstance(answers[-1], Refused)


def test_epochs_do_not_see_each_others_values() -> None:
    rendezvous, answers = Rendezvous(), Answers()
    rendezvous.open(1)
    rendezvous.open(2)
    rendezvous.set(StoreSet(1, "k", b"one"), answers.append)
    rendezvous.get(StoreGet(2, "k", 5.0), 0.0, answers.append)
    assert answers == [StoreValue(1, "k", b"one")]


def test_a_store_is_bounded() -> None:
    rendezvous, answers = Rendezvous(), Answers()
    rendezvous.open(1)
    rendezvous.set(StoreSet(1, "big", b"x" * (MOST_BYTES + 1)), answers.append)
    assert isinstance(answers[-1], Refused) and answers[-1].fault == "too_large"
    for number in range(MOST_KEYS):
        rendezvous.set(StoreSet(1, str(number), b""), answers.append)
    assert isinstance(answers[-1], StoreValue)
    rendezvous.set(StoreSet(1, "one more", b""), answers.append)
    assert isinstance(answers[-1], Refused) and answers[-1].fault == "too_large"


def test_setting_a_value_again_is_no_error_even_in_a_full_store() -> None:
    rendezvous, answers = Rendezvous(), Answers()
    rendezvous.open(1)
    for number in range(MOST_KEYS):
        rendezvous.set(StoreSet(1, str(number), b"v"), answers.append)
    rendezvous.set(StoreSet(1, "5", b"v"), answers.append)
    assert answers[-1] == StoreValue(1, "5", b"v")
