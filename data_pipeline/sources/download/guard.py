"""What a downloading process may reach and receive: no private addresses, http and https only, bounded bodies and time.

Runs inside img2dataset's environment, so it stands alone on the standard library. Addresses are checked by an audit
hook at the moment of connecting, in whatever library, after whatever redirect or DNS answer; the hook cannot be taken
out again. `urllib.request.urlopen`, through which img2dataset fetches, is replaced by a bounded one without proxies.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

CHUNK_BYTES = 65_536
PATIENCE_S = 0.1  # how often deadlines are looked at
WRAPPINGS = tuple(ipaddress.IPv6Network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96"))  # NAT64; obsolete


class Refused(OSError):
    """Not fetched, or not to its end; the message says why, and img2dataset writes it down."""


@dataclass(frozen=True)
class Limits:
    """What a fetch may reach and cost."""

    allow_hosts: frozenset[str]  # names or addresses that may be private, in lower case
    max_bytes: int
    deadline_s: float  # from the start to the last byte, redirects included


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where an IPv6 address wraps an IPv4 one."""
    try:
        ip = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]  # Teredo: server and client
        wrapped += [ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) for network in WRAPPINGS if ip in network]
        inner = [one for one in wrapped if one is not None]
        if inner or ip.is_site_local:
            return bool(inner) and all(is_public(str(one)) for one in inner)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def install(limits: Limits) -> None:
    """Guard this process from now on. Processes that it starts must do the same for themselves."""
    guard = Guard(limits)
    sys.addaudithook(guard.audit)
    socket.getaddrinfo = guard.getaddrinfo
    socket.create_connection = guard.create_connection  # type: ignore[assignment]
    urllib.request.urlopen = guard.urlopen  # type: ignore[assignment]
    threading.Thread(target=guard.watch, name="deadlines", daemon=True).start()


@dataclass(eq=False)
class _Fetch:
    """One picture on its way."""

    deadline: float
    sockets: list[socket.socket] = field(default_factory=list)
    late: bool = False

    def cut(self) -> None:
        """End all waiting for its connections, from another thread."""
        self.late = True
        for connection in self.sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other side was faster


class Guard:
    """The limits at work in one process."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.resolve, self.connect = socket.getaddrinfo, socket.create_connection  # the ones that get replaced
        self.local = threading.local()  # .allowed: private addresses that the last host may have; .fetch
        self.active: set[_Fetch] = set()
        self.lock = threading.Lock()
        self.opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=ssl.create_default_context()),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),  # every other scheme, and every proxy, which would connect unseen
        ):
            self.opener.add_handler(handler)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Refuses connections to addresses that are not public."""
        if event not in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            return
        connection, address = arguments
        if connection.family == getattr(socket, "AF_UNIX", None):
            return  # processes of this machine among themselves
        host = str(address[0]) if isinstance(address, tuple) else str(address)
        # A host's name stands here only if somebody connects without `getaddrinfo`: it is no address, so not public.
        if not is_public(host) and host not in getattr(self.local, "allowed", ()):
            raise Refused(f"private address {host}")

    def getaddrinfo(self, host: Any, *arguments: Any, **keywords: Any) -> list[tuple[Any, ...]]:
        """Looks a host up; notes its addresses if they may be private, else refuses them here already."""
        self.local.allowed = frozenset()
        found = self.resolve(host, *arguments, **keywords)
        name = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
        addresses = [str(entry[4][0]) for entry in found]
        if name.lower().rstrip(".") in self.limits.allow_hosts:
            self.local.allowed = frozenset(addresses)
        elif private := [address for address in addresses if not is_public(address)]:
            raise Refused(f"private address {private[0]} of {name}")
        return list(found)

    def create_connection(self, address: tuple[str, int], timeout: Any = None, *arguments: Any, **keywords: Any) -> Any:
        """Connects within the fetch's time, and so that the watch can cut the connection."""
        fetch: _Fetch | None = getattr(self.local, "fetch", None)
        if fetch is None:  # no picture: still under `audit`
            return self.connect(address, timeout, *arguments, **keywords)
        left = fetch.deadline - time.monotonic()
        if left <= 0:
            raise self._too_late()
        allowed = min(timeout, left) if isinstance(timeout, (int, float)) else left
        connection = self.connect(address, allowed, *arguments, **keywords)
        with self.lock:
            fetch.sockets.append(connection.dup())  # stays good when TLS takes the first one over
        return connection

    def urlopen(self, request: Any, data: Any = None, timeout: float = 10.0) -> BoundedResponse:
        """As `urllib.request.urlopen`, within the limits."""
        fetch = _Fetch(time.monotonic() + self.limits.deadline_s)
        self.local.fetch = fetch
        with self.lock:
            self.active.add(fetch)
        try:
            return BoundedResponse(self, fetch, self.opener.open(request, data, timeout))
        except BaseException as error:
            self.release(fetch)
            if fetch.late:
                raise self._too_late() from error
            raise

    def read(self, fetch: _Fetch, response: Any) -> bytes:
        """The body, if it ends within the limits."""
        said = response.headers.get("Content-Length", "")
        length = int(said) if said.isascii() and said.isdigit() else None
        body = bytearray()
        try:
            while (length or 0) <= self.limits.max_bytes:
                chunk = response.read(CHUNK_BYTES)
                body += chunk
                if not chunk or len(body) > self.limits.max_bytes:
                    break
        except Exception as error:
            if fetch.late:
                raise self._too_late() from error
            raise
        if fetch.late:
            raise self._too_late()
        if max(len(body), length or 0) > self.limits.max_bytes:
            raise Refused(f"body larger than {self.limits.max_bytes:,} bytes")
        if length is not None and len(body) < length:
            raise Refused(f"body ended after {len(body):,} of {length:,} bytes")
        return bytes(body)

    def watch(self) -> None:
        """Cuts what is late, for ever."""
        while True:
            time.sleep(PATIENCE_S)
            now = time.monotonic()
            with self.lock:
                for fetch in self.active:
                    if now > fetch.deadline:
                        fetch.cut()

    def release(self, fetch: _Fetch) -> None:
        """The fetch is over."""
        with self.lock:
            self.active.discard(fetch)
            while fetch.sockets:
                fetch.sockets.pop().close()

    def _too_late(self) -> Refused:
        return Refused(f"took longer than {self.limits.deadline_s:g} s")


class BoundedResponse:
    """What img2dataset uses of a response."""

    def __init__(self, guard: Guard, fetch: _Fetch, response: Any) -> None:
        self.guard, self.fetch, self.response = guard, fetch, response
        self.headers = response.headers

    def read(self) -> bytes:
        return self.guard.read(self.fetch, self.response)

    def close(self) -> None:
        self.response.close()
        self.guard.release(self.fetch)

    def __enter__(self) -> BoundedResponse:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
