"""The network between the controllers and the ranks: connections that behave as ZeroMQ's over TCP, and worse.

A rank has one `Link`, which connects to the controller that listens, and reconnects after a cut. Within a connection
messages arrive in order; a cut loses what was on its way, but for delayed words of a controller that is no more. On top
of that, `Weather` (a window of time in which faults strike some links) loses, doubles and delays single messages, so
that they overtake each other, and partitions hold everything back: what outlasts `bus.lost_after_s` is cut.

Messages are encoded and decoded with `shared.bus.wire`, as on a real socket.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shared.bus import wire
from shared.bus.wire import Frames
from shared.messages import Envelope
from tests.simulation.world import World

MOST_BYTES = 1 << 22
LATENCY_S = 0.002
RECONNECT_S = 0.3


class Listener(Protocol):
    """A controller that listens: the far end of connections."""

    alive: bool

    def arrive(self, peer: bytes, envelope: Envelope, frames: Frames) -> None:
        """A message of a rank or a person."""


@dataclass
class Weather:
    """Until `until`, messages on the links that `hits` names are lost, doubled or delayed with these chances."""

    until: float
    hits: Callable[[str], bool]
    lose: float
    double: float
    delay: float
    delay_s: float
    chance: random.Random


class Network:
    """Who listens, what the weather is, and which links there are."""

    def __init__(self, world: World, lost_after_s: float) -> None:
        self.world = world
        self.listener: Listener | None = None
        self.weathers: list[Weather] = []
        self.links: list[Link] = []
        self.sent = 0
        self._lost_after_s = lost_after_s
        self._partitions: list[tuple[float, float, Callable[[str], bool]]] = []

    def partition(self, seconds: float, hits: Callable[[str], bool]) -> None:
        """Nothing gets through on these links for a while; a long one cuts their connections."""
        until = self.world.now + seconds
        self._partitions.append((self.world.now, until, hits))
        if seconds > self._lost_after_s:
            struck = [link for link in self.links if hits(link.name)]
            self.world.after(self._lost_after_s, lambda: [link.cut() for link in struck] and None)

    def blocked_until(self, name: str) -> float:
        """When the partition around a link ends; 0 when there is none."""
        now = self.world.now
        self._partitions = [each for each in self._partitions if each[1] > now]
        return max((until for _, until, hits in self._partitions if hits(name)), default=0.0)

    def listen(self, listener: Listener) -> None:
        """A controller has bound the address: whoever connects from now on reaches it."""
        self.listener = listener

    def calm(self) -> None:
        """Faults are over."""
        self.weathers.clear()
        self._partitions.clear()

    def drop_connections(self, listener: Listener) -> None:
        """The process at the far end is gone."""
        for link in self.links:
            if link.listener is listener:
                link.cut()

    def strike(self, name: str) -> list[float]:
        """The extra delays of a message's copies: [0.0] in good weather, [] when it is lost."""
        copies = [0.0]
        for weather in self.weathers:
            if self.world.now >= weather.until or not weather.hits(name):
                continue
            draw = weather.chance.random()
            if draw < weather.lose:
                return []
            if draw < weather.lose + weather.double:
                copies.append(weather.chance.random() * weather.delay_s)
            elif draw < weather.lose + weather.double + weather.delay:
                copies = [0.01 + weather.chance.random() * weather.delay_s]
        return copies


class Link:
    """One rank's (or person's) way to the controller. `take` gets what arrives, decoded."""

    def __init__(self, network: Network, name: str, peer: bytes, take: Callable[[Envelope, Frames], None]) -> None:
        self.name, self.peer = name, peer
        self.listener: Listener | None = None
        self.troubled_at = 0.0
        """When something was last lost, held back or cut here."""
        self._network, self._take = network, take
        self._connection = 0
        self._in_order = [0.0, 0.0]
        self._closed = False
        self._chance = network.world.chance(f"link {name}")
        network.links.append(self)
        self._reconnect()

    def cut(self) -> None:
        """The connection breaks, and is made anew a little later."""
        self._connection += 1
        self.troubled_at = self._network.world.now
        if self.listener is not None:
            self.listener = None
            if not self._closed:
                self._network.world.after(RECONNECT_S * (0.3 + self._chance.random()), self._reconnect)

    def close(self) -> None:
        """The process is gone."""
        self._closed = True
        self.cut()
        if self in self._network.links:
            self._network.links.remove(self)

    def send(self, envelope: Envelope, frames: Frames) -> bool:
        """Rank to controller; false when there is no connection."""
        listener = self.listener
        if listener is None:
            return False
        parts = wire.encode(envelope, frames, MOST_BYTES)

        def arrive() -> None:
            if listener.alive:
                listener.arrive(self.peer, *wire.decode(parts, MOST_BYTES))

        self._put(0, arrive)
        return True

    def receive(self, listener: Listener, envelope: Envelope, frames: Frames) -> None:
        """Controller to rank; lost when this link isn't connected to that controller."""
        if self.listener is not listener:
            return
        parts = wire.encode(envelope, frames, MOST_BYTES)
        self._put(1, lambda: self._take(*wire.decode(parts, MOST_BYTES)))

    def _put(self, way: int, arrive: Callable[[], None]) -> None:
        network, world = self._network, self._network.world
        network.sent += 1
        connection, sender = self._connection, self.listener

        def happen(late: bool) -> None:
            blocked = network.blocked_until(self.name)
            # What a controller before this one said may have been read from the wire, and wait in some queue.
            leftover = late and way == 1 and self.listener is not sender
            if self._closed or (self._connection != connection and not leftover):
                return
            if blocked > world.now:
                self.troubled_at = blocked
                self._in_order[way] = max(self._in_order[way], blocked)
                world.after(blocked - world.now + 1e-6, lambda: happen(late))
                return
            arrive()

        copies = network.strike(self.name)
        if copies != [0.0]:
            self.troubled_at = max(self.troubled_at, world.now + max(copies, default=0.0))
        for extra in copies:
            at = world.now + LATENCY_S * (0.5 + self._chance.random()) + extra
            if extra == 0.0:  # in order, behind what was sent before
                at = self._in_order[way] = max(at, self._in_order[way] + 1e-7)
            world.after(at - world.now, lambda late=extra > 0.0: happen(late))  # type: ignore[misc]

    def _reconnect(self) -> None:
        if self._closed or self.listener is not None:
            return
        listener = self._network.listener
        if listener is None or not listener.alive or self._network.blocked_until(self.name):
            self._network.world.after(RECONNECT_S * (0.5 + self._chance.random()), self._reconnect)
            return
        self.listener = listener
        self._in_order = [self._network.world.now] * 2
