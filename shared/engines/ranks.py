"""A replica's further ranks: each on the bus, for its liveness, in the thread of its own client.

    rank 0 (the service)  --invitation, by a channel of its own-->  worker n, rank 1 + n  --Register--> controller

Workers are those of an engine (vLLM, SGLang), which come to be by its doing, and the members of a policy's replica.

The invitation carries the nonce of the replica's start, so that a worker can only ever join the incarnation of the rank
0 that started it. Workers are told nothing over the bus but that they are over: what they have to do comes from rank 0
through that channel. Invariant: a worker whose replica was lost ends, whatever it is busy with.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import msgspec

from shared.bus import BusClient, BusError, keys_place
from shared.config.schema import BusTable
from shared.messages import Role
from shared.service import EXIT_FENCED
from shared.telemetry import get_logger

LOOK_S = 60.0
"""How long a worker sleeps between two looks at an inbox in which nothing is expected."""

_joined: list[BusClient] = []
"""This worker's client, once it has joined; kept alive here."""


class _Invitation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    address: str
    role: Role
    replica: str
    world: int
    nonce: int
    welcome_s: float
    bus: dict[str, Any]


def invitation(client: BusClient, welcome_s: float) -> bytes:
    """What the workers of rank 0 need to join its replica (JSON); they wait `welcome_s` for the controller.

    It says where the keys lie, not what they are: engines hand it on by channels of their own.
    """
    me = client.passport
    place = keys_place(client.settings.keys)
    bus = client.settings.model_dump() | {"keys": None if place is None else str(place)}
    return msgspec.json.encode(_Invitation(client.address, me.role, me.replica, me.world, me.nonce, welcome_s, bus))


def join(invited: bytes, worker: int) -> BusClient:
    """Called in a worker: register as a rank of the replica, and stay. Called again, it changes nothing.

    The client is for questions alone; what it receives is taken here. BusTimeout, Refusal or Fenced if the controller
    does not take this rank: the worker does not start.
    """
    if _joined:
        return _joined[0]
    to = msgspec.json.decode(invited, type=_Invitation)
    client = BusClient(
        to.address,
        role=to.role,
        replica=to.replica,
        rank=1 + worker,
        world=to.world,
        nonce=to.nonce,
        settings=BusTable(**to.bus),
    )
    client.progress("computing", 0)
    client.start(to.welcome_s)
    _joined.append(client)
    threading.Thread(target=_stay, args=(client,), name="rank", daemon=True).start()
    return client


def _stay(client: BusClient) -> None:
    """End this process once its replica is over."""
    while True:
        try:
            client.receive(LOOK_S)
        except BusError as error:
            get_logger().warning("this rank ends: its replica is over", why=str(error))
            os._exit(EXIT_FENCED)
