"""A web server on loopback with every kind of host a downloader meets: good ones, broken ones, hostile ones."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

ENDLESS_S = 20.0  # how long an endless or slow answer goes on if nobody cuts it


def picture_bytes(number: int = 0, size: tuple[int, int] = (32, 24), kind: str = "JPEG") -> bytes:
    """A picture that differs from those of other numbers."""
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@dataclass
class PictureServer:
    """Paths: /good/N, /redirect?URL, /missing, /slow, /endless, /drip-headers, /short, /text, /noai, /tagged."""

    port: int
    requested: list[str] = field(default_factory=list)  # paths, in order

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@contextmanager
def picture_server() -> Iterator[PictureServer]:
    """Serves until the context ends."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http.daemon_threads = True
    server = PictureServer(http.server_port)
    http.log = server.requested  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.log.append(self.path)  # type: ignore[attr-defined]
        name, _, argument = self.path.partition("?")
        try:
            if name.startswith("/good/"):
                self._answer(picture_bytes(int(name.split("/")[2]), (900, 700) if argument else (32, 24)))
            elif name == "/redirect":
                self._head(302, {"Location": argument})
            elif name == "/noai":
                self._answer(picture_bytes(), {"X-Robots-Tag": "noai"})
            elif name == "/tagged":
                self._answer(picture_bytes(), {"X-Robots-Tag": "otherbot: noindex"})
            elif name == "/text":
                self._answer(b"<html>no picture</html>", {"Content-Type": "text/html"})
            elif name == "/short":
                self._head(200, {"Content-Length": "100000"})
                self.wfile.write(picture_bytes())
            elif name in ("/slow", "/endless", "/drip-headers"):
                self._go_on(name)
            else:
                self.send_error(404)
        except OSError:
            pass  # the client has had enough, which is what these answers are for

    def _go_on(self, name: str) -> None:
        end = time.monotonic() + ENDLESS_S
        if name == "/drip-headers":
            self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        else:
            self._head(200, {"Content-Type": "image/jpeg"})
        while time.monotonic() < end:
            self.wfile.write({"/endless": bytes(65536), "/slow": b"\xff", "/drip-headers": b"X: y\r\n"}[name])
            self.wfile.flush()
            if name != "/endless":
                time.sleep(0.3)

    def _answer(self, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(200, {"Content-Type": "image/jpeg", "Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
