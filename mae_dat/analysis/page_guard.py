"""Protects a local page: requests need its token, and bodies have a largest size.

Other users of the machine can reach a port on 127.0.0.1 too. The printed address therefore contains a random token, and
the page keeps it in a cookie for everything else that it requests.
"""

import hashlib
import secrets
import urllib.parse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_UPLOAD_BYTES = 64 << 20
_FORM_BYTES = 1 << 16  # of the form around an uploaded file
_REFUSED = b"403: open the address that mae-dat explore printed, with its token.\n"


def new_token() -> str:
    """Return a random token of 128 bits for the address of a page."""
    return secrets.token_urlsafe(16)


class PageGuard:
    """ASGI middleware that answers 403 without the token and 413 to bodies above `MAX_UPLOAD_BYTES`."""

    def __init__(self, app: "ASGIApp", token: str) -> None:
        self.app, self.token = app, token
        # Cookies do not depend on the port, so two pages need different names.
        self.cookie = f"mae_dat_{hashlib.sha256(token.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Handle a request or a websocket; everything else, such as the start of the server, is passed on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif self._matches(self._token_of_address(scope)):
            await self.app(scope, _limited(receive), self._with_cookie(send))
        elif self._matches(self._token_of_cookie(scope)):
            await self.app(scope, _limited(receive), send)
        else:
            await _refuse(scope, send)

    def _matches(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())

    def _token_of_address(self, scope: "Scope") -> str:
        query = urllib.parse.parse_qs(scope["query_string"].decode("latin-1"))
        return query.get("token", [""])[0]

    def _token_of_cookie(self, scope: "Scope") -> str:
        for name, value in scope["headers"]:
            if name != b"cookie":
                continue
            for part in value.decode("latin-1").split(";"):  # SimpleCookie rejects all if one of another page is odd
                key, _, text = part.strip().partition("=")
                if key == self.cookie:
                    return text
        return ""

    def _with_cookie(self, send: "Send") -> "Send":
        """Return a `send` that sets the cookie, which no script and no other site can use."""
        cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        headers = [
            (b"set-cookie", cookie.encode()),
            (b"referrer-policy", b"no-referrer"),
        ]

        async def send_with_cookie(message: "Message") -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        return send_with_cookie


def _limited(receive: "Receive") -> "Receive":
    """Return a `receive` that raises starlette's error 413 when a request's body gets too large."""
    size = 0

    async def receive_part() -> "Message":
        nonlocal size
        message = await receive()
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            if size > MAX_UPLOAD_BYTES + _FORM_BYTES:
                from starlette.exceptions import HTTPException

                raise HTTPException(413, f"more than the allowed {MAX_UPLOAD_BYTES >> 20} MiB")
        return message

    return receive_part


async def _refuse(scope: "Scope", send: "Send") -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the server answers 403
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": _REFUSED})
