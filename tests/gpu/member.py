"""One member of a mesh of NCCL in a process of its own, for test_nccl.py, which tells it what to do.

Orders come as lines of JSON, answers go out the same way. An operation runs in a thread, so that an abort can be told
while it hangs. Arguments: mesh rank, size.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from shared.nccl.library import NcclError, preload

MEGABYTE = 1 << 20


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


class Member:
    """Keeps the mesh that it formed last."""

    def __init__(self, rank: int, size: int) -> None:
        from shared.mesh import Mesh

        self.rank, self.size = rank, size
        self.mesh: Mesh | None = None

    def form(self, epoch: int, unique_id: str, timeout_s: float, operation_s: float) -> dict[str, Any]:
        from shared.mesh import form_mesh
        from shared.messages import MeshIdentity, MeshMember

        members = [MeshMember(f"member-{index}", 1, 0) for index in range(self.size)]
        identity = MeshIdentity("weights", epoch, "nccl", bytes.fromhex(unique_id), members)
        self.mesh = form_mesh(
            identity,
            self.rank,
            lambda question, wait_s: question,  # NCCL's members ask nobody
            interface="lo",
            form_timeout_s=timeout_s,
            operation_timeout_s=operation_s,
        )
        return {}

    def broadcast(self, device: str, dtype: str, count: int, source: int) -> dict[str, Any]:
        import torch

        kind = getattr(torch, dtype)
        values = torch.arange(count, dtype=torch.int64).remainder(97).to(torch.float32).to(kind)
        mine = (values if self.rank == source else torch.zeros(count, dtype=torch.float32).to(kind)).to(device)
        self._mesh.broadcast(mine, source)
        return {"right": bool(torch.equal(mine.cpu().view(torch.uint8), values.view(torch.uint8)))}

    def add_up(self, device: str, dtype: str, count: int) -> dict[str, Any]:
        import torch

        kind = getattr(torch, dtype)
        steps = torch.arange(count, dtype=torch.int64).remainder(5)
        mine = (steps * (self.rank + 1)).to(kind).to(device)
        self._mesh.all_reduce(mine)
        wanted = (steps * sum(range(1, self.size + 1))).to(kind)
        return {"right": bool(torch.equal(mine.cpu(), wanted))}

    def pass_on(self, device: str, count: int) -> dict[str, Any]:
        """Rank 0 sends to rank 1, from `device` to the CPU."""
        import torch

        values = torch.arange(count, dtype=torch.int32)
        if self.rank == 0:
            self._mesh.send(values.to(device), 1)
            return {"right": True}
        mine = torch.zeros(count, dtype=torch.int32)
        self._mesh.recv(mine, 0)
        return {"right": bool(torch.equal(mine, values))}

    def speed(self, megabytes: int, times: int) -> dict[str, Any]:
        import torch

        big = torch.zeros(megabytes * MEGABYTE // 4, dtype=torch.float32, device="cuda")
        self._mesh.all_reduce(big)
        began = time.perf_counter()
        for _ in range(times):
            self._mesh.all_reduce(big)
        return {"gigabytes_per_second": times * megabytes * MEGABYTE / (time.perf_counter() - began) / 1e9}

    def libraries(self) -> dict[str, Any]:
        import torch

        lines = Path("/proc/self/maps").read_text().splitlines()
        return {
            "mapped": sorted({line.split(maxsplit=5)[5] for line in lines if "libnccl.so" in line}),
            "torch": list(torch.cuda.nccl.version()),
        }

    @property
    def _mesh(self) -> Any:
        assert self.mesh is not None, "no mesh was formed"
        return self.mesh


def main() -> None:
    try:
        library = preload("", "lo")
    except NcclError as error:
        say(error=str(error))
        return
    from shared.mesh import MeshError

    member = Member(int(sys.argv[1]), int(sys.argv[2]))
    say(version=library.version)

    def work(order: dict[str, Any]) -> None:
        began = time.monotonic()
        try:
            answer = getattr(member, order.pop("do"))(**order)
        except MeshError as error:
            answer = {"error": str(error)}
        say(**answer, seconds=time.monotonic() - began)

    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "abort":
            member._mesh.abort(order["cause"])
        else:
            threading.Thread(target=work, args=(order,), daemon=True).start()


if __name__ == "__main__":
    main()
