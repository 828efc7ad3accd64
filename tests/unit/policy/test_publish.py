"""Publishing: what goes out is the copy of the moment, over a real mesh."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from services.policy.publish import Publisher
from shared.messages import MeshFailed, Position, RevokeMesh, SendWeights, WeightsFailed, WeightsSent
from shared.weights import digest_of, manifest_of, receive_weights
from shared.weights.staging import named_weights

BUCKET = 1 << 12


@pytest.fixture
def model(tools: Any) -> Any:
    return tools.trainer(tools.recipe()).model


def publisher(member: Any) -> Publisher:
    return Publisher(member.meshes, member.sent.put, BUCKET)


def test_a_receiver_gets_the_weights_of_the_moment_though_training_goes_on(pair: Any, tools: Any, model: Any) -> None:
    source, receiver = pair
    digest, manifest = digest_of(named_weights(model)), manifest_of(model)
    publisher(source).publish(SendWeights(1, tools.start), model, tools.start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert receive_weights(manifest, receiver.meshes.get(1), BUCKET).digest == digest
    sent = source.next()
    assert isinstance(sent, WeightsSent) and (sent.epoch, sent.position, sent.digest) == (1, tools.start, digest)
    assert sent.bytes > sum(p.nbytes for p in model.parameters())


def test_a_position_that_is_not_held_is_refused(pair: Any, tools: Any, model: Any) -> None:
    publisher(pair[0]).publish(SendWeights(1, Position(0, 5, 5)), model, tools.start)
    failed = pair[0].next()
    assert isinstance(failed, WeightsFailed) and "this replica holds" in failed.cause


def test_a_repeated_command_is_answered_again_and_not_sent_again(pair: Any, tools: Any, model: Any) -> None:
    source, receiver = pair
    publishing = publisher(source)
    publishing.publish(SendWeights(1, tools.start), model, tools.start)
    receive_weights(manifest_of(model), receiver.meshes.get(1), BUCKET)
    sent = source.next()
    publishing.publish(SendWeights(1, tools.start), model, tools.start)
    assert source.next() == sent


def test_a_late_receiver_is_served_the_published_version_in_the_middle_of_the_next(
    pair: Any, tools: Any, model: Any
) -> None:
    source, receiver = pair
    publishing = publisher(source)
    for _ in range(2):  # the second time as for a new epoch: the weights have moved on meanwhile
        publishing._transfers.clear()
        publishing.publish(SendWeights(1, tools.start), model, tools.start)
        received = receive_weights(manifest_of(model), receiver.meshes.get(1), BUCKET)
        assert received.digest == source.next().digest
        with torch.no_grad():
            next(model.parameters()).add_(1.0)


def test_a_revoked_mesh_fails_the_transfer(pair: Any, tools: Any, model: Any) -> None:
    source, _ = pair
    source.meshes.revoke(RevokeMesh(1, "b was lost"))
    publisher(source).publish(SendWeights(1, tools.start), model, tools.start)
    failed = source.next()
    assert isinstance(failed, WeightsFailed) and "b was lost" in failed.cause


def test_a_receiver_that_leaves_in_mid_transfer_fails_it_for_mesh_and_weights(
    pair: Any, tools: Any, model: Any
) -> None:
    source, receiver = pair
    # more than the sockets' buffers take, so that the source cannot finish alone
    big = torch.nn.Linear(4096, 4096)
    publisher(source).publish(SendWeights(1, tools.start), big, tools.start)
    leaving = threading.Thread(target=lambda: receiver.meshes.revoke(RevokeMesh(1, "going")))
    leaving.start()
    leaving.join(10)
    answers = {type(source.next()), type(source.next())}
    assert answers == {MeshFailed, WeightsFailed}
