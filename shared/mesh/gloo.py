"""Meshes on CPUs: a Gloo process group of its own for each identity, without a global world."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from torch.distributed import AllreduceOptions, BroadcastOptions, PrefixStore, ProcessGroupGloo, Work

from shared.mesh.base import Mesh, MeshError
from shared.mesh.store import BusStore, Request
from shared.messages import MeshIdentity

THREADS = 2
SUMMABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)
DATA_TAG, POISON_TAG = 1, 2
SLICE_S = 0.25
"""Seconds of one wait for a collective: between two of them Python handles signals."""


class GlooMesh(Mesh):
    """A Gloo group that forms in its constructor; see `form_mesh` for the arguments."""

    def __init__(
        self,
        identity: MeshIdentity,
        rank: int,
        request: Request,
        *,
        interface: str,
        form_timeout_s: float,
        operation_timeout_s: float,
    ) -> None:
        super().__init__(identity, rank)
        self._timeout_s = operation_timeout_s
        self._lock = threading.Lock()
        self._cause: str | None = None
        self._store = BusStore(identity, self.named(rank), request, form_timeout_s)
        self._group: Any = self._form(interface, form_timeout_s)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        raw = _raw_bytes(tensor)
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = source, 0, timedelta(seconds=self._timeout_s)
        self._run(raw, lambda group: group.broadcast([raw], options), f"a broadcast from {self.named(source)}", SLICE_S)

    def send(self, tensor: Tensor, to: int) -> None:
        raw = _raw_bytes(tensor)
        self._run(raw, lambda group: group.send([raw], to, DATA_TAG), f"{self.named(to)} to receive")

    def recv(self, tensor: Tensor, source: int) -> None:
        raw = _raw_bytes(tensor)
        self._run(raw, lambda group: group.recv([raw], source, DATA_TAG), f"{self.named(source)} to send")

    def all_reduce(self, tensor: Tensor) -> None:
        _raw_bytes(tensor)
        if tensor.dtype not in SUMMABLE:
            raise MeshError(
                f"all_reduce: expected one of the types {', '.join(map(str, SUMMABLE))}, got {tensor.dtype}"
            )
        options = AllreduceOptions()
        options.timeout = timedelta(seconds=self._timeout_s)
        self._run(tensor, lambda group: group.allreduce([tensor], options), f"a sum over {self.size} ranks", SLICE_S)

    def abort(self, cause: str) -> None:
        with self._lock:
            if self._cause is not None:
                return
            self._cause = cause
            group, self._group = self._group, None
        if group is not None and self.size > 1:
            _poison(group, (self.rank + 1) % self.size)

    def _form(self, interface: str, timeout_s: float) -> Any:
        # torch's stubs know none of this class's methods
        gloo: Any = ProcessGroupGloo
        try:
            options = gloo._Options()
            options._timeout = timedelta(seconds=timeout_s)
            options._threads = THREADS
            options._devices = [gloo.create_device(interface=interface)]
            return gloo(PrefixStore("gloo", self._store), self.rank, self.size, options)
        except Exception as error:
            raise MeshError(
                f"mesh {self.identity.epoch} ({self.identity.purpose}): {self.named(self.rank)} could not join the "
                f"{self.size} members over interface {interface!r}: {self._store.error or error}"
            ) from error

    def _run(self, tensor: Tensor, start: Callable[[Any], Work], awaited: str, slice_s: float | None = None) -> None:
        """Start an operation and wait for its end; the first error spends the mesh."""
        group = self._group
        if group is None:
            raise MeshError(f"mesh {self.identity.epoch} is spent: {self._cause}; a new one has to be formed")
        if tensor.numel() == 0 or self.size == 1:
            return
        try:
            self._wait(start(group), slice_s)
        except RuntimeError as error:
            # aborted from outside first: that cause says more than what Gloo noticed of it
            self.abort(str(error))
            raise MeshError(
                f"mesh {self.identity.epoch} ({self.identity.purpose}): {self.named(self.rank)} waited for {awaited} "
                f"(up to {self._timeout_s:g} s): {self._cause}"
            ) from error

    def _wait(self, work: Work, slice_s: float | None) -> None:
        """Wait in slices; a receive must not be sliced, since its first time-out closes the group's connections."""
        deadline = monotonic() + self._timeout_s
        while True:
            try:
                work.wait(timedelta(seconds=slice_s or self._timeout_s))
                return
            except RuntimeError:
                if slice_s is None or self._cause is not None or monotonic() >= deadline:
                    raise
                if work.is_completed():
                    # it ended between the slices: this wait returns, or raises the operation's own error
                    work.wait(timedelta(seconds=slice_s))
                    return


def _poison(group: Any, peer: int) -> None:
    """Close the group's connections, so that whatever waits on it here and at its peers ends at once.

    Gloo has no call for that - its abort and shutdown free no pending wait - but a receive that times out closes every
    connection of its group.
    """
    try:
        group.recv([torch.empty(1, dtype=torch.uint8)], peer, POISON_TAG).wait(timedelta(milliseconds=1))
    except RuntimeError:
        return


def _raw_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as uint8, which Gloo carries whatever the dtype (it refuses float8, for one)."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise MeshError(
            f"expected a contiguous tensor on the CPU, got strides {tensor.stride()} on {tensor.device}; "
            f"copy it with .contiguous() or .cpu() first"
        )
    return tensor.detach().reshape(-1).view(torch.uint8)
