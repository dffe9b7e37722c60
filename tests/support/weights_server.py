"""A local HTTP server for released weights, which misbehaves as real ones do."""

import contextlib
import dataclasses
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# A rate at which a download can be caught in the middle.
DRIP_BYTES, DRIP_SECONDS = 50_000, 0.02


@dataclasses.dataclass
class Page:
    """What a path of the server answers, and how it fails."""

    content: bytes = b""
    status: int = 200
    location: str = ""
    etag: str = '"v1"'
    ranges: bool = True
    cut_after: int | None = None
    """Bytes after which a connection is closed."""
    claim: int | str | None = None
    """Content-Length, where it is not the truth; empty for none."""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    """Further headers."""
    drip: bool = False
    failures: int = 0
    """Requests answered by 503 first."""


@dataclasses.dataclass
class Server:
    """Pages by path, and the requests so far as (path, Range header)."""

    url: str
    pages: dict[str, Page] = dataclasses.field(default_factory=dict)
    requests: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    bytes_sent: int = 0

    def page(self, path: str, content: bytes = b"", **how: object) -> str:
        """Puts a page there and returns its URL."""
        self.pages[path] = Page(content, **how)  # type: ignore[arg-type]
        return self.url + path


@contextlib.contextmanager
def serving(certificate: Path | None = None) -> Iterator[Server]:
    """A server on 127.0.0.1, with https when a certificate (with its key) is given."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.requests.append((self.path, self.headers.get("Range")))
            page = server.pages.get(self.path, Page(status=404))
            status, start = page.status, 0
            if page.failures:
                page.failures -= 1
                status = 503
            asked = self.headers.get("Range")
            if asked and page.ranges and self.headers.get("If-Range") == page.etag and status == 200:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                status = 206 if start < len(page.content) else 416
            body = page.content[start:] if status in (200, 206) else b""
            self.send_response(status)
            if page.location:
                self.send_header("Location", page.location)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(page.content) - 1}/{len(page.content)}")
            if page.claim != "":
                self.send_header("Content-Length", str(page.claim or len(body)))
            for name, value in page.headers.items():
                self.send_header(name, value)
            self.send_header("ETag", page.etag)
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            body = body if page.cut_after is None else body[: page.cut_after]
            step = DRIP_BYTES if page.drip else len(body) or 1
            with contextlib.suppress(ConnectionError):
                for position in range(0, len(body), step):
                    self.wfile.write(body[position : position + step])
                    server.bytes_sent += len(body[position : position + step])
                    time.sleep(DRIP_SECONDS if page.drip else 0)

        def log_message(self, format: str, *args: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        listener.socket = context.wrap_socket(listener.socket, server_side=True)
    server = Server(f"{'https' if certificate else 'http'}://127.0.0.1:{listener.server_address[1]}")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
