"""Several members of one step: their reduced gradients are those of one process, over a real mesh."""

from __future__ import annotations

import threading
from itertools import filterfalse
from typing import Any

import pytest
import torch

from services.policy.reduce import reduce_gradients, reduce_metrics
from services.policy.speed import of_the_machine
from shared.messages import CommitStep


def together(*calls: Any) -> list[Any]:
    """Run each call in a thread; their results in order."""
    found: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        found[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.mark.parametrize("bucket", [1, 40, 1 << 20], ids=["one-by-one", "some", "all-in-one"])
def test_gradients_are_summed_whatever_the_bucket_size(pair: Any, bucket: int) -> None:
    shapes = [(3,), (2, 5), (1,), (4, 1, 2)]
    generator = torch.Generator().manual_seed(0)
    own = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in pair]
    expected = [left + right for left, right in zip(*own, strict=True)]
    together(*(lambda i=i: reduce_gradients(own[i], pair[i].meshes.get(1), bucket) for i in range(2)))
    for tensors in own:
        for tensor, wanted in zip(tensors, expected, strict=True):
            torch.testing.assert_close(tensor, wanted)


def test_metrics_are_summed_and_maxima_taken(pair: Any) -> None:
    sums, maxima = [{"x": 0.5, "y": 1.0}, {"x": 0.25, "y": -3.0}], [{"m": 2.0}, {"m": 7.0}]
    results = together(*(lambda i=i: reduce_metrics(sums[i], maxima[i], pair[i].meshes.get(1)) for i in range(2)))
    assert results == [({"x": 0.75, "y": -2.0}, {"m": 7.0})] * 2


def test_two_members_get_the_gradients_of_one_process_and_step_to_equal_bits(pair: Any, tools: Any) -> None:
    recipe = tools.recipe()
    alone = tools.trainer(recipe)
    vote = alone.compute(*tools.step(recipe))
    trainers = [tools.trainer(recipe, meshes=member.meshes.using) for member in pair]
    shares = [slice(0, 1), slice(1, 3)]
    votes = together(*(lambda i=i: trainers[i].compute(*tools.step(recipe, keep=shares[i], mesh=1)) for i in range(2)))
    for trainer in trainers:
        for name, gradient in tools.gradients(trainer).items():
            torch.testing.assert_close(gradient, tools.gradients(alone)[name], atol=1e-6, rtol=0)
        trainer.apply(CommitStep(0, 1, 0))
    for name, tensor in tools.weights(trainers[0]).items():
        assert torch.equal(tensor, tools.weights(trainers[1])[name]), name
    for name in filterfalse(of_the_machine, vote.metrics):
        assert votes[0].metrics[name] == votes[1].metrics[name] == pytest.approx(vote.metrics[name], abs=1e-5), name
    for member in votes:
        tokens = member.metrics["machine/tokens_per_s"] * member.metrics["train_seconds"]
        assert tokens == pytest.approx(vote.metrics["machine/tokens_per_s"] * vote.metrics["train_seconds"])
    assert votes[0].metrics["machine/peak_memory_bytes"] == votes[1].metrics["machine/peak_memory_bytes"]
