"""Who may read the page: a browser that has the token, on a name of this machine, with GET."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse

PLOTLY_STYLE = "'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"
"""The style sheet for maps, which plotly.js adds when it is loaded. One of another version is blocked, without harm."""
POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self' {PLOTLY_STYLE}; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # an address may hold the token
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
NO_TOKEN = "This page needs its token. Fix: open the address that `tandem watch` has printed.\n"
Next = Callable[[Request], Awaitable[Response]]


class Guard:
    """Checks each request before the routes see it, as the web server's middleware."""

    def __init__(self, token: str, host: str, url: str = "") -> None:
        """Create the guard of a page that listens on `host`, and that browsers may reach at `url` as well."""
        outside = urlsplit(url)
        self._token = token
        self._cookie = f"tandem-watch-{secrets.token_hex(8)}"
        """Pages of a host share their cookies, whatever their ports are, so each start has a name of its own."""
        self._names = {"localhost", socket.gethostname().lower(), host.lower(), outside.hostname or "localhost"}
        self._is_encrypted = outside.scheme == "https"

    async def __call__(self, request: Request, call_next: Next) -> Response:
        response = self._refusal(request) or self._with_cookie(request) or await call_next(request)
        response.headers.update(HEADERS)
        return response

    def _refusal(self, request: Request) -> Response | None:
        if request.method != "GET":
            return PlainTextResponse("This page can only be read.\n", 405, {"Allow": "GET"})
        if not self.is_own_name(request.headers.get("host", "")):
            return PlainTextResponse("The address has a name that is not one of this machine.\n", 403)
        if not any(map(self._is_token, (request.query_params.get("token"), request.cookies.get(self._cookie)))):
            return PlainTextResponse(NO_TOKEN, 403)
        return None

    def _with_cookie(self, request: Request) -> Response | None:
        """Put the token of an address into a cookie, so that it does not stay in the address and the history."""
        if "token" not in request.query_params:
            return None
        response = RedirectResponse("/", 303)
        # Not "strict": links in the terminal of a web IDE come from another site.
        response.set_cookie(self._cookie, self._token, httponly=True, samesite="lax", secure=self._is_encrypted)
        return response

    def is_own_name(self, host: str) -> bool:
        """Whether the host of a request is an IP address or a name of this machine.

        A page of another site could give its own name this machine's address (DNS rebinding). It cannot choose an IP
        address as its name.
        """
        with suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""
            if name in self._names:
                return True
            ipaddress.ip_address(name)
            return True
        return False

    def _is_token(self, given: str | None) -> bool:
        return secrets.compare_digest((given or "").encode(), self._token.encode())
