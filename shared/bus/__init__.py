"""The control plane: typed messages over ZeroMQ, reliable where it matters. Importable without torch and numpy.

`BusClient` is a rank's end (a thread of its own), `RouterBus` the controller's, `ask` a person's single question.
"""

from shared.bus.client import BusClient
from shared.bus.errors import (
    BindRefused,
    BusClosed,
    BusError,
    BusTimeout,
    Fenced,
    KeysRefused,
    Refusal,
    TurnedAway,
    WireFault,
)
from shared.bus.instructions import Delivery
from shared.bus.keys import keys_place
from shared.bus.person import ask
from shared.bus.router import RouterBus
from shared.bus.router_sessions import Incoming

__all__ = [
    "BindRefused",
    "BusClient",
    "BusClosed",
    "BusError",
    "BusTimeout",
    "Delivery",
    "Fenced",
    "Incoming",
    "KeysRefused",
    "Refusal",
    "RouterBus",
    "TurnedAway",
    "WireFault",
    "ask",
    "keys_place",
]
