"""A state that goes from one policy to another: everything that decides the next steps, over a real mesh."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from services.policy import checkpoint
from services.policy.peers import Peers
from services.policy.state import head_of, manifest_for, restore, state_digest, tensors_of, write
from services.policy.trainer import Trainer
from shared.messages import (
    CheckState,
    CommitStep,
    FormMesh,
    MeshFailed,
    MeshFormed,
    Position,
    ReceiveState,
    SendState,
    StateDigest,
    StateReceived,
    StateSent,
)
from shared.models import load_model
from shared.weights import TensorSpec
from shared.weights.staging import Area, allocate

BUCKET = 1 << 12


def trained(tools: Any, recipe: Any, steps: int, **named: Any) -> Any:
    """A trainer that has applied some steps of stage "train"."""
    trainer = tools.trainer(recipe, **named)
    for number in range(steps):
        step, frames = tools.step(recipe, trainer.position, attempt=number + 1, seed=number)
        trainer.compute(step, frames)
        trainer.apply(CommitStep(step.step, step.attempt, 0))
    return trainer


def copy(trainer: Trainer) -> Area:
    """What the ranks of a replica put together, here one of one."""
    area = allocate(manifest_for(head_of(trainer), trainer.layout))
    write(trainer, area.tensors)
    return area


def skeleton(tools: Any, recipe: Any, position: Position, meshes: Any = None) -> Any:
    """A trainer of another process: the model is there, its weights are not."""
    model = load_model(recipe.model, 9, weights=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    trainer = tools.trainer(recipe, position, **({"meshes": meshes} if meshes else {}))
    trainer.model.load_state_dict(model.state_dict())
    return trainer


def into(receiver: Any) -> Any:
    """What puts a state into this trainer."""

    def take(head: Any, area: Any) -> Any:
        restore(receiver, head, area.tensors)
        return receiver

    return take


def transfer(pair: Any, source: Any, receiver: Any) -> tuple[Any, Any]:
    """Send the source's state over the mesh of the pair; what both sides said."""
    a, b = pair
    sending, receiving = (Peers(member.meshes, member.sent.put, BUCKET, copy) for member in pair)
    sending.send(SendState(1, source.position), source)
    found = receiving.receive(ReceiveState(1, source.position), receiver.layout, into(receiver))
    assert found is receiver
    return a.next(), b.next()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_receiver_goes_on_exactly_as_the_source(pair: Any, tools: Any, dtype: str) -> None:
    recipe = tools.recipe(model__dtype=dtype) if dtype != "float32" else tools.recipe()
    source = trained(tools, recipe, 2)
    receiver = skeleton(tools, recipe, source.position)
    sent, received = transfer(pair, source, receiver)
    assert isinstance(sent, StateSent) and isinstance(received, StateReceived)
    assert sent.digest == received.digest == state_digest(head_of(source), tensors_of(source))
    assert receiver.position == source.position and receiver.stage == "train"
    for trainer in (source, receiver):
        step, frames = tools.step(recipe, trainer.position, attempt=7, seed=5)
        trainer.compute(step, frames)
        trainer.apply(CommitStep(step.step, 7, 0))
    for name, tensor in tensors_of(source).items():
        assert torch.equal(tensor, tensors_of(receiver)[name]), name


def test_the_copy_is_of_the_moment_it_was_asked_for(pair: Any, tools: Any) -> None:
    recipe = tools.recipe()
    source = trained(tools, recipe, 1)
    before = state_digest(head_of(source), tensors_of(source))
    a, b = pair
    sending, receiving = (Peers(member.meshes, member.sent.put, BUCKET, copy) for member in pair)
    position = source.position
    sending.send(SendState(1, position), source)
    step, frames = tools.step(recipe, position, attempt=2, seed=1)
    source.compute(step, frames)
    source.apply(CommitStep(step.step, 2, 0))  # before the receiver has even asked
    receiver = skeleton(tools, recipe, position)
    receiving.receive(ReceiveState(1, position), receiver.layout, into(receiver))
    assert a.next().digest == b.next().digest == before != state_digest(head_of(source), tensors_of(source))


def test_before_the_first_step_there_is_nothing_but_weights(pair: Any, tools: Any) -> None:
    recipe = tools.recipe()
    source = tools.trainer(recipe)
    receiver = skeleton(tools, recipe, source.position)
    sent, received = transfer(pair, source, receiver)
    assert sent.digest == received.digest
    assert receiver.stage is None and receiver.optimizer is None


def test_a_policy_that_began_from_a_checkpoint_gives_its_state_to_a_joiner(
    pair: Any, tools: Any, tmp_path: Path
) -> None:
    recipe = tools.recipe()
    saved = trained(tools, recipe, 2)
    path, _ = checkpoint.save(head_of(saved), tensors_of(saved), tmp_path, "run-1", "recipe-1", 1)
    source = skeleton(tools, recipe, checkpoint.read_state(path).position)
    checkpoint.load(source, path, source.position)
    sent, received = transfer(pair, source, skeleton(tools, recipe, source.position))
    assert isinstance(sent, StateSent) and isinstance(received, StateReceived)
    assert sent.digest == received.digest


