"""`--serve`: the page on loopback, following a run that is still being written.

Only requests that name loopback as their host are answered, so that no web page that the user has
open elsewhere can read rollouts through a name of its own.
"""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from elpo_ray.view.book import Book
from elpo_ray.view.page import live_page

HOSTS = {"127.0.0.1", "localhost"}


class Server(ThreadingHTTPServer):
    """Reports no error when a browser goes away in the middle of an answer."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Following:
    """A book that any request brings up to date; its version counts the changes."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._lock = threading.Lock()
        self.version = 0
        self._overview = b""
        self._chunks: dict[str, bytes] = {}

    def overview(self) -> tuple[int, bytes]:
        with self._lock:
            if self._book.refresh() or not self.version:
                self.version += 1
                self._overview = self._book.overview()
                self._chunks = self._book.chunks()
            return self.version, self._overview

    def chunk(self, name: str) -> bytes | None:
        with self._lock:
            return self._chunks.get(name)


def make_server(book: Book, port: int) -> ThreadingHTTPServer:
    """A server on loopback that has not begun; port 0 takes any free one. Raises OSError."""
    following = Following(book)
    page = live_page(book.run.resolve().name).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            if host not in HOSTS:
                self._answer(403, b"only for this machine", "text/plain")
            elif url.path == "/":
                self._answer(200, page, "text/html; charset=utf-8")
            elif url.path == "/overview":
                self._overview(parse_qs(url.query).get("known", [""])[0])
            else:
                data = following.chunk(url.path.removeprefix("/chunk/"))
                if data is None:
                    self._answer(404, b"no such page", "text/plain")
                else:
                    self._answer(200, data, "application/octet-stream")

        def _overview(self, known: str) -> None:
            version, data = following.overview()
            if known == str(version):
                self._answer(204, b"", "application/octet-stream")
            else:
                self._answer(200, data, "application/octet-stream", version)

        def _answer(self, code: int, data: bytes, kind: str, version: int | None = None) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if version is not None:
                self.send_header("X-Version", str(version))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    return Server(("127.0.0.1", port), Handler)
