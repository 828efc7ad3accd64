"""The meshes that this rank belongs to: formed on threads of their own, found by epoch, revoked. Used by every replica.

Invariant: an epoch is used once. When it has failed or was revoked here it stays ended, and the controller hears of a
failure exactly from the members that met it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from shared.mesh import Mesh, MeshError, form_mesh
from shared.mesh.store import Request
from shared.messages import AnyMessage, FormMesh, MeshFailed, MeshFormed, MeshMember, RevokeMesh

_REMEMBERED = 256
"""Ended epochs that are remembered, so that a late command about one is answered and not obeyed."""


class MeshMembership:
    """Forms and keeps the meshes of one rank; thread-safe.

    `request` and `send` are the bus client's. `interface` is the network interface; `operation_timeout_s` bounds every
    operation on a mesh, `reduction_timeout_s` those on a gradients mesh. `form` and `revoke` never block: call them
    from the thread that receives messages.
    """

    def __init__(
        self,
        member: MeshMember,
        request: Callable[[AnyMessage, float], AnyMessage],
        send: Callable[[AnyMessage], object],
        *,
        interface: str,
        operation_timeout_s: float,
        reduction_timeout_s: float | None = None,
    ) -> None:
        self._member = member
        self._request = request
        self._send = send
        self._interface = interface
        self._operation_timeout_s = operation_timeout_s
        self._reduction_timeout_s = reduction_timeout_s or operation_timeout_s
        self._lock = threading.Lock()
        self._forming: set[int] = set()
        self._formed: dict[int, Mesh] = {}
        self._ended: dict[int, str] = {}

    def form(self, message: FormMesh) -> None:
        """Build the group on a thread; `MeshFormed` or `MeshFailed` goes out when it stands or not. Idempotent."""
        epoch = message.identity.epoch
        with self._lock:
            ended, formed = self._ended.get(epoch), epoch in self._formed
            if epoch in self._forming:
                return
            if ended is None and not formed:
                self._forming.add(epoch)
        if formed:
            self._send(MeshFormed(epoch))
        elif ended is not None:
            self._send(MeshFailed(epoch, f"the mesh of epoch {epoch} has ended here: {ended}"))
        else:
            threading.Thread(target=self._form, args=(message,), name=f"form-mesh-{epoch}", daemon=True).start()

    def revoke(self, message: RevokeMesh) -> None:
        """Leave the group of that epoch, or never enter it if still forming; pending operations raise MeshError."""
        mesh = self._end(message.epoch, message.cause)
        if mesh is not None:
            mesh.abort(message.cause)

    def get(self, epoch: int) -> Mesh:
        """The formed mesh of `epoch`; MeshError if it does not stand here."""
        with self._lock:
            if epoch in self._formed:
                return self._formed[epoch]
            state = "is still forming" if epoch in self._forming else self._ended.get(epoch, "was never formed here")
        raise MeshError(f"no mesh of epoch {epoch} to use: {state}; a new epoch has to be formed")

    @contextmanager
    def using(self, epoch: int) -> Iterator[Mesh]:
        """The mesh of `epoch` for some operations; an error in one ends the epoch and is told as `MeshFailed`."""
        mesh = self.get(epoch)
        try:
            yield mesh
        except MeshError as error:
            self._fail(epoch, str(error))
            raise

    def close(self, cause: str) -> None:
        """Leave all meshes."""
        with self._lock:
            epochs = [*self._formed, *self._forming]
        for epoch in epochs:
            self.revoke(RevokeMesh(epoch, cause))

    def _form(self, message: FormMesh) -> None:
        identity = message.identity
        try:
            # By name, not by incarnation: a process that was taken for lost and came back has a new one.
            names = [(member.replica, member.rank) for member in identity.members]
            me = (self._member.replica, self._member.rank)
            if me not in names:
                raise MeshError(f"this rank, {self._member}, is none of the members {identity.members}")
            mesh = form_mesh(
                identity,
                names.index(me),
                cast(Request, self._request),  # rendezvous asks with messages of the protocol only
                interface=self._interface,
                form_timeout_s=message.timeout_s,
                operation_timeout_s=(
                    self._reduction_timeout_s if identity.purpose == "gradients" else self._operation_timeout_s
                ),
                ended=lambda: self._ended.get(identity.epoch),
            )
        except Exception as error:  # this thread has no caller: whatever it was, the controller has to hear it
            self._fail(identity.epoch, f"{type(error).__name__}: {error}")
            return
        with self._lock:
            self._forming.discard(identity.epoch)
            revoked = self._ended.get(identity.epoch)
            if revoked is None:
                self._formed[identity.epoch] = mesh
        if revoked is None:
            self._send(MeshFormed(identity.epoch))
        else:
            mesh.abort(revoked)

    def _fail(self, epoch: int, cause: str) -> None:
        with self._lock:
            known = epoch in self._ended  # revoked: the controller knows already
        mesh = self._end(epoch, cause)
        if mesh is not None:
            mesh.abort(cause)
        if not known:
            self._send(MeshFailed(epoch, cause))

    def _end(self, epoch: int, cause: str) -> Mesh | None:
        with self._lock:
            self._forming.discard(epoch)
            self._ended.setdefault(epoch, cause)
            while len(self._ended) > _REMEMBERED:
                del self._ended[min(self._ended)]
            return self._formed.pop(epoch, None)
