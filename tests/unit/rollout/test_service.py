"""The rollout service against a scripted controller: leases, weights, terms, and ways to leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from services.rollout.rewards_pool import RewardsPoolError
from shared.arrays import unpack
from shared.engines.base import EngineDied
from shared.messages import (
    Drain,
    GroupReport,
    Lease,
    LeaseRef,
    LeaseReturned,
    Leaving,
    LoadState,
    MeshFailed,
    Position,
    ReceiveWeights,
    Registered,
    ReplicaFailed,
    RevokeLease,
    RevokeMesh,
    Sampling,
    SendWeights,
    Shutdown,
    StateLoaded,
    WeightsFailed,
    WeightsLoaded,
    WeightsSent,
)
from shared.service import EXIT_DONE, EXIT_FATAL, EXIT_FENCED, EXIT_RESTART
from shared.serving.samples import completion_text
from tests.staged import stage
from tests.unit.rollout.scripted import Rig

MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[MakeRig]:
    rigs: list[Rig] = []

    def make(**rollout: object) -> Rig:
        rigs.append(Rig(tmp_path, **rollout))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    return make_rig()


def test_a_train_lease_becomes_a_report_with_its_arrays(rig: Rig) -> None:
    model = rig.ready(version=4)
    rig.tell(Lease([rig.grant(7, row=2)]))
    rig.until(lambda: bool(rig.bus.of(GroupReport)))
    (report,) = rig.bus.of(GroupReport)
    arrays = unpack(report.arrays, rig.bus.frames_of(report))
    assert list(arrays) == ["prompt", "tokens", "logprobs", "versions"]
    assert (report.group, report.attempt, report.lineage) == (7, 1, 0)
    assert (report.oldest, report.newest) == (4, 4)
    assert len(arrays["prompt"]) == report.prompt_length
    assert len(arrays["tokens"]) == len(arrays["logprobs"]) == len(arrays["versions"]) == sum(report.lengths)
    assert set(arrays["versions"].tolist()) == {4}
    assert set(report.parts) == {"verifier", "format"}
    assert report.rewards == [v + 0.5 * f for v, f in zip(*report.parts.values(), strict=True)]
    start = 0
    for length in report.lengths:
        tokens = arrays["tokens"][start : start + length].tolist()
        whole = torch.tensor([arrays["prompt"].tolist() + tokens])
        with torch.no_grad():
            expected = model(whole).logits[0, report.prompt_length - 1 : -1].log_softmax(-1)
        expected = expected.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        np.testing.assert_allclose(arrays["logprobs"][start : start + length], expected.numpy(), atol=1e-4)
        start += length
    assert rig.bus.leases == set()


def test_an_eval_lease_is_greedy_carries_no_arrays_and_is_worth_the_verifiers_score(rig: Rig) -> None:
    rig.ready()
    rig.tell(Lease([rig.grant(1, purpose="eval", row=3)]))
    rig.until(lambda: bool(rig.bus.of(GroupReport)))
    (report,) = rig.bus.of(GroupReport)
    assert report.arrays == []
    assert list(report.parts) == ["verifier"]
    assert len(report.rewards) == len(report.lengths) == 1


def test_a_group_leaves_a_line_that_a_person_can_read(rig: Rig) -> None:
    rig.ready()
    rig.tell(Lease([rig.grant(5, row=4)]))
    rig.until(lambda: bool(rig.bus.of(GroupReport)))
    (line,) = (rig.folder / "run" / "samples" / "rollout-0.jsonl").read_text().splitlines()
    sample = json.loads(line)
    assert "4 + 1?" in sample["prompt"] and sample["prompt"] != sample["question"]
    assert (sample["question"], sample["answer"]) == ("4 + 1?", "5")
    assert (sample["group"], sample["purpose"], sample["row"], sample["versions"]) == (5, "train", 4, [1, 1])
    assert len(sample["completions"]) == len(sample["rewards"]) == 3


def test_the_completion_text_lacks_the_stop_token_alone(rig: Rig) -> None:
    rig.ready()
    tokenizer = rig.service._tokenizer
    assert tokenizer is not None
    text = "<think>1+1=2</think><answer>2</answer>"
    tokens = np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    assert completion_text(tokenizer, tokens, truncated=False) == text
    assert completion_text(tokenizer, tokens[:-1], truncated=True) == text


def test_before_the_first_weights_leases_are_handed_back(rig: Rig) -> None:
    rig.service.start()
    rig.tell(LoadState("initial", Position(0, 0, 0), ""), Lease([rig.grant(1)]))
    assert rig.bus.of(StateLoaded) == [StateLoaded(Position(0, 0, 0))]
    assert [(r.group, r.cause) for r in rig.bus.of(LeaseReturned)] == [(1, "handed_back")]
    assert rig.bus.held is None


def test_a_lease_that_wants_newer_weights_or_another_lineage_is_handed_back(rig: Rig) -> None:
    rig.ready(version=2)
    rig.tell(Lease([rig.grant(1, version=3), rig.grant(2, lineage=1)]))
    assert [(r.group, r.cause) for r in rig.bus.of(LeaseReturned)] == [(1, "handed_back"), (2, "handed_back")]


@pytest.mark.parametrize(
    ("changes", "cause", "detail"),
    [
        ({"row": 8}, "prompt_too_long", "10 of 256 tokens are kept for the response"),
        ({"row": 9}, "row_invalid", "line 10"),
        ({"row": 99}, "row_invalid", "expected a row from 0 to 9, got 99"),
        ({"dataset": "other"}, "row_invalid", "expected data set 'other'"),
        ({"fingerprint": "f00"}, "row_invalid", "fingerprint f00"),
    ],
)
def test_a_row_that_cannot_be_asked_is_returned_with_its_cause_and_the_others_go_on(
    rig: Rig, changes: dict[str, object], cause: str, detail: str
) -> None:
    rig.ready()
    rig.tell(Lease([rig.grant(1, **changes), rig.grant(2)]))
    rig.until(lambda: bool(rig.bus.of(GroupReport)))
    (returned,) = rig.bus.of(LeaseReturned)
    assert (returned.group, returned.cause) == (1, cause)
    assert detail in returned.detail
    assert rig.bus.of(GroupReport)[0].group == 2
    assert rig.bus.leases == set()


def test_a_reward_that_fails_returns_its_group_and_no_other(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.ready()
    submit = rig.pool.submit
    rows = iter([99])  # the first sample is judged against a row that does not exist

    def misdirect(tag, dataset, row, completion, **more) -> None:
        submit(tag, dataset, next(rows, row), f"<answer>1</answer>{completion}", **more)

    monkeypatch.setattr(rig.pool, "submit", misdirect)
    rig.tell(Lease([rig.grant(1), rig.grant(2)]))
    rig.until(lambda: bool(rig.bus.of(GroupReport)) and bool(rig.bus.of(LeaseReturned)))
    (returned,) = rig.bus.of(LeaseReturned)
    assert returned.cause == "reward_failed"
    assert returned.detail.startswith("sample 0: row 99 of data set 'sums': reward part 'verifier': it raised Data")
    assert {returned.group, rig.bus.of(GroupReport)[0].group} == {1, 2}


def test_a_repeated_lease_is_ignored_while_in_hand_and_after_its_report(rig: Rig) -> None:
    rig.ready()
    lease = Lease([rig.grant(1)])
    rig.tell(lease)
    rig.tell(lease)
    rig.until(lambda: bool(rig.bus.of(GroupReport)))
    rig.tell(lease)
    assert rig.bus.leases == set()
    rig.tell(Lease([rig.grant(1, attempt=2)]))
    assert rig.bus.leases == {LeaseRef(1, 2)}
    rig.until(lambda: len(rig.bus.of(GroupReport)) == 2)


def test_a_revoked_lease_is_dropped_wherever_it_is(rig: Rig) -> None:
    rig.ready()
    rig.tell(Lease([rig.grant(1), rig.grant(2)]))
    assert rig.bus.leases == {LeaseRef(1, 1), LeaseRef(2, 1)}
    rig.tell(RevokeLease([LeaseRef(1, 1), LeaseRef(9, 9)], "deadline"))
    rig.until(lambda: bool(rig.bus.of(GroupReport)))
    assert [report.group for report in rig.bus.of(GroupReport)] == [2]
    assert rig.bus.of(LeaseReturned) == []


def test_in_a_new_term_leases_that_are_not_listed_are_void(rig: Rig) -> None:
    rig.ready()
    rig.tell(Lease([rig.grant(1), rig.grant(2)]))
    rig.tell(Registered(incarnation=1, leases=[LeaseRef(2, 1)]))
    assert rig.bus.leases == {LeaseRef(2, 1)}
    rig.until(lambda: bool(rig.bus.of(GroupReport)))
    assert [report.group for report in rig.bus.of(GroupReport)] == [2]


def test_weights_that_arrive_in_mid_flight_are_taken_up_by_the_running_samples(rig: Rig) -> None:
    rig.ready(version=1)
    long = Sampling(1.0, 1.0, 0, 200)
    rig.tell(Lease([rig.grant(1, sampling=long, samples=8)]))
    model, loaded = rig.sync(version=2)
    assert loaded.digest == stage(model).digest
    assert rig.bus.held == Position(0, 2, 2)
    rig.until(lambda: bool(rig.bus.of(GroupReport)))
    (report,) = rig.bus.of(GroupReport)
    assert (report.oldest, report.newest) == (1, 2)
    versions = unpack(report.arrays, rig.bus.frames_of(report))["versions"]
    start = 0
    for length in report.lengths:
        assert np.all(np.diff(versions[start : start + length]) >= 0)
        start += length


def test_weights_asked_for_again_are_answered_again(rig: Rig) -> None:
    rig.ready(version=3)
    (loaded,) = rig.bus.of(WeightsLoaded)
    rig.tell(ReceiveWeights(loaded.epoch, loaded.position))
    assert rig.bus.of(WeightsLoaded) == [loaded, loaded]


def test_the_weights_that_were_received_are_served_to_others_while_samples_run(rig: Rig) -> None:
    model = rig.ready(version=3)
    rig.tell(Lease([rig.grant(1, sampling=Sampling(1.0, 1.0, 0, 200), samples=8)]))
    epoch, received = rig.begin_relay(model)
    rig.tell(SendWeights(epoch, Position(0, 3, 3)))
    rig.until(lambda: bool(rig.bus.of(WeightsSent)))
    (sent,) = rig.bus.of(WeightsSent)
    assert (sent.epoch, sent.position, sent.digest) == (epoch, Position(0, 3, 3), stage(model).digest)
    assert received.result(60).digest == sent.digest
    rig.until(lambda: bool(rig.bus.of(GroupReport)))


def test_weights_that_this_replica_does_not_hold_are_not_served(rig: Rig) -> None:
    rig.ready(version=3)
    rig.tell(SendWeights(9, Position(0, 4, 4)))
    (failed,) = rig.bus.of(WeightsFailed)
    assert (failed.epoch, failed.position) == (9, Position(0, 4, 4))


def test_weights_of_a_new_lineage_send_the_old_lineages_groups_back(rig: Rig) -> None:
    rig.ready(version=5)
    rig.tell(Lease([rig.grant(1, sampling=Sampling(1.0, 1.0, 0, 200), samples=8)]))
    rig.sync(version=3, lineage=1)
    assert [(r.group, r.lineage, r.cause) for r in rig.bus.of(LeaseReturned)] == [(1, 0, "handed_back")]
    assert rig.bus.held == Position(1, 3, 3)
    assert rig.bus.leases == set()


def test_a_mesh_that_never_formed_fails_the_transfer_and_leaves_the_weights_alone(rig: Rig) -> None:
    rig.ready(version=1)
    rig.tell(ReceiveWeights(99, Position(0, 2, 2)))
    rig.until(lambda: bool(rig.bus.of(WeightsFailed)))
    (failed,) = rig.bus.of(WeightsFailed)
    assert (failed.epoch, failed.position) == (99, Position(0, 2, 2))
    assert "never formed" in failed.cause
    assert rig.bus.held == Position(0, 1, 1)


def test_a_revoked_mesh_ends_the_transfer_that_waits_on_it(rig: Rig) -> None:
    rig.ready(version=1)
    held_up = torch.nn.Linear(2, 2)  # a source whose weights do not fit this model
    message, sending = rig.begin_sync(held_up, version=2)
    rig.tell(message)
    rig.until(lambda: bool(rig.bus.of(WeightsFailed)))
    assert "do not fit this model" in rig.bus.of(WeightsFailed)[0].cause
    rig.tell(RevokeMesh(message.epoch, "the receiver refused"))
    rig.tell(ReceiveWeights(message.epoch, Position(0, 2, 2)))
    rig.until(lambda: len(rig.bus.of(WeightsFailed)) == 2)
    assert "the receiver refused" in rig.bus.of(WeightsFailed)[1].cause
    assert rig.bus.of(MeshFailed) == []
    sending.exception(60)


def test_with_nothing_to_do_the_loop_sleeps_in_receive_and_with_work_it_does_not(rig: Rig) -> None:
    rig.ready()
    rig.bus.waits.clear()
    rig.tell()
    assert rig.bus.waits[0] > 0.1
    assert rig.bus.state == "waiting"
    rig.tell(Lease([rig.grant(1)]))
    rig.bus.waits.clear()
    rig.service.turn()
    assert set(rig.bus.waits) == {0.0}
    assert rig.bus.state == "generating"


def test_a_deterministic_run_gives_equal_bits_however_the_leases_arrive(tmp_path: Path) -> None:
    bits = []
    for name, pause in (("a", 0), ("b", 3)):
        folder = tmp_path / name
        folder.mkdir()
        rig = Rig(folder, deterministic=True)
        rig.ready(version=1)
        # the second round arrives while the first is under way, earlier in one run than in the other
        rig.tell(Lease([rig.grant(1, row=1), rig.grant(2, row=2)]))
        for _ in range(pause):
            rig.service.turn()
        rig.tell(Lease([rig.grant(3, row=3), rig.grant(4, row=4)]))
        rig.until(lambda rig=rig: len(rig.bus.of(GroupReport)) == 4)
        reports = {report.group: rig.bus.frames_of(report) for report in rig.bus.of(GroupReport)}
        bits.append([reports[group] for group in (1, 2, 3, 4)])
        rig.close()
    assert bits[0] == bits[1]


def test_a_deterministic_run_never_mixes_two_lease_messages(make_rig: MakeRig) -> None:
    rig = make_rig(deterministic=True, slots=64)
    rig.ready()
    rig.tell(Lease([rig.grant(1), rig.grant(2)]), Lease([rig.grant(3)]))
    assert rig.service._generation is not None
    assert rig.service._generation.engine.stats().running <= 6
    rig.tell(RevokeLease([LeaseRef(1, 1), LeaseRef(2, 1)], "test"))
    rig.until(lambda: bool(rig.bus.of(GroupReport)))
    assert [report.group for report in rig.bus.of(GroupReport)] == [3]


def test_a_drain_finishes_what_nobody_else_can_go_on_with_takes_nothing_new_and_leaves(rig: Rig) -> None:
    rig.ready()
    rig.bus.inbox.extend([Lease([rig.grant(1, purpose="eval")]), Drain("scaled down"), Lease([rig.grant(2)])])
    assert rig.service.run() == EXIT_DONE
    assert [report.group for report in rig.bus.of(GroupReport)] == [1]
    assert [(r.group, r.cause) for r in rig.bus.of(LeaseReturned)] == [(2, "handed_back")]
    assert rig.bus.leases == set()


def test_asked_to_stop_it_tells_so_finishes_what_is_being_judged_and_leaves(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, answers = rig.pool.submit, []
    monkeypatch.setattr(rig.pool, "submit", lambda *which, **how: answers.append((which, how)))  # no verdict yet
    rig.ready()
    rig.tell(Lease([rig.grant(1)]))
    rig.until(lambda: len(rig.service._judging) == 1)
    rig.service.leave()
    rig.bus.inbox.append(Lease([rig.grant(2)]))
    for which, how in answers:
        submit(*which, **how)
    assert rig.service.run() == EXIT_DONE
    assert len(rig.bus.of(Leaving)) == 1
    assert [report.group for report in rig.bus.of(GroupReport)] == [1]
    assert [(r.group, r.cause) for r in rig.bus.of(LeaseReturned)] == [(2, "handed_back")]


def test_asked_a_second_time_it_hands_everything_back_at_once(rig: Rig) -> None:
    rig.ready()
    rig.tell(Lease([rig.grant(1), rig.grant(2)]))
    rig.service.leave()
    rig.service.leave()
    assert rig.service.run() == EXIT_DONE
    assert [(r.group, r.cause) for r in rig.bus.of(LeaseReturned)] == [(1, "handed_back"), (2, "handed_back")]
    assert rig.bus.leases == set()


def test_shutdown_ends_with_code_zero(rig: Rig) -> None:
    rig.bus.inbox.append(Shutdown("all batches are trained"))
    assert rig.service.run() == EXIT_DONE


def test_a_fenced_replica_ends_with_its_own_code(rig: Rig) -> None:
    rig.bus.fenced = True
    assert rig.service.run() == EXIT_FENCED


def test_a_model_that_cannot_be_made_ends_the_run_with_the_reason(rig: Rig) -> None:
    build = rig.recipe.model.build.model_copy(update={"heads": 3, "kv_heads": 2})
    model = rig.recipe.model.model_copy(update={"build": build})
    rig.service._recipe = rig.recipe.model_copy(update={"model": model})
    assert rig.service.run() == EXIT_FATAL
    (failed,) = rig.bus.of(ReplicaFailed)
    assert failed.fatal
    assert "kv_heads" in failed.cause


def test_rewards_that_cannot_start_end_the_run_with_the_reason(rig: Rig) -> None:
    rig.ready()
    (rig.folder / "sums.jsonl").unlink()
    rig.pool.close()
    rig.pool._broken = RewardsPoolError("3 reward workers in a row could not start; the last: no file")
    assert rig.service.run() == EXIT_FATAL
    assert "could not start" in rig.bus.of(ReplicaFailed)[0].cause


def test_a_dead_engine_ends_the_process_for_another_try_and_the_controller_hears_why(rig: Rig) -> None:
    rig.ready(version=1)
    engine = rig.service._generation.engine  # type: ignore[union-attr]

    def dead() -> list[object]:
        raise EngineDied("its worker 17 ended by signal 9")

    engine.advance = dead  # type: ignore[method-assign, assignment]
    assert rig.service.run() == EXIT_RESTART
    assert rig.bus.of(ReplicaFailed) == [ReplicaFailed("its worker 17 ended by signal 9", fatal=False)]
