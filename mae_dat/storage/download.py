"""Download one URL to one file: interrupted downloads are resumed, and https is never redirected to http.

The content is checked by the caller: see mae_dat/storage/released.py.
"""

import json
import logging
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, Any

from mae_dat.config.errors import StorageError
from mae_dat.storage.files import storage_error

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
"""Number of consecutive connections without new data after which a URL has failed."""
RETRY_PAUSE_SECONDS = 1.0
TIMEOUT_SECONDS = 30.0
REPORT_SECONDS = 10.0
"""Interval of the progress lines in a log, where there is no terminal for a progress bar."""
_MAX_BYTES = 1 << 38
"""Bytes of the largest file that is downloaded: 256 GiB."""
_CHUNK = 1 << 20
_LENGTH_DIGITS = 20
_RETRY_CODES = {408, 425, 429}  # the server is busy


class UrlFailedError(Exception):
    """A URL could not be downloaded; the message is the cause."""


class _ConnectionLostError(UrlFailedError):
    """The connection ended early, so another attempt may succeed."""


def download(url: str, partial: Path, name: str, max_bytes: int = _MAX_BYTES) -> None:
    """Download `url` to the file `partial`; a file next to it (`.note`) records how a later call can resume.

    `name` is shown in the progress. Raises UrlFailedError, also for more than `max_bytes`, and StorageError if the disk
    is full. The data received so far is kept, except that of a file that is too large.
    """
    attempts, previous_size = 0, 0
    while True:
        try:
            _download_rest(url, partial, name, max_bytes)
            return
        except _ConnectionLostError as error:
            size = partial.stat().st_size if partial.is_file() else 0
            attempts, previous_size = 1 if size > previous_size else attempts + 1, size
            if attempts == MAX_ATTEMPTS:
                raise
            logger.info("%s: %s; trying again.", name, error)
            time.sleep(RETRY_PAUSE_SECONDS * (attempts - 1))
        except OSError as error:
            raise storage_error(partial, error) from error


def _download_rest(url: str, partial: Path, name: str, max_bytes: int) -> None:
    """Download in one connection: append to the partial file if the server's file is unchanged, else start again."""
    note = partial.with_suffix(".note")
    size, version = _read_note(partial, note, url)
    # Some servers compress the transfer, and a range of compressed data could not be appended.
    request = urllib.request.Request(url, headers={"User-Agent": "mae_dat", "Accept-Encoding": "identity"})
    if size:
        request.add_header("Range", f"bytes={size}-")
        request.add_header("If-Range", version)  # the server sends the whole file if it has another version now
    with _open(request, note) as response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {size}-"):
            size = 0
        length = (response.headers.get("Content-Length") or "").strip()
        total = size + int(length) if length.isascii() and length.isdecimal() and len(length) < _LENGTH_DIGITS else None
        if (encoding := response.headers.get("Content-Encoding") or "identity").lower() != "identity":
            raise UrlFailedError(f"the server encodes the file ({encoding[:40]!r}) although that was not requested")
        _require_space(partial, (total or 0) - size, name)
        _require_size(total or 0, max_bytes, partial)
        note.write_text(json.dumps({"url": url, "version": _version(response)}))
        with partial.open("ab" if size else "wb") as file:
            size = _copy(response, file, name=name, size=size, total=total, max_bytes=max_bytes)
            file.flush()
            os.fsync(file.fileno())
    _require_size(size, max_bytes, partial)
    if total is not None and size < total:
        raise _ConnectionLostError(f"the connection ended after {size:,} of {total:,} bytes")
    note.unlink()


def _open(request: urllib.request.Request, note: Path) -> HTTPResponse:
    """Open a request and return the response. Raises UrlFailedError; _ConnectionLostError if a retry may succeed."""
    try:
        response: HTTPResponse = urllib.request.build_opener(_NoDowngrade).open(request, timeout=TIMEOUT_SECONDS)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the server's file has changed, or has no more bytes than the partial file
            note.unlink(missing_ok=True)
            raise _ConnectionLostError("the server has no more bytes; starting again") from error
        kind = _ConnectionLostError if error.code >= 500 or error.code in _RETRY_CODES else UrlFailedError
        raise kind(f"HTTP {error.code} {error.reason}") from error
    except ValueError as error:  # an address or a header that cannot be parsed, such as that of a redirect
        raise UrlFailedError(f"the server's response is not valid ({error})") from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, socket.gaierror):
            raise UrlFailedError("no such host, or no network connection") from error
        kind = UrlFailedError if isinstance(reason, ConnectionRefusedError) else _ConnectionLostError
        raise kind(str(reason) or type(reason).__name__) from error


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirects, also to other hosts, but never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Follow a redirect as the base class does. Raises UrlFailedError for one from https to anything else."""
        if not newurl.startswith("https://") and not (req.full_url.startswith("http://") and newurl.startswith("http")):
            raise UrlFailedError(f"rejected a redirect from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read_note(partial: Path, note: Path, url: str) -> tuple[int, str]:
    """Return the bytes of the partial file and the version of the file on the server; (0, "") to start again."""
    try:
        content: dict[str, Any] = json.loads(note.read_text())
        can_resume = content["url"] == url and content["version"]
        return (partial.stat().st_size, content["version"]) if can_resume else (0, "")
    except (OSError, ValueError, KeyError, TypeError):  # no note, or an incomplete one: the version is unknown
        return 0, ""


def _version(response: HTTPResponse) -> str:
    """Return what identifies the version of the server's file: a strong ETag, else the date; empty without either."""
    tag = response.headers.get("ETag") or ""
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified") or ""


def _require_space(partial: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(partial.parent).free
    if needed > free:
        raise StorageError(f"{name} needs {needed:,} bytes in {partial.parent}, {free:,} are free: free some space.")


def _require_size(size: int, max_bytes: int, partial: Path) -> None:
    """Raise UrlFailedError for more than `max_bytes` bytes, and delete what was downloaded."""
    if size > max_bytes:
        for path in (partial, partial.with_suffix(".note")):
            path.unlink(missing_ok=True)
        raise UrlFailedError(f"it has more than the {max_bytes:,} bytes allowed")


def _copy(response: HTTPResponse, file: IO[bytes], *, name: str, size: int, total: int | None, max_bytes: int) -> int:
    """Copy a response to the end of a file of `size` bytes, showing the progress, and return its new size in bytes.

    Stops after more than `max_bytes`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console, last_report = Console(stderr=True), time.monotonic()
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True)
    with bar:
        task = bar.add_task(name, total=total, completed=size)
        while True:
            try:
                chunk = response.read1(_CHUNK)  # returns as soon as some data has arrived
            except (OSError, HTTPException, ValueError) as error:  # ValueError: a chunk of no valid size
                file.flush()
                raise _ConnectionLostError(f"the connection broke after {size:,} bytes ({error})") from error
            if not chunk or size > max_bytes:
                return size
            file.write(chunk)
            size += len(chunk)
            bar.update(task, completed=size)
            if not console.is_terminal and time.monotonic() - last_report >= REPORT_SECONDS:
                last_report = time.monotonic()
                logger.info("%s: %d of %s MB", name, size // 10**6, total // 10**6 if total else "?")
