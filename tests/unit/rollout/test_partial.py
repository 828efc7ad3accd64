"""Partial rollout in the service: whoever leaves hands over its tokens, and the next replica goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from shared.arrays import unpack
from shared.bus import Delivery
from shared.messages import Drain, Grant, GroupReport, Lease, LeaseReturned, Sampling
from shared.service import EXIT_DONE
from tests.unit.rollout.scripted import Rig

LONG = Sampling(1.0, 1.0, 0, 200)
MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[MakeRig]:
    rigs: list[Rig] = []

    def make(**rollout: object) -> Rig:
        folder = tmp_path / str(len(rigs))
        folder.mkdir()
        rigs.append(Rig(folder, **rollout))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def leave(rig: Rig) -> None:
    rig.bus.inbox.append(Drain("scaled down"))
    assert rig.service.run() == EXIT_DONE
    assert rig.bus.leases == set()


def returned(rig: Rig) -> dict[int, LeaseReturned]:
    return {message.group: message for message in rig.bus.of(LeaseReturned)}


def arrays_of(rig: Rig, message: LeaseReturned | GroupReport) -> dict[str, np.ndarray]:
    headers = message.arrays if isinstance(message, GroupReport) else message.partial.arrays  # type: ignore[union-attr]
    return unpack(headers, rig.bus.frames_of(message))


def next_lease(rig: Rig, begun: Rig, *groups: int, **fields: Any) -> Delivery:
    """The next attempt at these groups, with what `begun` has handed over of them."""
    handed = [returned(begun)[group] for group in groups]
    fields |= {"attempt": 2, "sampling": LONG}
    grants = [rig.grant(each.group, row=each.group % 8, partial=each.partial, **fields) for each in handed]
    return Delivery(Lease(grants), [frame for message in handed for frame in begun.bus.frames_of(message)])  # type: ignore[arg-type]


def split(flat: np.ndarray, lengths: list[int]) -> list[list[float]]:
    return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]


def true_logprobs(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        scores = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return scores.gather(1, torch.tensor(tokens)[:, None]).squeeze(1).numpy()


def half_way(rig: Rig, *groups: int, version: int = 4, turns: int = 6, **fields: Any) -> PreTrainedModel:
    """A rollout in the middle of its samples."""
    model = rig.ready(version)
    rig.tell(Lease([rig.grant(group, row=group % 8, sampling=LONG, **fields) for group in groups]))
    for _ in range(turns):
        rig.service.turn()
    return model


def test_a_drain_hands_over_the_tokens_so_far_at_once_and_another_replica_goes_on_from_them(make_rig: MakeRig) -> None:
    first, second = make_rig(), make_rig()
    model = half_way(first, 7)
    leave(first)
    assert first.bus.of(GroupReport) == []
    handed = returned(first)[7]
    assert handed.partial is not None
    assert (handed.cause, handed.partial.oldest, handed.partial.newest) == ("handed_back", 4, 4)
    begun = arrays_of(first, handed)
    assert list(begun) == ["tokens", "logprobs", "versions"]
    assert all(1 <= length <= 10 for length in handed.partial.lengths)

    second.ready(4)
    second.sync(5, seed=4)  # the same weights under a newer version
    second.bus.inbox.append(next_lease(second, first, 7, version=5))
    second.until(lambda: bool(second.bus.of(GroupReport)))
    (report,) = second.bus.of(GroupReport)
    assert (report.attempt, report.oldest, report.newest) == (2, 4, 5)
    whole = arrays_of(second, report)
    prompt = whole["prompt"].tolist()
    for name in ("tokens", "logprobs", "versions"):
        parts = split(begun[name], handed.partial.lengths)
        for part, sample in zip(parts, split(whole[name], report.lengths), strict=True):
            assert sample[: len(part)] == part
    tokens, logprobs = (split(whole[name], report.lengths) for name in ("tokens", "logprobs"))
    for mine, known in zip(tokens, logprobs, strict=True):
        np.testing.assert_allclose(known, true_logprobs(model, prompt, mine), atol=1e-4)  # type: ignore[arg-type]
    assert len({tuple(sample) for sample in tokens}) == 3


def test_the_seed_draws_what_it_would_have_drawn_without_the_hand_over(make_rig: MakeRig) -> None:
    alone, first, second = make_rig(), make_rig(), make_rig()
    half_way(alone, 7)
    alone.until(lambda: bool(alone.bus.of(GroupReport)))
    half_way(first, 7)
    leave(first)
    second.ready(4)
    second.bus.inbox.append(next_lease(second, first, 7))
    second.until(lambda: bool(second.bus.of(GroupReport)))
    told = [arrays_of(rig, rig.bus.of(GroupReport)[0])["tokens"].tolist() for rig in (alone, second)]
    assert told[0] == told[1]


def test_the_frames_of_several_grants_are_told_apart_and_known_attempts_take_theirs(make_rig: MakeRig) -> None:
    first, second = make_rig(), make_rig()
    half_way(first, 1, 2, 3)
    leave(first)
    second.ready(4)
    second.bus.inbox.append(next_lease(second, first, 2))
    second.service.turn()
    second.bus.inbox.append(next_lease(second, first, 1, 2, 3))
    second.until(lambda: len(second.bus.of(GroupReport)) == 3)
    for report in second.bus.of(GroupReport):
        handed = returned(first)[report.group]
        assert handed.partial is not None
        begun = split(arrays_of(first, handed)["tokens"], handed.partial.lengths)
        whole = split(arrays_of(second, report)["tokens"], report.lengths)
        assert [sample[: len(part)] for part, sample in zip(begun, whole, strict=True)] == begun


def test_what_waits_for_its_rewards_is_handed_over_whole_and_the_next_replica_only_judges_it(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_rig(), make_rig()
    monkeypatch.setattr(first.pool, "submit", lambda *_, **__: None)  # no verdict comes
    first.ready(4)
    first.tell(Lease([first.grant(7)]))
    first.until(lambda: len(first.service._judging) == 1)
    first.service.leave()
    first.service.leave()
    assert first.service.run() == EXIT_DONE
    handed = returned(first)[7]
    assert handed.partial is not None
    second.ready(4)
    second.sync(5)
    grant = second.grant(7, attempt=2, version=5, partial=handed.partial)
    second.bus.inbox.append(Delivery(Lease([grant]), first.bus.frames_of(handed)))  # type: ignore[arg-type]
    second.until(lambda: bool(second.bus.of(GroupReport)))
    (report,) = second.bus.of(GroupReport)
    assert arrays_of(second, report)["tokens"].tolist() == arrays_of(first, handed)["tokens"].tolist()
    assert (report.oldest, report.newest) == (4, 5), "no token was sampled under this lease, whose version is 5"


def test_whoever_adds_nothing_hands_back_nothing_and_the_controller_keeps_what_it_has(make_rig: MakeRig) -> None:
    first, second = make_rig(), make_rig()
    half_way(first, 7)
    leave(first)
    second.ready(4)
    second.bus.inbox.append(next_lease(second, first, 7))
    leave(second)
    assert [(r.cause, r.partial) for r in second.bus.of(LeaseReturned)] == [("handed_back", None)]


def test_a_second_hand_over_holds_the_tokens_of_both(make_rig: MakeRig) -> None:
    first, second = make_rig(), make_rig()
    half_way(first, 7)
    leave(first)
    second.ready(4)
    second.sync(6)
    second.bus.inbox.append(next_lease(second, first, 7))
    for _ in range(4):
        second.service.turn()
    leave(second)
    handed, again = returned(first)[7], returned(second)[7]
    assert handed.partial is not None and again.partial is not None
    assert (again.partial.oldest, again.partial.newest) == (4, 6)
    for name in ("tokens", "logprobs", "versions"):
        before = split(arrays_of(first, handed)[name], handed.partial.lengths)
        after = split(arrays_of(second, again)[name], again.partial.lengths)
        assert all(new[: len(old)] == old and len(new) > len(old) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("rollout", [{"deterministic": True}, {"in_flight": "abort"}])
def test_where_samples_are_of_one_version_a_drain_finishes_them_and_hands_over_nothing(
    make_rig: MakeRig, rollout: dict[str, object]
) -> None:
    rig = make_rig(**rollout)
    half_way(rig, 7)
    leave(rig)
    assert [report.group for report in rig.bus.of(GroupReport)] == [7]
    late = make_rig(**rollout)
    half_way(late, 7)
    late.service.leave()
    late.service.leave()
    assert late.service.run() == EXIT_DONE
    assert [(r.cause, r.partial) for r in late.bus.of(LeaseReturned)] == [("handed_back", None)]


def test_tokens_that_do_not_fit_their_lengths_are_handed_back_with_the_reason(make_rig: MakeRig) -> None:
    first, second = make_rig(), make_rig()
    half_way(first, 7)
    leave(first)
    second.ready(4)
    lease = next_lease(second, first, 7)
    (grant,) = lease.message.grants  # type: ignore[union-attr]
    assert isinstance(grant, Grant) and grant.partial is not None
    wrong = msgspec.structs.replace(grant.partial, lengths=[length + 1 for length in grant.partial.lengths])
    grant = msgspec.structs.replace(grant, partial=wrong)
    second.bus.inbox.append(Delivery(Lease([grant]), lease.frames))  # type: ignore[arg-type]
    second.service.turn()
    (back,) = second.bus.of(LeaseReturned)
    assert (back.cause, back.partial) == ("handed_back", None)
    assert "expected arrays of sizes" in back.detail
