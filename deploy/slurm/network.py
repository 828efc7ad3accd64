"""This node's address on the network that the nodes share."""

from __future__ import annotations

import fcntl
import socket
import struct

from shared.config import RecipeError

_SIOCGIFADDR = 0x8915  # from linux/sockios.h


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface of this node; RecipeError if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("256s", interface.encode()[:15])
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)[20:24])
        except OSError as error:
            there = ", ".join(name for _, name in socket.if_nameindex())
            raise RecipeError(
                f"weights.interface is {interface!r}: expected an interface of {socket.gethostname()} with an IPv4 "
                f"address, got {error.strerror}; it has: {there}"
            ) from None
