"""Meshes on GPUs: an NCCL communicator of its own for each identity, on this process's first GPU.

Whatever comes is carried in pieces of at most CHUNK_BYTES, on every rank the same ones, so that a tensor on a GPU may
meet one on a CPU, which goes through a buffer on the device. Invariants: an operation returns when nothing of it is
under way on the GPU any more; host memory is copied from and to only while the stream is idle, since a copy that waits
for a hanging peer could not be aborted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shared.mesh.base import Mesh, MeshError
from shared.messages import MeshIdentity
from shared.nccl.communicator import Communicator
from shared.nccl.library import NcclError, find, open_library

CHUNK_BYTES = 64 << 20
SUMMABLE = {
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
"""ncclDataType_t of what can be summed."""

Issue = Callable[[int, int, int, int], int]
"""Starts one piece: the communicator's handle, an address on the device, bytes, the stream's handle -> NCCL's code."""


class NcclMesh(Mesh):
    """An NCCL communicator that forms in its constructor; see `form_mesh` for the arguments."""

    def __init__(
        self,
        identity: MeshIdentity,
        rank: int,
        *,
        form_timeout_s: float,
        operation_timeout_s: float,
        ended: Callable[[], str | None],
        device: int = 0,
    ) -> None:
        super().__init__(identity, rank)
        if not torch.cuda.is_available():
            raise MeshError(
                f"mesh {identity.epoch} ({identity.purpose}): expected a GPU for backend nccl, torch finds none here; "
                'set weights.backend = "gloo" or "auto"'
            )
        self._timeout_s = operation_timeout_s
        try:
            self._library = open_library(find())
        except NcclError as error:
            raise MeshError(f"mesh {identity.epoch} ({identity.purpose}): {error}") from error
        self.device = torch.device("cuda", device)
        self._using = threading.Lock()
        with torch.cuda.device(self.device):
            self._stream, self._mark = torch.cuda.Stream(), torch.cuda.Event()
            try:
                self._communicator = Communicator(
                    self._library,
                    self.size,
                    identity.unique_id,
                    rank,
                    form_timeout_s,
                    ended,
                    on_device=lambda: torch.cuda.set_device(self.device),
                )
            except NcclError as error:
                raise MeshError(
                    f"mesh {identity.epoch} ({identity.purpose}): {self.named(rank)} could not join the {self.size} "
                    f"members by NCCL {self._library.version}: {error}"
                ) from error

    def broadcast(self, tensor: Tensor, source: int) -> None:
        raw, stream_of = _raw_bytes(tensor), self._library.broadcast
        self._run(
            raw,
            lambda handle, pointer, size, stream: stream_of(handle, pointer, size, source, stream),
            f"a broadcast from {self.named(source)}",
        )

    def send(self, tensor: Tensor, to: int) -> None:
        raw, stream_to = _raw_bytes(tensor), self._library.send
        self._run(
            raw,
            lambda handle, pointer, size, stream: stream_to(handle, pointer, size, to, stream),
            f"{self.named(to)} to receive",
        )

    def recv(self, tensor: Tensor, source: int) -> None:
        raw, stream_from = _raw_bytes(tensor), self._library.recv
        self._run(
            raw,
            lambda handle, pointer, size, stream: stream_from(handle, pointer, size, source, stream),
            f"{self.named(source)} to send",
        )

    def all_reduce(self, tensor: Tensor) -> None:
        raw, number = _raw_bytes(tensor), SUMMABLE.get(tensor.dtype)
        if number is None:
            raise MeshError(
                f"all_reduce: expected one of the types {', '.join(map(str, SUMMABLE))}, got {tensor.dtype}"
            )
        width, add_up = tensor.element_size(), self._library.all_reduce
        self._run(
            raw,
            lambda handle, pointer, size, stream: add_up(handle, pointer, size // width, number, stream),
            f"a sum over {self.size} ranks",
        )

    def abort(self, cause: str) -> None:
        self._communicator.abort(cause)

    def _run(self, raw: Tensor, issue: Issue, awaited: str) -> None:
        """Carry all pieces; the first error spends the mesh."""
        spent = self._communicator.cause
        if spent is not None:
            raise MeshError(f"mesh {self.identity.epoch} is spent: {spent}; a new one has to be formed")
        if raw.numel() == 0 or self.size == 1:
            return
        before = torch.cuda.current_stream(self.device)
        try:
            with self._using, torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                self._stream.wait_stream(before)  # which may still write the tensor
                self._carry(raw, issue)
        except NcclError as error:
            # aborted from outside first: that cause says more than what NCCL noticed of it
            raise MeshError(
                f"mesh {self.identity.epoch} ({self.identity.purpose}): {self.named(self.rank)} waited for {awaited} "
                f"(up to {self._timeout_s:g} s): {self._communicator.cause or error}"
            ) from error

    def _carry(self, raw: Tensor, issue: Issue) -> None:
        staged = raw.device != self.device
        buffer = torch.empty(min(raw.numel(), CHUNK_BYTES), dtype=torch.uint8, device=self.device) if staged else raw
        for piece in pieces(raw):
            carried = buffer[: piece.numel()] if staged else piece
            if staged:
                carried.copy_(piece)
            pointer, size, stream = carried.data_ptr(), carried.numel(), self._stream.cuda_stream
            self._communicator.run(
                lambda handle, p=pointer, n=size, s=stream: issue(handle, p, n, s),  # type: ignore[misc]
                lambda: self._mark.record(self._stream),
                self._mark.query,
                self._timeout_s,
            )
            if staged:
                piece.copy_(carried)


def pieces(raw: Tensor) -> Iterator[Tensor]:
    """Views of at most CHUNK_BYTES that make up the whole: the same on ranks with tensors of equal size."""
    for start in range(0, raw.numel(), CHUNK_BYTES):
        yield raw[start : start + CHUNK_BYTES]


def _raw_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as uint8."""
    if not tensor.is_contiguous() or tensor.device.type not in ("cpu", "cuda"):
        raise MeshError(
            f"expected a contiguous tensor on a CPU or GPU, got strides {tensor.stride()} on {tensor.device}; "
            f"copy it with .contiguous() first"
        )
    return tensor.detach().reshape(-1).view(torch.uint8)
