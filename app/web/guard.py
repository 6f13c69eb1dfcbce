"""The guard around everything that is served, Gradio included: who may ask, for what, how much at a
time, and the headers of the answer.

A request passes, in this order: the name of the host (DNS rebinding), the token, the page that sent it
(cross-origin posts), the route, its body (size, time, and no file in Gradio's events), and a place among
those that are answered at the same time. What is refused gets its status and one sentence.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import json
import re
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.web.limits import Bodies, Load, Places, Rate, Refused
from app.web.login import Login
from clipkit.wording import printable

FOREVER = "private, max-age=31536000, immutable"  # the address names the content: it cannot change

# ---- limits

MEGABYTE = 1_000_000
BODY_LIMIT = MEGABYTE
# Routes whose bodies may be larger, or must be smaller. The words to classify by are up to 200 kB; in
# JSON a picture of 64 MB is 86 MB of base64.
BODY_LIMITS = (
    (re.compile(r"/gradio_api/.*"), 256_000),
    (re.compile(r"/login"), 4_000),
    (re.compile(r"/queries"), 64 * MEGABYTE + 1),  # the route itself refuses what is above 64 MB
    (re.compile(r"/api/v1/(search|similarity|embed/image)"), 90 * MEGABYTE),
    (re.compile(r"/api/v1/(similar|embed/text|marks)"), 4 * MEGABYTE + 1),
)
HEADER_BYTES = 16_384  # request line and headers; app.web.server sets it
PATH_BYTES, QUERY_BYTES = 1_024, 4_096
BODY_SECONDS = 20.0  # until the body is there, and a second more for each RATE bytes
ANSWER_SECONDS = 60.0  # until the answer has gone out, and a second more for each RATE bytes
RATE = 20_000
PLACES = 40  # requests that are answered at a time; a client has a fifth of them
WAITING = 64  # requests of one client that wait for a place
STREAMS, STREAMS_EACH = 256, 32  # event streams at a time, in all and of one client
SCRAPES = 2  # requests for the metrics at a time
EVENTS, EVENTS_PER_SECOND = 40, 10.0  # of Gradio's queue, of one client: at once, and on average

# ---- routes

# The routes of Gradio that the page needs. All others (configuration, files, uploads, proxy, API pages,
# run history, monitoring, ...) are closed: each of Gradio's file-reading vulnerabilities was in those.
_GRADIO = re.compile(
    r"/(|theme\.css|(assets|static/(js|fonts|img))/[\w.\-/]+|gradio_api/queue/(join|data))"
)
_OWN = re.compile(
    r"/(healthz?|readyz|metrics|start|favicon\.ico|queries|api/v1/[\w./\-]+"
    r"|(thumbnails|pictures|details|queries|open|show)/[^/]+"
    r"|ui/[\w.]+|reports/((run|taught)@)?[\w.-]+|sortings/[0-9a-f]{16}\.csv|corrections\.jsonl"
    r"|folders(/(browse|forget))?|models(/(active|use|fill|drop))?|teach/(start|cancel|use|keep|undo|dismiss))"
)
_OPEN = ("/healthz", "/readyz")  # without a token and without a place
_JOIN, _EVENTS = "/gradio_api/queue/join", "/gradio_api/queue/data"
_INLINE = re.compile(rb"<script(?:\s+data-[\w-]+)?>(.*?)</script>", re.DOTALL)
# What Gradio would build addresses from. uvicorn has read X-Forwarded-For and -Proto of a trusted proxy.
_HIDDEN = re.compile(rb"x-forwarded-.*|forwarded|x-gradio-.*|x-original-.*|x-rewrite-.*")

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


@dataclass(frozen=True, slots=True)
class Answered:
    """What observers learn of a request when it is over."""

    client: str
    method: str
    route: str  # a template such as "/thumbnails/{image_id}"; "-" if no route was reached
    path: str  # as it was asked for
    query: str | None  # the words that were searched for; None if none, or not `Rules.log_queries`
    status: int  # 0: the client went away first
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """How a server is opened. `names` are accepted as Host beside numeric addresses."""

    names: frozenset[str] = frozenset({"localhost"})
    token: str | None = None  # None: anybody who reaches the port may ask
    root_path: str = ""  # the prefix below which a reverse proxy serves the page, such as "/photos"
    places: int = PLACES
    load: Load = field(default_factory=Load)  # kept by the guard, for metrics
    log_queries: bool = False
    observers: tuple[Callable[[Answered], None], ...] = ()
    on_event: Callable[[str], None] | None = None  # before an event, with the id of its session
    ending: asyncio.Event = field(default_factory=asyncio.Event)  # event streams end when it is set

    @staticmethod
    def names_of(host: str, others: Iterable[str] = ()) -> frozenset[str]:
        """Return the names of a server that listens on `host`: its own and this machine's."""
        machine = socket.gethostname()
        local = f"{machine.partition('.')[0]}.local"  # multicast DNS
        names = (host, "localhost", machine, local, *others)
        return frozenset(name.lower().rstrip(".") for name in names)


