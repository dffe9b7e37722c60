"""One URL to one file: resumed where it broke off, never from https to http, with a bar or plain lines.

What the file holds is for the caller to check: see mae_dat/storage/released.py.
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
"""Connections in a row that bring nothing new before a URL is given up."""
RETRY_PAUSE_SECONDS = 1.0
TIMEOUT_SECONDS = 30.0
REPORT_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""
_CHUNK = 1 << 20
_BUSY = {408, 425, 429}


class UrlFailedError(Exception):
    """A URL did not give its file; the message says why."""


class _BrokenOffError(UrlFailedError):
    """The connection ended early: worth another attempt."""


def download(url: str, partial: Path, name: str) -> None:
    """All of `url` in the file `partial`; a note beside it (`.note`) tells a later call how to resume.

    `name` stands in the progress. Raises UrlFailedError, and StorageError when the disk is full; what has arrived is
    kept in both cases.
    """
    attempts, had = 0, 0
    while True:
        try:
            _continue(url, partial, name)
            return
        except _BrokenOffError as error:
            have = partial.stat().st_size if partial.is_file() else 0
            attempts, had = 1 if have > had else attempts + 1, have
            if attempts == MAX_ATTEMPTS:
                raise
            logger.info("%s: %s; trying again.", name, error)
            time.sleep(RETRY_PAUSE_SECONDS * (attempts - 1))
        except OSError as error:
            raise storage_error(partial, error) from error


def _continue(url: str, partial: Path, name: str) -> None:
    """One connection: appends to the partial file where its version still holds, else starts anew."""
    note = partial.with_suffix(".note")
    have, version = _resumable(partial, note, url)
    # Some servers compress on the way, and a range of that is of no use.
    request = urllib.request.Request(url, headers={"User-Agent": "mae_dat", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", version)
    with _open(request, note) as response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0
        rest = response.headers.get("Content-Length")
        total = have + int(rest) if rest else None
        _require_space(partial, (total or 0) - have, name)
        note.write_text(json.dumps({"url": url, "version": _version(response)}))
        with partial.open("ab" if have else "wb") as file:
            have = _copy(response, file, name, have, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and have < total:
        raise _BrokenOffError(f"the connection ended after {have:,} of {total:,} bytes")
    note.unlink()


def _open(request: urllib.request.Request, note: Path) -> HTTPResponse:
    """The response to a request. Raises UrlFailedError, _BrokenOffError where another attempt may help."""
    try:
        response: HTTPResponse = urllib.request.build_opener(_NoDowngrade).open(request, timeout=TIMEOUT_SECONDS)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the server's file has changed, or has no more bytes than are here
            note.unlink(missing_ok=True)
            raise _BrokenOffError("the server has no more bytes; starting anew") from error
        kind = _BrokenOffError if error.code >= 500 or error.code in _BUSY else UrlFailedError
        raise kind(f"HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, socket.gaierror):
            raise UrlFailedError("there is no such host, or no network") from error
        kind = UrlFailedError if isinstance(reason, ConnectionRefusedError) else _BrokenOffError
        raise kind(str(reason) or type(reason).__name__) from error


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirects, also to other hosts, but never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """As the base class; UrlFailedError where the way would not be encrypted any more."""
        if not newurl.startswith("https://") and not (req.full_url.startswith("http://") and newurl.startswith("http")):
            raise UrlFailedError(f"refused a redirect to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _resumable(partial: Path, note: Path, url: str) -> tuple[int, str]:
    """Bytes that are here already and the version they are of; (0, "") to start anew."""
    try:
        facts: dict[str, Any] = json.loads(note.read_text())
        same = facts["url"] == url and facts["version"]
        return (partial.stat().st_size, facts["version"]) if same else (0, "")
    except (OSError, ValueError, KeyError, TypeError):  # no note, or a torn one: what it was of is not known
        return 0, ""


def _version(response: HTTPResponse) -> str:
    """What identifies the file's version to the server: a strong ETag, else the date; empty if it says nothing."""
    tag = response.headers.get("ETag") or ""
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified") or ""


def _require_space(partial: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(partial.parent).free
    if needed > free:
        raise StorageError(f"{name} needs {needed:,} bytes in {partial.parent}, {free:,} are free: make room there.")


def _copy(response: HTTPResponse, file: IO[bytes], name: str, have: int, total: int | None) -> int:
    """Copies to the end and returns the bytes in the file."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console, shown = Console(stderr=True), time.monotonic()
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True)
    with bar:
        task = bar.add_task(name, total=total, completed=have)
        while True:
            try:
                chunk = response.read1(_CHUNK)  # what has come by now
            except (OSError, HTTPException) as error:
                file.flush()
                raise _BrokenOffError(f"the connection broke after {have:,} bytes ({error})") from error
            if not chunk:
                return have
            file.write(chunk)
            have += len(chunk)
            bar.update(task, completed=have)
            if not console.is_terminal and time.monotonic() - shown >= REPORT_SECONDS:
                shown = time.monotonic()
                logger.info("%s: %d of %s MB", name, have // 10**6, total // 10**6 if total else "?")
