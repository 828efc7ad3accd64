"""This machine's addresses on the networks that it is part of."""

from __future__ import annotations

import fcntl
import socket
import struct

from shared.config import RecipeError

_SIOCGIFADDR = 0x8915  # from linux/sockios.h
_NAME_BYTES = 15


def address_of(interface: str) -> str:
    """The IPv4 address of `weights.interface` on this machine; RecipeError if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("256s", interface.encode()[:_NAME_BYTES])
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)[20:24])
        except OSError as error:
            there = ", ".join(name for _, name in socket.if_nameindex())
            raise RecipeError(
                f"weights.interface {interface!r}: expected an interface of this node, {socket.gethostname()}, with an "
                f"IPv4 address, got {error.strerror}; it has: {there}"
            ) from None
