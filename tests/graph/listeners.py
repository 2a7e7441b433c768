"""The TCP listeners of a process tree, read from /proc."""

from __future__ import annotations

import ipaddress
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_LISTEN = "0A"


@dataclass(frozen=True)
class Listener:
    process: str  # its command line
    pid: int
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    @property
    def outside(self) -> bool:
        """Whether other machines reach it: neither loopback, nor loopback mapped into IPv6."""
        mapped = getattr(self.address, "ipv4_mapped", None)
        return not (mapped or self.address).is_loopback


def listeners_of(root: int) -> list[Listener]:
    """What a process and all that it started listen on."""
    top = psutil.Process(root)
    found = []
    sockets = _listening()
    for process in (top, *top.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            name = " ".join(process.cmdline())
            for entry in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    place = sockets.get(entry.readlink().name)
                    if place is not None:
                        found.append(Listener(name, process.pid, *place))
    return found


def _listening() -> dict[str, tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    """By the name that a file descriptor's link has: socket:[inode]."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                address, port = fields[1].split(":")
                # Words of four bytes in the machine's order.
                words = struct.pack(
                    f"={len(address) // 8}I", *struct.unpack(f">{len(address) // 8}I", bytes.fromhex(address))
                )
                found[f"socket:[{fields[9]}]"] = ipaddress.ip_address(words), int(port, 16)
    return found


def outside_address() -> str | None:
    """An address of this machine that is not loopback; None where it has none."""
    for interface in psutil.net_if_addrs().values():
        for address in interface:
            if address.family == socket.AF_INET and not ipaddress.ip_address(address.address).is_loopback:
                return address.address
    return None
