"""Publishing: what goes out is the copy of the moment, over a real mesh."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from shared.messages import (
    FormMesh,
    MeshFailed,
    MeshFormed,
    Position,
    RevokeMesh,
    SendWeights,
    WeightsFailed,
    WeightsSent,
)
from shared.weights import digest_of, manifest_of, receive_weights
from shared.weights.publisher import Publisher
from shared.weights.staging import named_weights
from tests.staged import stage

BUCKET = 1 << 12


@pytest.fixture
def model(tools: Any) -> Any:
    return tools.trainer(tools.recipe()).model


def publisher(member: Any, model: Any, position: Position) -> Publisher:
    """A publisher with a copy of the model."""
    publishing = Publisher(member.meshes, member.sent.put, BUCKET)
    publishing.offer(position, stage(model))
    return publishing


def test_a_receiver_gets_the_weights_of_the_moment_though_training_goes_on(pair: Any, tools: Any, model: Any) -> None:
    source, receiver = pair
    digest, manifest = digest_of(named_weights(model)), manifest_of(model)
    publisher(source, model, tools.start).publish(SendWeights(1, tools.start))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert receive_weights(manifest, receiver.meshes.get(1), BUCKET).digest == digest
    sent = source.next()
    assert isinstance(sent, WeightsSent) and (sent.epoch, sent.position, sent.digest) == (1, tools.start, digest)
    assert sent.bytes > sum(p.nbytes for p in model.parameters())


def test_a_position_without_a_copy_is_refused(pair: Any, tools: Any, model: Any) -> None:
    publishing = publisher(pair[0], model, tools.start)
    publishing.publish(SendWeights(1, Position(0, 5, 5)))
    failed = pair[0].next()
    assert isinstance(failed, WeightsFailed) and "this replica has" in failed.cause


def test_a_repeated_command_is_answered_again_and_not_sent_again(pair: Any, tools: Any, model: Any) -> None:
    source, receiver = pair
    publishing = publisher(source, model, tools.start)
    publishing.publish(SendWeights(1, tools.start))
    publishing.publish(SendWeights(1, tools.start))
    receive_weights(manifest_of(model), receiver.meshes.get(1), BUCKET)
    sent = source.next()
    publishing.publish(SendWeights(1, tools.start))
    assert source.next() == sent


def test_a_late_receiver_is_served_the_copy_in_the_middle_of_the_next_batch(pair: Any, tools: Any, model: Any) -> None:
    source, receiver = pair
    publishing = publisher(source, model, tools.start)
    for _ in range(2):  # the second time as for a new epoch: the weights have moved on meanwhile
        publishing._transfers.clear()
        publishing.publish(SendWeights(1, tools.start))
        received = receive_weights(manifest_of(model), receiver.meshes.get(1), BUCKET)
        assert received.digest == source.next().digest
        with torch.no_grad():
            next(model.parameters()).add_(1.0)


def test_a_receiver_that_hangs_holds_no_other_back(pair: Any, tools: Any, model: Any) -> None:
    source, _ = pair
    rendezvous = tools.rendezvous()
    other = tools.member("c", rendezvous)
    source.meshes._request = rendezvous.request
    for member in (source, other):
        member.meshes.form(FormMesh(tools.identity(2, "a", "c"), 20.0))
    assert (source.next(), other.next()) == (MeshFormed(2), MeshFormed(2))
    publishing = publisher(source, model, tools.start)
    publishing.publish(SendWeights(1, tools.start))  # whose receiver never takes part
    publishing.publish(SendWeights(2, tools.start))
    digest = receive_weights(manifest_of(model), other.meshes.get(2), BUCKET).digest
    sent = source.next()
    assert isinstance(sent, WeightsSent) and (sent.epoch, sent.digest) == (2, digest)
    other.meshes.close("the test is over")


def test_a_receiver_serves_the_copy_that_it_got_and_a_spoilt_copy_shows_in_the_next_digest(
    pair: Any, tools: Any, model: Any
) -> None:
    source, relay = pair
    rendezvous = tools.rendezvous()
    last = tools.member("c", rendezvous)
    publisher(source, model, tools.start).publish(SendWeights(1, tools.start))
    got = receive_weights(manifest_of(model), relay.meshes.get(1), BUCKET)
    relay.meshes._request = rendezvous.request
    for member in (relay, last):
        member.meshes.form(FormMesh(tools.identity(2, "b", "c"), 20.0))
    assert (relay.next(), last.next()) == (MeshFormed(2), MeshFormed(2))
    passing = Publisher(relay.meshes, relay.sent.put, BUCKET)
    passing.offer(tools.start, got)
    passing.publish(SendWeights(2, tools.start))
    assert receive_weights(manifest_of(model), last.meshes.get(2), BUCKET).digest == got.digest
    assert relay.next().digest == got.digest
    got.area.memory[-1] ^= 1 << 6
    passing._transfers.clear()
    passing.publish(SendWeights(2, tools.start))
    assert receive_weights(manifest_of(model), last.meshes.get(2), BUCKET).digest != got.digest
    last.meshes.close("the test is over")


def test_a_revoked_mesh_fails_the_transfer(pair: Any, tools: Any, model: Any) -> None:
    source, _ = pair
    source.meshes.revoke(RevokeMesh(1, "b was lost"))
    publisher(source, model, tools.start).publish(SendWeights(1, tools.start))
    failed = source.next()
    assert isinstance(failed, WeightsFailed) and "b was lost" in failed.cause


def test_a_receiver_that_leaves_in_mid_transfer_fails_it_for_mesh_and_weights(
    pair: Any, tools: Any, model: Any
) -> None:
    source, receiver = pair
    # more than the sockets' buffers take, so that the source cannot finish alone
    big = torch.nn.Linear(4096, 4096)
    publisher(source, big, tools.start).publish(SendWeights(1, tools.start))
    leaving = threading.Thread(target=lambda: receiver.meshes.revoke(RevokeMesh(1, "going")))
    leaving.start()
    leaving.join(10)
    answers = {type(source.next()), type(source.next())}
    assert answers == {MeshFailed, WeightsFailed}
