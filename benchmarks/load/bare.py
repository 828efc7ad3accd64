"""What the same traffic costs without a controller: a bare pyzmq + msgpack ROUTER/DEALER loop.

The server hands out leases, receives reports with the same payload, appends payloads and reports to two files, fsyncs
both once for whatever is there (the same group commit), then answers with an acknowledgement and a new lease for each
report. Nothing is hashed, judged, remembered, resent, assigned or forwarded. The load end answers leases at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import msgpack
import msgspec
import zmq

from benchmarks.load.work import SAMPLES, Work
from shared.messages import Grant, Sampling

PATIENCE_MS = 60_000
BATCH = 256
"""Most reports that one fsync covers, as in the controller."""

_GRANT = msgspec.to_builtins(
    Grant(
        group=0,
        attempt=1,
        lineage=1,
        purpose="train",
        dataset="load",
        fingerprint="0" * 16,
        epoch=0,
        row=1,
        seed=1,
        samples=SAMPLES,
        sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=512),
        revision=0,
        version=0,
        deadline_s=120.0,
    )
)


def serve(folder: Path, groups: int, ahead: int) -> None:
    """Take `groups` reports, `ahead` leased to each peer at a time; the address goes to stdout, then the times."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(f"tcp://127.0.0.1:{port}", flush=True)
    spool = os.open(folder / "spool", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    journal = os.open(folder / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    issued = taken = 0
    peers: list[bytes] = []
    commits: list[tuple[float, int]] = []
    while taken < groups:
        if not socket.poll(PATIENCE_MS):
            sys.exit("no load process spoke for a minute")
        owed: list[tuple[bytes, int, int]] = []
        records: list[bytes] = []
        while len(records) < BATCH:
            try:
                peer, envelope, *frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            message = msgpack.unpackb(envelope.buffer)
            if message["type"] == "register":
                peers.append(peer.bytes)
                owed.append((peer.bytes, 0, ahead))
                continue
            _write_all(spool, [frame.buffer for frame in frames])
            records.append(msgpack.packb(message))
            owed.append((peer.bytes, message["group"], 1))
        if records:
            _write_all(journal, [memoryview(record) for record in records])
            os.fsync(spool)
            os.fsync(journal)
            taken += len(records)
            commits.append((time.monotonic(), len(records)))
        for peer_id, group, leases in owed:
            if group:
                socket.send_multipart([peer_id, msgpack.packb({"type": "ack", "group": group})])
            leases = min(leases, groups - issued)
            grants = [_GRANT | {"group": issued + 1 + index} for index in range(leases)]
            issued += leases
            socket.send_multipart([peer_id, msgpack.packb({"type": "lease", "grants": grants})])
    for peer_id in peers:
        socket.send_multipart([peer_id, msgpack.packb({"type": "shutdown"})])
    (folder / "commits.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in commits))
    socket.close(linger=1000)
    context.term()


def load(address: str) -> None:
    """Answer every lease at once with the same frames."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(address)
    work = Work()
    report = {"type": "group_report"} | msgspec.to_builtins(work.report(msgspec.convert(_GRANT, Grant)))
    socket.send(msgpack.packb({"type": "register"}))
    while socket.poll(PATIENCE_MS):
        message = msgpack.unpackb(socket.recv())
        if message["type"] == "shutdown":
            break
        for grant in message.get("grants", ()):
            report["group"] = grant["group"]
            socket.send_multipart([msgpack.packb(report), *work.payload], copy=False)
    socket.close(linger=0)
    context.term()


def _write_all(descriptor: int, parts: list[memoryview]) -> None:
    """writev, and the rest of a write that was cut short."""
    left = sum(part.nbytes for part in parts) - os.writev(descriptor, parts)
    if left:
        os.write(descriptor, b"".join(parts)[-left:])


def main() -> None:
    """`serve` or `load`, as the first argument says."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve")
    serving.add_argument("--folder", type=Path, required=True)
    serving.add_argument("--groups", type=int, required=True)
    serving.add_argument("--ahead", type=int, required=True)
    loading = commands.add_parser("load")
    loading.add_argument("--address", required=True)
    given = parser.parse_args()
    if given.command == "serve":
        serve(given.folder, given.groups, given.ahead)
    else:
        load(given.address)


if __name__ == "__main__":
    main()
