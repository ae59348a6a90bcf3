"""Sockets: this node's own address, ports that must be free, others that must answer."""

from __future__ import annotations

import errno
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache

from elpo_ray.doctor.finding import Finding, failure, ok, warning

TIMEOUT_S = 5.0


def own_address() -> str:
    """The address that other nodes would use; no packet is sent to find it."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # RFC 5737: no host has it
        except OSError:
            return "127.0.0.1"
        return str(sock.getsockname()[0])


def own_ports() -> Iterator[Finding]:
    """Whether a port of this node can be listened on and reached, as Ray's processes and the
    learner's ranks do on both addresses."""
    reached = []
    for address in dict.fromkeys(("127.0.0.1", own_address())):
        try:
            with closing(socket.create_server((address, 0))) as server:
                there = server.getsockname()
                with closing(socket.create_connection(there, timeout=TIMEOUT_S)):
                    reached.append(address)
        except OSError as fault:
            yield failure(
                "ports",
                f"this node cannot reach itself at {address}: {fault.strerror or fault}",
                "bring the interface up (ip link set lo up) and let the firewall pass connections "
                "from a node to itself and between the nodes",
            )
    if len(reached) == len({"127.0.0.1", own_address()}):
        yield ok("ports", f"can be opened and reached at {' and '.join(reached)}")


def free_ports(ports: Sequence[int]) -> Iterator[Finding]:
    """Whether this node could listen on each of `ports`."""
    taken = []
    for port in ports:
        try:
            socket.create_server(("", port)).close()
        except OSError as fault:
            taken.append(f"{port} ({errno.errorcode.get(fault.errno or 0, fault.errno)})")
    if taken:
        yield failure(
            "free ports",
            f"taken: {', '.join(taken)}",
            "end what listens there (ss -ltnp), or choose other ports",
        )
    else:
        yield ok("free ports", ", ".join(map(str, ports)))


def ray_address(address: str | None) -> Iterator[Finding]:
    """The Ray cluster that `cluster.address` names."""
    environment = os.environ.get("RAY_ADDRESS")
    if address is None and environment:
        yield warning(
            "Ray address",
            f"RAY_ADDRESS={environment} is set and not used: the run starts its own Ray",
            "say cluster.address=auto if that cluster is meant, else unset RAY_ADDRESS",
        )
    if address == "auto":
        address = environment
    if address in (None, "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        yield failure("Ray address", f"{address}", "write host:port, such as 10.0.0.1:6379")
        return
    try:
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S).close()
    except OSError as fault:
        yield failure(
            "Ray address",
            f"nothing answers at {address}: {fault.strerror or fault}",
            f"start the head there (ray start --head --port={port}), or let the firewall pass it",
        )
    else:
        yield ok("Ray address", f"{address} answers")


@cache
def hub_answers() -> bool:
    """Whether the Hugging Face hub, or what `HF_ENDPOINT` names, can be reached: one short try,
    where the hub's own client would try for half a minute."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_S
        ):
            return True
    except urllib.error.HTTPError:
        return True  # it answers
    except (OSError, ValueError):
        return False
