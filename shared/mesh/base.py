"""What a mesh can do, whatever carries it.

A mesh is a process group whose identity the controller issued. Its users are the weight transfers and the gradient
reduction. Invariant: after its first error, or `abort`, a mesh is spent: every operation on it raises MeshError at
once, and a new epoch has to be formed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from shared.messages import MeshIdentity


class MeshError(Exception):
    """A mesh that could not be formed, or an operation on it that failed, timed out or was aborted."""


class Mesh(ABC):
    """One rank's end of a process group. Operations block, one at a time, in the same order on every rank.

    Tensors are contiguous and are filled in place. Every operation ends within the operation timeout, or raises.
    """

    device = torch.device("cpu")
    """Where it takes tensors from without a copy of its own."""

    def __init__(self, identity: MeshIdentity, rank: int) -> None:
        if not 0 <= rank < len(identity.members):
            raise MeshError(
                f"mesh {identity.epoch}: expected a rank from 0 to {len(identity.members) - 1}, got {rank}; "
                f"use the index of this process in the identity's members"
            )
        self.identity = identity
        self.rank = rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.identity.members)

    def named(self, rank: int) -> str:
        """How errors call a rank: "policy-0 (mesh rank 0)"."""
        return f"{self.identity.members[rank].replica} (mesh rank {rank})"

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copy `tensor` of rank `source` into `tensor` of all others; any dtype."""

    @abstractmethod
    def send(self, tensor: Tensor, to: int) -> None:
        """Give `tensor` to the matching `recv` of rank `to`; any dtype."""

    @abstractmethod
    def recv(self, tensor: Tensor, source: int) -> None:
        """Fill `tensor` from the matching `send` of rank `source`; any dtype."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` on every rank by the sum over all ranks; float or int dtypes."""

    @abstractmethod
    def abort(self, cause: str) -> None:
        """End the mesh, from any thread: an operation in flight raises MeshError with `cause`. May be repeated."""