def test_what_a_receiver_expects_is_what_a_source_sends(tools: Any) -> None:
    for steps in (0, 2):
        source = trained(tools, tools.recipe(), steps)
        sent = [
            TensorSpec(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in tensors_of(source).items()
        ]
        assert manifest_for(head_of(source), source.layout) == sent


def test_a_state_of_another_model_is_refused_and_both_sides_say_so(pair: Any, tools: Any) -> None:
    a, b = pair
    source = trained(tools, tools.recipe(), 1)
    other = tools.recipe(model__build={**tools.recipe().model.build.model_dump(), "hidden_size": 32})
    sending, receiving = (Peers(member.meshes, member.sent.put, BUCKET, copy) for member in pair)
    sending.send(SendState(1, source.position), source)
    receiver = tools.trainer(other, source.position)
    assert receiving.receive(ReceiveState(1, source.position), receiver.layout, into(receiver)) is None
    answer = b.next()
    assert isinstance(answer, MeshFailed) and "do not fit this model" in answer.cause
    assert isinstance(a.next(), MeshFailed)


def test_a_source_that_holds_another_position_ends_the_mesh(pair: Any, tools: Any) -> None:
    a, _ = pair
    source = tools.trainer(tools.recipe())
    Peers(a.meshes, a.sent.put, BUCKET, copy).send(SendState(1, Position(0, 3, 3)), source)
    answer = a.next()
    assert isinstance(answer, MeshFailed) and "holds Position" in answer.cause


def test_what_was_said_is_said_again(pair: Any, tools: Any) -> None:
    a, b = pair
    recipe = tools.recipe()
    source, receiver = trained(tools, recipe, 1), skeleton(tools, recipe, Position(0, 1, 1))
    sending, receiving = (Peers(member.meshes, member.sent.put, BUCKET, copy) for member in pair)
    sending.send(SendState(1, source.position), source)
    receiving.receive(ReceiveState(1, source.position), receiver.layout, into(receiver))
    first = a.next(), b.next()
    sending.send(SendState(1, source.position), source)
    assert receiving.answer_again(ReceiveState(1, source.position), receiver)
    assert (a.next(), b.next()) == first
    assert not receiving.answer_again(ReceiveState(2, source.position), receiver)
    assert not receiving.answer_again(ReceiveState(1, source.position), None), "it was told to forget that"


def test_equal_states_have_equal_digests_and_one_bit_changes_them(pair: Any, tools: Any) -> None:
    recipe = tools.recipe()
    one, other = trained(tools, recipe, 2), trained(tools, recipe, 2)
    digest = state_digest(head_of(one), tensors_of(one))
    assert digest == state_digest(head_of(other), tensors_of(other))
    moments = next(iter(other.optimizer.tensors().values()))
    with torch.no_grad():
        moments.view(-1)[0] += 1e-7
    assert digest != state_digest(head_of(other), tensors_of(other))
    other = trained(tools, recipe, 2)
    other.optimizer.steps += 1
    assert digest != state_digest(head_of(other), tensors_of(other)), "the step count is part of it"


def test_the_digest_of_a_position_is_remembered_for_a_question_that_comes_again(pair: Any, tools: Any) -> None:
    a, _ = pair
    recipe = tools.recipe()
    trainer = trained(tools, recipe, 1)
    peers = Peers(a.meshes, a.sent.put, BUCKET, copy)
    peers.check(CheckState(trainer.position), trainer)
    first = a.next()
    assert isinstance(first, StateDigest)
    asked = trainer.position
    step, frames = tools.step(recipe, asked, attempt=2)
    trainer.compute(step, frames)
    trainer.apply(CommitStep(step.step, 2, 0))
    peers.check(CheckState(asked), trainer)
    assert a.next() == first
    peers.check(CheckState(Position(0, 9, 9)), trainer)
    assert a.sent.empty()


@pytest.mark.parametrize("count", [3, 4])
def test_members_with_shares_of_any_size_hold_the_parameters_of_one_process(tools: Any, count: int) -> None:
    """Three groups over three or four members, one of which has none; one of them received its state just before."""
    recipe = tools.recipe()
    rendezvous = tools.rendezvous()
    names = [f"m{number}" for number in range(count)]
    members = [tools.member(name, rendezvous) for name in names]
    for member in members:
        member.meshes.form(FormMesh(tools.identity(1, *names), 20.0))
    for member in members:
        assert member.next() == MeshFormed(1)
    alone = trained(tools, recipe, 1)
    trainers = [trained(tools, recipe, 1, meshes=member.meshes.using) for member in members]
    late = skeleton(tools, recipe, alone.position, members[-1].meshes.using)
    random = torch.get_rng_state()
    restore(late, head_of(alone), {name: tensor.clone() for name, tensor in tensors_of(alone).items()})
    assert torch.equal(torch.get_rng_state(), random)
    trainers[-1] = late
    cuts = [slice(0, 1), slice(1, 3), *[slice(3, 3)] * (count - 2)]
    expected = alone.compute(*tools.step(recipe, alone.position, attempt=9))
    alone.apply(CommitStep(1, 9, 0))
    votes: list[Any] = [None] * count

    def work(index: int) -> None:
        step, frames = tools.step(recipe, trainers[index].position, attempt=9, keep=cuts[index], mesh=1)
        votes[index] = trainers[index].compute(step, frames)
        trainers[index].apply(CommitStep(step.step, 9, 0))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(vote is not None and vote.finite for vote in votes)
    assert votes[-1].metrics["loss"] == pytest.approx(expected.metrics["loss"], abs=1e-5)
    digests = {state_digest(head_of(trainer), tensors_of(trainer)) for trainer in trainers}
    assert len(digests) == 1, "bit for bit the same on every member"
    for name, tensor in tools.weights(alone).items():
        torch.testing.assert_close(tools.weights(trainers[0])[name], tensor, atol=1e-6, rtol=0)
    for member in members:
        member.meshes.close("the test is over")
