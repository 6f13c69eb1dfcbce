"""The guard around everything that is served, Gradio included: who may ask, for what, and the headers of
the answer."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FOREVER = "private, max-age=31536000, immutable"  # the address names the content: it cannot change

# The routes of Gradio that the page needs. All others (files, uploads, proxy, API pages, run history,
# monitoring, ...) are closed: each of Gradio's file-reading vulnerabilities was in those.
_GRADIO = re.compile(
    r"/(|config|theme\.css|manifest\.json|(assets|static/(js|fonts|img))/[\w.\-/]+|svelte/[\w.\-/]+"
    r"|gradio_api/(queue/(join|data)|reset|cancel|startup-events|heartbeat/\w+))"
)
_OWN = re.compile(
    r"/(healthz?|readyz|api/v1/[\w./-]+|start|favicon\.ico|queries|(thumbnails|pictures|details|queries|open|show)/[^/]+"
    r"|ui/[\w.]+|reports/(run@)?[\w.-]+|sortings/[0-9a-f]{16}\.csv|corrections\.jsonl"
    r"|folders(/(browse|forget))?|models(/(active|use|fill|drop))?|teach/(start|cancel|use|keep|undo|dismiss))"
)
_INLINE = re.compile(rb"<script(?:\s+data-[\w-]+)?>(.*?)</script>", re.DOTALL)

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
_LOCKED = "default-src 'none'; frame-ancestors 'none'; sandbox"
# Anybody may have written a report file: it may have any style, but no script and no request.
_REPORT = (
    _LOCKED + "; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)
# 'unsafe-eval': Gradio's HTML component compiles its template with Function(). Inline styles are
# Svelte's. Inline scripts run by their hash only, so an injected event handler does not run.
_PAGE = (
    "default-src 'none'; script-src 'self' 'unsafe-eval' {hashes}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; manifest-src 'self'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


class Guard:
    """Around everything, Gradio included: who may ask, for what, and the headers of the answer."""

    def __init__(self, app: ASGIApp, *, names: Iterable[str]) -> None:
        self.app = app
        self.names = frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # Lifespan passes. There are no websockets here.
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            status, sentence = refusal
            await JSONResponse({"error": sentence}, status)(scope, receive, _headed(send, _LOCKED))
        elif scope["path"] == "/":
            await self._page(scope, receive, send)
        else:
            assets = scope["path"].startswith("/assets/")
            policy = _REPORT if scope["path"].startswith("/reports/") else _LOCKED
            await self.app(scope, receive, _headed(send, policy, assets=assets))

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._accepts(host):
            return 400, f"unknown host {host!r}; open the page at 127.0.0.1 or localhost"
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            elsewhere = headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
            if elsewhere or (origin is not None and urlsplit(origin).netloc != host):
                return 403, "request from another site's page; only clipkit's own page may send it"
        path = scope["path"]
        if ".." in path or not (_OWN.fullmatch(path) or _GRADIO.fullmatch(path)):
            return 404, "not found"
        return None

    def _accepts(self, host: str) -> bool:
        """Return whether a Host header is accepted: DNS rebinding needs a name, not a number."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send Gradio's page with a policy that allows exactly the inline scripts in it, by hash."""
        plain = [(key, value) for key, value in scope["headers"] if key != b"accept-encoding"]
        start: Message = {}
        body = bytearray()

        async def hold(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            elif message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
                if not message.get("more_body", False):
                    hashes = " ".join(
                        f"'sha256-{_sha256(script)}'" for script in _INLINE.findall(bytes(body))
                    )
                    headed = _headed(send, _PAGE.format(hashes=hashes))
                    await headed(start)
                    await headed({"type": "http.response.body", "body": bytes(body)})

        await self.app({**scope, "headers": plain}, receive, hold)


def _sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _headed(send: Send, policy: str, *, assets: bool = False) -> Send:
    """Return `send` with our headers. `assets` says that the address has a hash of the content."""

    async def headed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            headers["Content-Security-Policy"] = policy
            if assets and message["status"] == 200:
                headers["Cache-Control"] = FOREVER
            # Gradio lets other local pages read its answers; only its own page needs to.
            del headers["Access-Control-Allow-Origin"]
            del headers["Access-Control-Allow-Credentials"]
        await send(message)

    return headed
