"""What mints the ids of NCCL's meshes, in virtual time, as `services.controller.minting` does with processes.

A child may answer late or never, fail, or die before the members have met; all of them die with their controller.
"""

from __future__ import annotations

from services.controller.minting import Minted, MintFailed
from tests.simulation.meshes import DataPlane
from tests.simulation.plan import NCCL
from tests.simulation.world import World


class Minter:
    """The children of one controller."""

    def __init__(self, world: World, plane: DataPlane) -> None:
        self._world, self._plane = world, plane
        self._chance = world.chance("minting")
        self._children: dict[int, list[bytes]] = {}
        self._words: list[Minted | MintFailed] = []

    def mint(self, epoch: int, count: int) -> None:
        """A child begins."""
        self._children[epoch] = [b"nccl/%d" % self._world.count("nccl id") for _ in range(count)]
        fate = self._chance.random()
        if fate < 0.03:
            return  # it hangs
        begun = 0.05 + 0.5 * self._chance.random()
        if fate < 0.08:
            self._world.after(begun, lambda: self._fail(epoch, "no id could be minted"))
            return
        self._world.after(begun, lambda: self._answer(epoch))
        if fate < 0.16:
            later = begun + self._chance.random()
            self._world.after(later, lambda: self._fail(epoch, "killed while the mesh was forming"))

    def poll(self) -> list[Minted | MintFailed]:
        """What has come since the last look."""
        words, self._words = self._words, []
        return words

    def forget(self, epoch: int) -> None:
        """The child is killed."""
        for unique_id in self._children.pop(epoch, []):
            self._plane.hosted.pop(unique_id, None)

    def close(self) -> None:
        """All are."""
        for epoch in list(self._children):
            self.forget(epoch)

    def _answer(self, epoch: int) -> None:
        ids = self._children.get(epoch)
        if ids is not None:
            self._plane.hosted |= {unique_id: {} for unique_id in ids}
            self._words.append(Minted(epoch, NCCL, ids))

    def _fail(self, epoch: int, cause: str) -> None:
        if epoch in self._children:
            self.forget(epoch)
            self._words.append(MintFailed(epoch, cause))
