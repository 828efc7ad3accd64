"""The data plane: process groups that ranks form over the controller's rendezvous; broadcasts of weights and sums of
gradients on them.

A member's n-th receive takes what the source's n-th send brings, whatever each believes it to be, as in a real
collective. A member that leaves, or dies, fails the operations that need it: at once, or, when chance says so, only
after the operation's own timeout, so that a missing revoke is noticed.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.simulation.world import World

Done = Callable[[str | None, str], None]
"""Told (what arrived, "") or (None, why not)."""


class _Operation:
    def __init__(self, done: Done) -> None:
        self.over = False
        self._done = done

    def end(self, what: str | None, cause: str) -> None:
        if not self.over:
            self.over = True
            self._done(what, cause)


class Group:
    """One formed mesh. Members are known by their index."""

    def __init__(self, world: World, size: int) -> None:
        self._world = world
        self._size = size
        self._chance = world.chance("meshes")
        self._gone: dict[int, str] = {}
        self._sends: list[tuple[_Operation, str, dict[int, None]]] = []
        self._receives: dict[int, list[_Operation]] = {}
        self._sums: dict[int, list[tuple[_Operation, str]]] = {}

    def send(self, content: str, done: Done, timeout_s: float) -> None:
        """The source's next broadcast."""
        operation = self._begin(0, done, timeout_s)
        self._sends.append((operation, content, {}))
        for gone, cause in self._gone.items():
            self._fail(operation, f"member {gone} has left: {cause}")
        for member in range(1, self._size):
            self._match(member, len(self._sends) - 1)

    def receive(self, member: int, done: Done, timeout_s: float) -> None:
        """A receiver's next broadcast."""
        operation = self._begin(member, done, timeout_s)
        mine = self._receives.setdefault(member, [])
        mine.append(operation)
        if 0 in self._gone:
            self._fail(operation, f"the source has left: {self._gone[0]}")
        self._match(member, len(mine) - 1)

    def add_up(
        self, member: int, content: str, combine: Callable[[list[str]], str], done: Done, timeout_s: float
    ) -> None:
        """A member's next sum: it ends when the n-th of every member has begun."""
        operation = self._begin(member, done, timeout_s)
        mine = self._sums.setdefault(member, [])
        mine.append((operation, content))
        for gone, cause in self._gone.items():
            self._fail(operation, f"member {gone} has left: {cause}")
        number = len(mine) - 1
        if any(len(self._sums.get(other, ())) <= number for other in range(self._size)):
            return
        together = [self._sums[other][number] for other in range(self._size)]
        total = combine([content for _, content in together])
        for each, _ in together:  # they don't end together: a member that dies then leaves some with the sum, some not
            self._world.after(0.02 + 0.3 * self._chance.random(), lambda each=each: each.end(total, ""))  # type: ignore[misc]

    def leave(self, member: int, cause: str) -> None:
        """A member aborts, is revoked or dies."""
        if member in self._gone:
            return
        self._gone[member] = cause
        for operation in self._receives.get(member, []):
            operation.end(None, cause)
        for other, sums in self._sums.items():
            for operation, _ in sums:
                if other == member:
                    operation.end(None, cause)
                else:
                    self._fail(operation, f"member {member} has left: {cause}")
        for operation, _, served in self._sends:
            if member == 0:
                operation.end(None, cause)
            elif member not in served:
                self._fail(operation, f"member {member} has left: {cause}")
        if member == 0:
            for mine in self._receives.values():
                for operation in mine:
                    self._fail(operation, f"the source has left: {cause}")

    def _begin(self, member: int, done: Done, timeout_s: float) -> _Operation:
        operation = _Operation(done)
        if member in self._gone:
            self._world.after(0.0, lambda: operation.end(None, self._gone[member]))
        self._world.after(timeout_s, lambda: operation.end(None, "the operation took longer than its timeout"))
        return operation

    def _match(self, member: int, number: int) -> None:
        mine = self._receives.get(member, [])
        if number >= len(mine) or number >= len(self._sends):
            return
        receiving, (sending, content, served) = mine[number], self._sends[number]

        def arrive() -> None:
            if receiving.over or sending.over:
                return
            served[member] = None
            receiving.end(content, "")
            if len(served) == self._size - 1:  # the source may be the last to know
                late = self._chance.random() * self._chance.choice([0.0, 0.0, 2.0])
                self._world.after(late, lambda: sending.end(content, ""))

        self._world.after(0.05 + 0.6 * self._chance.random(), arrive)

    def _fail(self, operation: _Operation, cause: str) -> None:
        if self._chance.random() < 0.7:  # the connection breaks; else only a timeout, or a revoke, will tell
            self._world.after(0.05 + 0.3 * self._chance.random(), lambda: operation.end(None, cause))


class DataPlane:
    """Every group by the id that the controller minted for it.

    NCCL's ids are `hosted`, by whoever minted them: that is where the members meet, and nowhere once it is gone.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._groups: dict[bytes, Group] = {}
        self._chance = world.chance("nccl")
        self.hosted: dict[bytes, dict[int, Callable[[], None]]] = {}

    def meet(self, unique_id: bytes, member: int, size: int, formed: Callable[[], None]) -> None:
        """A member comes to the host of an id of NCCL; all are told when the last one has come."""
        come = self.hosted.get(unique_id)
        if come is None:
            return
        come[member] = formed
        if len(come) == size:
            for each in come.values():
                self._world.after(0.02 + 0.3 * self._chance.random(), each)

    def join(self, unique_id: bytes, size: int) -> Group:
        """The group of that id."""
        if unique_id not in self._groups:
            self._groups[unique_id] = Group(self._world, size)
        return self._groups[unique_id]
