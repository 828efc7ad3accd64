"""A rank's meshes in virtual time, as `shared.mesh.membership` keeps them in real time: formed over the rendezvous,
used, revoked. An epoch is used once."""

from __future__ import annotations

from collections.abc import Callable

from shared.messages import (
    AnyMessage,
    FormMesh,
    MeshFailed,
    MeshFormed,
    MeshMember,
    RevokeMesh,
    StoreGet,
    StoreSet,
    StoreValue,
)
from tests.simulation.meshes import Done, Group
from tests.simulation.process import Rank


class Membership:
    """The meshes of one rank."""

    def __init__(self, process: Rank) -> None:
        self._process = process
        self._forming: dict[int, None] = {}
        self._formed: dict[int, tuple[Group, int]] = {}
        self._ended: dict[int, str] = {}
        self._using: dict[int, float] = {}

    @property
    def using(self) -> dict[int, float]:
        """Epochs with an operation under way, and since when."""
        return self._using

    def form(self, message: FormMesh) -> None:
        """Meet the others."""
        epoch = message.identity.epoch
        if epoch in self._forming:
            return
        if epoch in self._formed:
            self._process.send(MeshFormed(epoch))
            return
        if epoch in self._ended:
            self._process.send(MeshFailed(epoch, f"ended here: {self._ended[epoch]}"))
            return
        # what the other ranks of a policy do is part of what their rank 0 does
        members = [member for member in message.identity.members if member.rank == 0]
        me = MeshMember(self._process.replica, self._process.session.incarnation, 0)
        if me not in members:
            self._fail(epoch, f"{me} is none of {message.identity.members}")
            return
        self._forming[epoch] = None
        size, index = len(members), members.index(me)
        if message.identity.backend == "nccl":
            self._meet(message, index, size)
            return
        met: dict[int, None] = {}

        def answered(other: int, answer: AnyMessage | None) -> None:
            if epoch not in self._forming:
                return
            if not isinstance(answer, StoreValue) or answer.value is None:
                self._fail(epoch, f"member {other} did not come: {answer}")
                return
            met[other] = None
            if len(met) == size:
                del self._forming[epoch]
                group = self._process.fleet.data_plane.join(message.identity.unique_id, size)
                self._formed[epoch] = (group, index)
                self._process.send(MeshFormed(epoch))

        def told(answer: AnyMessage | None) -> None:
            answered(index, answer)
            if epoch in self._forming:
                for other in (other for other in range(size) if other != index):
                    self._process.ask(
                        StoreGet(epoch, f"member {other}", message.timeout_s),
                        message.timeout_s,
                        lambda answer, other=other: answered(other, answer),  # type: ignore[misc]
                    )

        self._process.ask(StoreSet(epoch, f"member {index}", b"here"), message.timeout_s, told)

    def _meet(self, message: FormMesh, index: int, size: int) -> None:
        epoch, unique_id = message.identity.epoch, message.identity.unique_id
        plane = self._process.fleet.data_plane

        def formed() -> None:
            if self._forming.pop(epoch, 0) is None:
                self._formed[epoch] = (plane.join(unique_id, size), index)
                self._process.send(MeshFormed(epoch))

        def ran_out() -> None:
            if epoch in self._forming:
                self._fail(epoch, f"waited {message.timeout_s} s for all {size} ranks to come")

        plane.meet(unique_id, index, size, lambda: self._process.when_awake(formed))
        self._process.world.after(message.timeout_s, lambda: self._process.when_awake(ran_out))

    def revoke(self, message: RevokeMesh) -> None:
        """Leave; what is under way ends with an error."""
        self._leave(message.epoch, message.cause)

    def send(self, epoch: int, content: str, done: Done) -> None:
        """Broadcast from the source; `done` may come at once."""
        self._use(epoch, done, content)

    def receive(self, epoch: int, done: Done) -> None:
        """Take what the source broadcasts."""
        self._use(epoch, done, None)

    def add_up(self, epoch: int, content: str, combine: Callable[[list[str]], str], done: Done) -> None:
        """Sum over all members."""
        self._use(epoch, done, content, combine)

    def close(self, cause: str) -> None:
        """Leave all."""
        for epoch in [*self._formed, *self._forming]:
            self._leave(epoch, cause)

    def _use(
        self, epoch: int, done: Done, content: str | None, combine: Callable[[list[str]], str] | None = None
    ) -> None:
        if epoch not in self._formed:
            state = "is forming" if epoch in self._forming else self._ended.get(epoch, "was never formed here")
            done(None, f"no mesh of epoch {epoch}: {state}")
            return
        group, index = self._formed[epoch]
        self._using[epoch] = self._process.world.now

        def over(what: str | None, cause: str) -> None:
            self._using.pop(epoch, None)
            if what is None:
                self._fail(epoch, cause)
            done(what, cause)

        timeouts = self._process.fleet.plan.recipe.timeouts
        timeout_s = timeouts.transfer_s if combine is None else timeouts.step_s / 2
        awake = lambda what, cause: self._process.when_awake(lambda: over(what, cause))  # noqa: E731
        if combine is not None and self._process.fleet.sum_breaks():
            group.leave(index, "a connection broke")
            awake(None, "a connection broke")
        elif content is not None and combine is not None:
            group.add_up(index, content, combine, awake, timeout_s)
        elif content is None:
            group.receive(index, awake, timeout_s)
        else:
            group.send(content, awake, timeout_s)

    def _fail(self, epoch: int, cause: str) -> None:
        known = epoch in self._ended
        self._leave(epoch, cause)
        if not known:
            self._process.send(MeshFailed(epoch, cause))

    def _leave(self, epoch: int, cause: str) -> None:
        self._forming.pop(epoch, None)
        self._ended.setdefault(epoch, cause)
        formed = self._formed.pop(epoch, None)
        if formed is not None:
            formed[0].leave(formed[1], cause)
