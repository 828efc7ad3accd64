"""A rank of a policy replica beside rank 0: obeys its orders, one after the other.

    orders -> inbox thread -+- Form, Revoke -> mesh membership (at once, even while a step is computed)
                            +- everything else -> main thread: the table of handlers below, an answer to each

Invariants: it ends with rank 0, however that ends (on rank 0's node the kernel sees to it); an error is rank 0's to
judge, and this process lives on until rank 0 ends it.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from services.policy.batch import Frame
from services.policy.device import take_device
from services.policy.layouts.grid import Grid
from services.policy.learner import Learner, kind_of, prepare_torch
from services.policy.ranks.channel import MemberChannel
from services.policy.ranks.group import form_world, store_at
from services.policy.ranks.meshes import bounds, of_rank
from services.policy.ranks.orders import (
    Abort,
    AnyOrder,
    Commit,
    Done,
    Failed,
    Forget,
    Form,
    Gather,
    Here,
    Leave,
    Load,
    Revoke,
    Send,
    Stage,
    Start,
    Take,
    Told,
    Train,
)
from services.policy.state import Head
from services.policy.trainer import MEGABYTE
from shared.config import Recipe
from shared.engines.ranks import join
from shared.mesh.membership import MeshMembership
from shared.messages import AnyMessage, MeshFailed, MeshFormed, MeshMember, WeightsFailed, WeightsSent
from shared.service import EXIT_DONE, EXIT_RESTART, begin_logging
from shared.telemetry import get_logger
from shared.weights import TensorSpec
from shared.weights.publisher import Publisher
from shared.weights.slices import Parallel


def run(told: bytes) -> NoReturn:
    """One member, until it is told to leave."""
    start = msgspec.json.decode(told, type=Start)
    if start.rank in start.far:
        threading.Thread(target=_end_with_rank_0, name="lifeline", daemon=True).start()
    begin_logging(Path(start.run_folder), "policy", f"{start.replica}.{start.rank}")
    recipe = Recipe.model_validate(start.recipe)
    device = take_device(start.gpu)
    prepare_torch(recipe, device)
    client = join(start.invitation, start.rank - 1)
    channel = MemberChannel(start.meet, start.rank)

    def tell(message: AnyMessage) -> None:
        assert isinstance(message, MeshFormed | MeshFailed)
        channel.answer(Told(start.rank, message))

    def tell_of_weights(message: AnyMessage) -> None:
        assert isinstance(message, WeightsSent | WeightsFailed)
        if isinstance(message, WeightsFailed):  # that they were sent is rank 0's to say
            channel.answer(Told(start.rank, MeshFailed(message.epoch, message.cause)))

    member = MeshMember(start.replica, client.incarnation, start.rank)
    meshes = MeshMembership(member, client.request, tell, **bounds(recipe))
    orders = Orders(channel, meshes)
    channel.answer(Here(start.rank, channel.address))
    timeouts = recipe.timeouts
    store = store_at(start.store, start.world)
    interface = recipe.weights.interface
    form_world(start.rank, start.world, store, interface=interface, timeout_s=timeouts.step_s, device=device)
    grid = Grid.form(Parallel.of(recipe.policy.parallel), start.rank, timeouts.step_s)
    publisher = Publisher(meshes, tell_of_weights, recipe.weights.bucket_mb * MEGABYTE)
    orders.obey(Learner(recipe, Path(start.run_folder), meshes.using, grid, start.far, device), publisher)
    get_logger().info("this rank ends: rank 0 leaves")
    os._exit(EXIT_DONE)  # rank 0 speaks for the replica: threads, sockets and groups have nothing to hand over


def _end_with_rank_0() -> None:
    """Rank 0 holds the other end of standard input, over whatever started this process: it closes with rank 0."""
    with suppress(OSError):
        sys.stdin.buffer.read()
    os._exit(EXIT_RESTART)


class Orders:
    """Takes rank 0's orders from the channel and answers them."""

    def __init__(self, channel: MemberChannel, meshes: MeshMembership) -> None:
        self._channel, self._meshes = channel, meshes
        self._inbox: queue.SimpleQueue[tuple[int, AnyOrder, list[memoryview]]] = queue.SimpleQueue()
        threading.Thread(target=self._receive, name="inbox", daemon=True).start()

    def obey(self, learner: Learner, publisher: Publisher) -> None:
        """Carry out orders with this learner, and this publisher of its weights, until one of them is to leave."""
        rank = self._channel.rank
        while True:
            number, order, frames = self._inbox.get()
            if isinstance(order, Leave):
                return
            total = 0
            try:
                if isinstance(order, Stage):
                    staged, total = learner.stage(order.position)
                    publisher.offer(order.position, staged)
                elif isinstance(order, Send):
                    publisher.publish(order.weights)
                else:
                    HANDLERS[type(order)](learner, order, frames)
            except Exception as error:
                kind = kind_of(error)
                get_logger().error("an order failed", order=type(order).__name__, exc_info=error)
                cause = str(error) if kind != "restart" else f"{type(error).__name__}: {error}"
                self._channel.answer(Failed(rank, number, kind, cause))
            else:
                self._channel.answer(Done(rank, number, learner.trainer is not None, total))

    def _receive(self) -> None:
        """Inbox thread: groups are formed and left while a step is computed, all else waits its turn."""
        while True:
            number, order, frames = self._channel.receive()
            if isinstance(order, Form):
                self._meshes.form(of_rank(order.mesh, self._channel.rank))
            elif isinstance(order, Revoke):
                self._meshes.revoke(order.mesh)
            else:
                self._inbox.put((number, order, frames))


def _load(learner: Learner, order: Load, _frames: list[memoryview]) -> None:
    learner.load(order.state)


def _forget(learner: Learner, _order: Forget, _frames: list[memoryview]) -> None:
    learner.forget()


def _train(learner: Learner, order: Train, frames: list[memoryview]) -> None:
    taken: list[Frame] = [*frames]
    learner.loaded().compute(order.step, taken)


def _commit(learner: Learner, order: Commit, _frames: list[memoryview]) -> None:
    learner.loaded().apply(order.commit)


def _abort(learner: Learner, order: Abort, _frames: list[memoryview]) -> None:
    learner.loaded().drop(order.step, order.attempt, order.lineage)


def _gather(learner: Learner, order: Gather, _frames: list[memoryview]) -> None:
    manifest = msgspec.msgpack.decode(order.manifest, type=list[TensorSpec])
    learner.gather(order.position, manifest, order.path)


def _take(learner: Learner, order: Take, _frames: list[memoryview]) -> None:
    manifest = msgspec.msgpack.decode(order.manifest, type=list[TensorSpec])
    learner.take(msgspec.msgpack.decode(order.head, type=Head), manifest, order.path)


HANDLERS: dict[type, Callable[[Learner, Any, list[memoryview]], None]] = {
    Load: _load,
    Forget: _forget,
    Train: _train,
    Commit: _commit,
    Abort: _abort,
    Gather: _gather,
    Take: _take,
}
