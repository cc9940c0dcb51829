"""Ports that a test's servers may listen on."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

# Below what Linux hands out by itself (32768 and up): a port from there, free now, is soon the near
# end of some other test's connection.
_PORTS = range(10_000, 32_768)
_random = random.SystemRandom()  # two pytest workers must not draw the same


def free_port() -> int:
    (port,) = free_ports(1)
    return port


def free_ports(count: int) -> list[int]:
    """As many different ports, none of which anything on this host listens on now."""
    ports: list[int] = []
    with ExitStack() as stack:
        while len(ports) < count:
            probe, port = stack.enter_context(socket.socket()), _random.choice(_PORTS)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            ports.append(port)
    return ports
