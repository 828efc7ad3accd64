"""One member of a mesh in a process of its own, for test_mesh.py: meets the others through the store in the test.

Arguments: port of the store, rank, size, what to do. Prints one line a result.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time

import msgspec
import torch

from shared.mesh import MeshError, form_mesh
from shared.messages import MeshIdentity, MeshMember, Message, StoreValue
from shared.weights import load_into, manifest_of, receive_weights, send_weights
from tests.staged import stage


def read_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError("the store went away")
        data += more
    return data


class StoreConnection:
    """Asks the store in the test; one question at a time."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._lock = threading.Lock()

    def request(self, question: Message, timeout_s: float) -> Message:
        with self._lock:
            body = msgspec.msgpack.encode(question)
            self._socket.settimeout(timeout_s + 5)
            self._socket.sendall(struct.pack("<I", len(body)) + body)
            (count,) = struct.unpack("<I", read_exactly(self._socket, 4))
            return msgspec.msgpack.decode(read_exactly(self._socket, count), type=StoreValue)


def two_layers(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.BatchNorm1d(200), torch.nn.Linear(200, 300))
    model[2].weight = torch.nn.Parameter(model[2].weight.detach().to(torch.bfloat16))
    return model


def say(*words: object) -> None:
    print(*words, flush=True)


def main() -> None:
    port, rank, size, task = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    members = [MeshMember(replica=f"member-{i}", incarnation=1, rank=0) for i in range(size)]
    identity = MeshIdentity(purpose="weights", epoch=7, backend="gloo", unique_id=b"once", members=members)
    started = time.monotonic()
    try:
        mesh = form_mesh(
            identity,
            rank,
            StoreConnection(port).request,
            interface="lo",
            form_timeout_s=2.0 if task == "absent" else 20.0,
            operation_timeout_s=2.0 if task == "timeout" else 30.0,
        )
    except MeshError as error:
        say("error", f"{time.monotonic() - started:.3f}", error)
        return
    say("formed")
    values = torch.full((3, 5), float(rank))
    started = time.monotonic()
    try:
        match task:
            case "collectives":
                mesh.all_reduce(values)
                say("sum", values[0, 0].item())
                small = torch.full((4,), rank + 0.5).to(torch.float8_e4m3fn)
                mesh.broadcast(small, 1)
                say("float8", small.float()[0].item())
                token = torch.tensor(rank)
                if rank == 0:
                    mesh.send(torch.tensor(41), 1)
                elif rank == 1:
                    mesh.recv(token, 0)
                say("token", token.item())
            case "abort":
                # rank 1 never takes part
                if rank == 1:
                    sys.stdin.readline()
                else:
                    threading.Timer(0.3, mesh.abort, ["revoked by the test"]).start()
                    mesh.broadcast(values, 1)
            case "abort_recv":
                if rank == 1:
                    sys.stdin.readline()
                else:
                    threading.Timer(0.3, mesh.abort, ["revoked by the test"]).start()
                    mesh.recv(values, 1)
            case "killed" | "timeout":
                if rank == 1:
                    sys.stdin.readline()
                else:
                    mesh.broadcast(values, 1)
            case "weights":
                model = two_layers(seed=rank)
                if rank == 0:
                    staged = stage(model)
                    torch.nn.init.zeros_(model[0].weight)
                    say("bytes", send_weights(staged, mesh, 100_000))
                else:
                    staged = receive_weights(manifest_of(model), mesh, 100_000)
                    load_into(model, staged.tensors)
                say("digest", staged.digest)
                say("checked", stage(model).digest if rank else "")
    except MeshError as error:
        say("error", f"{time.monotonic() - started:.3f}", error)
        try:
            mesh.broadcast(values, 1)
        except MeshError as again:
            say("spent", again)
    mesh.abort("done")


if __name__ == "__main__":
    sys.path.insert(0, ".")
    main()