class Guard:
    """Around everything, Gradio included; see the module."""

    def __init__(self, app: ASGIApp, *, rules: Rules) -> None:
        self.app = app
        self.rules = rules
        self._login = Login(rules.token, rules.root_path) if rules.token else None
        self._places = Places(rules.places, max(1, rules.places // 5), WAITING, rules.load)
        self._streams = Places(STREAMS, STREAMS_EACH, 0)
        # a full server still says that it is full
        self._scrapes = Places(SCRAPES, SCRAPES, WAITING, rules.load)
        self._bodies = Bodies()
        self._events = Rate(EVENTS, EVENTS_PER_SECOND)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # Lifespan passes. There are no websockets here.
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = _Request(scope, receive, send, self.rules.root_path)
        started = time.monotonic()
        try:
            await self._answer(request)
        except Refused as refused:
            if not request.status:
                answer = refused.answer()
                await answer(request.scope, receive, request.headed(_LOCKED))
        except _GoneError:
            pass
        except asyncio.CancelledError:
            if not self.rules.ending.is_set():
                raise
        finally:
            self._observe(request, time.monotonic() - started)

    async def _answer(self, request: _Request) -> None:
        self._check_shape(request)
        path, headers = request.path, request.headers
        host = headers.get("host", "")
        if not self._accepts(host):
            raise Refused(
                400,
                f"unknown host {printable(host)!r}; open the page at 127.0.0.1 or localhost, or name "
                "the host with --allow-host",
            )
        if path is None:  # the prefix without its slash
            to = {"Location": f"{self.rules.root_path}/"}
            await Response(status_code=308, headers=to)(
                request.scope, request.receive, request.headed(_LOCKED)
            )
            return
        if request.method not in ("GET", "HEAD"):
            origin = headers.get("origin")
            elsewhere = headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
            if elsewhere or (origin is not None and urlsplit(origin).netloc != host):
                sentence = (
                    "request from another site's page; only clipkit's own page may send it, and a "
                    "reverse proxy must pass its Host header on with the port"
                )
                raise Refused(403, sentence, close=True)
        if path in _OPEN and request.method in ("GET", "HEAD"):
            await self.app(request.scope, request.receive, request.headed(_LOCKED))
            return
        if self._login is not None and not await self._admitted(request, self._login):
            return
        if ".." in path or not (_OWN.fullmatch(path) or _GRADIO.fullmatch(path)):
            sentence = "there is nothing here; the page is at /, the API at /api/v1/docs"
            raise Refused(404, sentence, close=request.has_body)
        async with self._body(request):
            if path == _EVENTS:
                async with self._place(self._streams, request) as end:
                    await self._serve(request, end, None)
            else:
                places = self._scrapes if path == "/metrics" else self._places
                async with self._place(places, request) as end:
                    await self._serve(request, end, ANSWER_SECONDS)

    def _check_shape(self, request: _Request) -> None:
        """Refuse what no browser sends and what proxies and servers read differently."""
        headers, scope = request.headers, request.scope
        if len(scope["raw_path"]) > PATH_BYTES or len(scope["query_string"]) > QUERY_BYTES:
            sentence = (
                f"the address is longer than {PATH_BYTES:,} bytes, or {QUERY_BYTES:,} after its ?"
            )
            raise Refused(414, sentence, close=True)
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > HEADER_BYTES:
            raise Refused(431, f"the headers are larger than {HEADER_BYTES:,} bytes", close=True)
        if "transfer-encoding" in headers and "content-length" in headers:
            sentence = "a request has a Content-Length or a Transfer-Encoding, not both"
            raise Refused(400, sentence, close=True)
        if request.method in ("GET", "HEAD") and request.has_body:
            raise Refused(400, f"a {request.method} request has no body", close=True)

    def _accepts(self, host: str) -> bool:
        """Return whether a Host header is accepted: DNS rebinding needs a name, not a number."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            return name in self.rules.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    async def _admitted(self, request: _Request, login: Login) -> bool:
        """Return whether the request is to be answered: it has the token. Else it was answered here."""
        if request.path == "/login" and request.method == "POST":
            async with self._body(request):
                answer = login.enter(request.whole_body(), request.client, request.is_secure)
        elif login.knows(request.headers, request.client):
            if request.path != "/login":
                return True
            answer = login.home()
        elif request.path in ("/", "/login") and request.method in ("GET", "HEAD"):
            answer = login.page()
        else:
            sentence = "log in first: reload the page, or send Authorization: Bearer TOKEN"
            raise Refused(401, sentence, close=request.has_body)
        await answer(request.scope, request.receive, request.headed(login.policy))
        return False

    # ---- bodies

    @asynccontextmanager
    async def _body(self, request: _Request) -> AsyncIterator[None]:
        """Read the body before anything works on it. It counts as held until the request is over."""
        if request.method in ("GET", "HEAD") or request.chunks is not None:
            yield
            return
        limit = _body_limit(request.path or "")
        too_large = f"the request's body is larger than the limit of {limit / MEGABYTE:g} MB"
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > limit:
            raise Refused(413, too_large, close=True)
        started, size = time.monotonic(), 0
        chunks: deque[bytes] = deque()
        try:
            more = True
            while more:
                until = started + BODY_SECONDS + size / RATE
                try:
                    async with asyncio.timeout(until - time.monotonic()):
                        message = await request.receive()
                except TimeoutError:
                    sentence = f"the request's body did not arrive in {BODY_SECONDS:.0f} s"
                    raise Refused(408, sentence, close=True) from None
                if message["type"] == "http.disconnect":
                    raise _GoneError
                chunk = message.get("body", b"")
                more = message.get("more_body", False)
                size += len(chunk)
                self._bodies.add(request.client, len(chunk))
                chunks.append(chunk)
                if size > limit:
                    raise Refused(413, too_large, close=True)
            request.chunks = chunks
            if request.path == _JOIN:
                self._check_event(request)
            yield
        finally:
            self._bodies.remove(request.client, size)

    def _check_event(self, request: _Request) -> None:
        """Let only such an event through to Gradio's queue as the page sends.

        Gradio would read any file or address that an object {"path": ..., "meta": {"_type":
        "gradio.FileData"}} in an input names. No event of the page has an input, so none is let through,
        nor such an object elsewhere. What goes on is the JSON as it was read here, so that it cannot be
        read differently there.
        """
        try:
            event = json.loads(request.whole_body())
        except (ValueError, RecursionError):
            raise Refused(400, "the event is no JSON object") from None
        if not isinstance(event, dict):
            raise Refused(400, "the event is no JSON object")
        if event.get("data") != []:
            raise Refused(400, "the event has inputs; no event of this page takes any")
        if names_file(event):
            raise Refused(400, "the event names a file; no event of this page takes one")
        session = event.get("session_hash")
        if not isinstance(session, str) or not re.fullmatch(r"\w{1,64}", session):
            raise Refused(400, "the event's session_hash must be up to 64 letters and digits")
        if wait := self._events.spend(request.client):
            raise Refused(429, "too many events; wait a second", retry_after=wait)
        if self.rules.on_event:
            self.rules.on_event(session)
        request.replace_body(json.dumps(event).encode())

    # ---- places and the answer

    @asynccontextmanager
    async def _place(self, places: Places, request: _Request) -> AsyncIterator[_End]:
        """Hold a place, also while a thread still works on an answer that was given up."""
        await places.take(request.client)
        end = _End()
        try:
            yield end
        finally:
            if end.work is None or end.work.done():
                places.give(request.client)
            else:
                end.work.add_done_callback(lambda work: work.cancelled() or work.exception())
                end.work.add_done_callback(lambda _: places.give(request.client))

    async def _serve(self, request: _Request, end: _End, seconds: float | None) -> None:
        """Answer. Without an end in time: 504, or a connection that is cut off."""
        if request.path == "/":
            answer = self._page(request, end)
        else:
            assets = request.path.startswith("/assets/")  # type: ignore[union-attr]
            policy = _REPORT if request.path.startswith("/reports/") else _LOCKED  # type: ignore[union-attr]
            send = request.headed(policy, assets=assets, given_up=end.given_up)
            answer = self.app(request.scope, request.replay, send)
        end.work = work = asyncio.ensure_future(answer)
        stop = None if seconds else asyncio.ensure_future(self.rules.ending.wait())
        started = time.monotonic()
        try:
            while not work.done():
                left = None
                if seconds:
                    left = started + seconds + request.bytes / RATE - time.monotonic()
                    if left <= 0:
                        break
                waited = {work, stop} if stop else {work}
                await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if stop and stop.done():
                    break
        finally:
            if stop:
                stop.cancel()
            if not work.done():
                end.given_up.set()
                work.cancel()
        if work.done():
            work.result()
        elif seconds:
            raise Refused(504, f"no answer within {seconds:.0f} s", close=True)
        elif request.status and not request.ended:  # an event stream of a server that ends
            await request.send({"type": "http.response.body", "body": b""})

    async def _page(self, request: _Request, end: _End) -> None:
        """Send Gradio's page with a policy that allows exactly the inline scripts in it, by hash."""
        plain = [
            (key, value) for key, value in request.scope["headers"] if key != b"accept-encoding"
        ]
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
                    policy = _PAGE.format(hashes=hashes)
                    headed = request.headed(policy, given_up=end.given_up)
                    await headed(start)
                    await headed({"type": "http.response.body", "body": bytes(body)})

        await self.app({**request.scope, "headers": plain}, request.replay, hold)

    def _observe(self, request: _Request, seconds: float) -> None:
        if not self.rules.observers:
            return
        route = request.scope.get("route")
        answered = Answered(
            client=request.client,
            method=request.method,
            route=getattr(route, "path_format", None) or getattr(route, "path", "-"),
            path=printable(request.scope["path"]),
            query=request.words() if self.rules.log_queries else None,
            status=request.status,
            bytes=request.bytes,
            seconds=seconds,
        )
        for observe in self.rules.observers:
            observe(answered)


class _GoneError(Exception):
    """The client went away while it sent its body."""


@dataclass(slots=True)
class _End:
    """The work on an answer, as far as it has begun."""

    work: asyncio.Future[None] | None = None
    given_up: asyncio.Event = field(default_factory=asyncio.Event)  # it may send no more


class _Request:
    """A request on its way through the guard, and what has been answered so far."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, root_path: str) -> None:
        self.method: str = scope["method"]
        self.receive, self._send = receive, send
        self.client = _client(scope)
        self.chunks: deque[bytes] | None = None  # of the body, once it was read
        self.body = b""  # of a small one, for the log
        self.status, self.bytes, self.ended = 0, 0, False  # of the answer
        path: str = scope["path"]
        # A proxy passes the path on with the prefix or without.
        if root_path and (path == root_path or path.startswith(root_path + "/")):
            path = path[len(root_path) :]
        self.path: str | None = path or None  # below the prefix; None: the prefix without its slash
        self.scope: dict[str, Any] = {
            **scope,
            "path": root_path + path,
            "raw_path": scope.get("raw_path") or path.encode(),
            "root_path": root_path,
            "headers": [(k, v) for k, v in scope["headers"] if not _HIDDEN.fullmatch(k)],
        }
        if path != _EVENTS and _GRADIO.fullmatch(path):
            self.scope["query_string"] = b""  # deep links and other views
        self.headers = Headers(scope=self.scope)

    @property
    def has_body(self) -> bool:
        return "transfer-encoding" in self.headers or self.headers.get("content-length", "0") != "0"

    @property
    def is_secure(self) -> bool:
        return bool(self.scope["scheme"] == "https")

    def whole_body(self) -> bytes:
        return b"".join(self.chunks or ())

    def replace_body(self, body: bytes) -> None:
        self.chunks = deque([body])
        drop = (b"content-length", b"content-type", b"transfer-encoding", b"content-encoding")
        self.scope["headers"] = [
            *((key, value) for key, value in self.scope["headers"] if key not in drop),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]

    async def replay(self) -> Message:
        """Receive for the app: the body that was read, then what comes after."""
        if not self.chunks:
            return await self.receive()
        if not self.body and len(self.chunks) == 1 and len(self.chunks[0]) < BODY_LIMIT:
            self.body = self.chunks[0]
        chunk = self.chunks.popleft()
        return {"type": "http.request", "body": chunk, "more_body": bool(self.chunks)}

    def words(self) -> str | None:
        """Return the words that were searched for, as far as the body says them."""
        try:
            sent = json.loads(self.body or b"null")
            sent = sent.get("event_data") or sent
            words = sent.get("query") or sent.get("words")
        except (ValueError, AttributeError, RecursionError):
            return None
        return words[:2_000] if isinstance(words, str) else None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.ended = not message.get("more_body", False)
        self.bytes += len(message.get("body", b""))
        await self._send(message)

    def headed(
        self, policy: str, *, assets: bool = False, given_up: asyncio.Event | None = None
    ) -> Send:
        """Return `send` with our headers. `assets` says that the address has a hash of the content;
        nothing is sent any more once `given_up` is set."""

        async def headed(message: Message) -> None:
            if given_up is not None and given_up.is_set():
                return
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers["Content-Security-Policy"] = policy
                if assets and message["status"] == 200:
                    headers["Cache-Control"] = FOREVER
                # Gradio lets other local pages read its answers; only its own page needs to.
                del headers["Access-Control-Allow-Origin"]
                del headers["Access-Control-Allow-Credentials"]
            await self.send(message)

        return headed


def names_file(sent: Any) -> bool:
    """Return whether an object that Gradio takes for a file is anywhere in `sent`, which was JSON; also
    in JSON inside a string."""
    left = [sent]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if "path" in value or "_type" in value:
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and value.lstrip()[:1] in ("{", "[", '"'):
            try:
                left.append(json.loads(value))
            except ValueError:
                pass
            except RecursionError:
                return True
    return False


def _body_limit(path: str) -> int:
    return next((limit for routes, limit in BODY_LIMITS if routes.fullmatch(path)), BODY_LIMIT)


def _client(scope: Scope) -> str:
    """Return the address that a client is counted by: of IPv6 the network, as one machine may have it
    whole."""
    host = (scope.get("client") or ("-",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 6:
        mapped = address.ipv4_mapped
        return str(mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return host


def _sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
