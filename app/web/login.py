"""The token of a server, the login page that asks for it, and the cookie that keeps it in a browser."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.requests import cookie_parser

from app.web import render
from app.web.limits import Rate, Refused

if TYPE_CHECKING:
    from starlette.datastructures import Headers

LEAST_TOKEN = 16  # characters: a shorter one could be guessed
SESSION_SECONDS = 30 * 24 * 3600
FAILURES, FAILURES_PER_SECOND = 10, 1 / 6  # wrong tokens of one client: at once, and on average

_INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


class Login:
    """Checks for one token, and answers to /login. Threads do not share it."""

    def __init__(self, token: str, root_path: str = "") -> None:
        self._token = token.encode()
        self._path = f"{root_path}/"
        # Cookies are the same for all ports of a host: two servers must not overwrite each other's.
        self._cookie = f"clipkit-{self._signed('name')[:8]}"
        self._failures = Rate(FAILURES, FAILURES_PER_SECOND)
        self._html = render.part("login", failed=False)
        self._html_failed = render.part("login", failed=True)
        inline = {
            kind: f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
            for kind, code in _INLINE.findall(self._html)
        }
        self.policy = (
            f"default-src 'none'; style-src {inline['style']}; script-src {inline['script']}; "
            "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        )

    def _signed(self, text: str) -> str:
        return hmac.new(self._token, f"clipkit {text}".encode(), hashlib.sha256).hexdigest()

    def _is_token(self, sent: str) -> bool:
        return hmac.compare_digest(
            hashlib.sha256(sent.encode(errors="replace")).digest(),
            hashlib.sha256(self._token).digest(),
        )

    def _check_failures(self, client: str) -> None:
        if wait := self._failures.wait(client):
            sentence = f"too many wrong tokens; try again in {wait:.0f} s"
            raise Refused(429, sentence, retry_after=wait, close=True)

    def knows(self, headers: Headers, client: str) -> bool:
        """Return whether the headers have the token, or the cookie of a session.

        Raises Refused (429) if the client has sent too many wrong tokens; a cookie is no try.
        """
        sent = _sent_token(headers)
        if sent is not None:
            self._check_failures(client)
            if self._is_token(sent):
                return True
            self._failures.spend(client)
            return False
        cookie = cookie_parser(headers.get("cookie", "")).get(self._cookie, "")
        until, _, signature = cookie.partition(".")
        genuine = hmac.compare_digest(signature.encode(), self._signed(f"until {until}").encode())
        return genuine and until.isdecimal() and int(until) > time.time()

    def enter(self, form: bytes, client: str, is_secure: bool) -> Response:
        """Answer to the login form: a cookie and the way to the page, or the form again.

        Raises Refused (429) as `knows` does.
        """
        self._check_failures(client)
        fields = parse_qs(form.decode("utf-8", "replace"), max_num_fields=4)
        if not self._is_token(fields.get("token", [""])[0].strip()):
            self._failures.spend(client)
            return self.page(failed=True)
        until = str(int(time.time()) + SESSION_SECONDS)
        answer = self.home()
        answer.set_cookie(
            self._cookie,
            f"{until}.{self._signed(f'until {until}')}",
            max_age=SESSION_SECONDS,
            path=self._path,
            secure=is_secure,
            httponly=True,
            samesite="strict",
        )
        return answer

    def home(self) -> Response:
        """Redirect to the page; the browser keeps the part of the address after #."""
        return RedirectResponse(self._path, 303, headers={"Cache-Control": "no-store"})

    def page(self, *, failed: bool = False) -> Response:
        """Return the login page, with the status of a page that is refused."""
        html = self._html_failed if failed else self._html
        headers = {
            "Cache-Control": "no-store",
            "WWW-Authenticate": "Bearer",
            "Referrer-Policy": "same-origin",  # else the form is sent with "Origin: null"
        }
        return HTMLResponse(html, 401, headers=headers)


def _sent_token(headers: Headers) -> str | None:
    scheme, _, sent = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return sent.strip()
    return headers.get("x-clipkit-token")
