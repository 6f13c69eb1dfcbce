"""The server: it listens, loads the model in the background, and ends with everything closed.

What clients could do to the connections themselves is bounded here: how many there are, how long a
request's head may take, and how long a client may read nothing. guard.py bounds the rest.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import secrets
import shutil
import signal
import socket
import ssl
import stat
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import filelock
import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.web.access_log import AccessLog
from app.web.guard import HEADER_BYTES, PLACES, Rules
from app.web.login import LEAST_TOKEN
from app.web.workspace import Workspace
from clipkit.errors import InputError
from clipkit.heap import give_back_large_blocks
from clipkit.lazy_encoder import LazyEncoder
from clipkit.library import open_encoder

CONNECTIONS, CONNECTIONS_EACH = 512, 64  # at a time, in all and from one address
HEAD_SECONDS = 10.0  # until the head of a request has arrived
STALLED_SECONDS = 30.0  # in which a client has read nothing of what waits for it
IDLE_SECONDS = 15  # of a connection between two requests
CLOSE_SECONDS = 2  # for requests in progress when the server ends
SCRATCH = "clipkit-app-"
STALE_SECONDS = 60.0  # after which scratch without a lock has no owner that is just starting


@dataclass(frozen=True, slots=True)
class Opening:
    """How the page is opened to others.

    `token` None: required where others can reach the page, False: never, True: always. `secret` is the
    token itself; without one it is made up, and printed. `proxies` are addresses or networks of reverse
    proxies, whose X-Forwarded-For and X-Forwarded-Proto count.
    """

    token: bool | None = None
    secret: str | None = None
    read_only: bool = False
    names: tuple[str, ...] = ()
    root_path: str = ""
    proxies: tuple[str, ...] = ()
    certificate: Path | None = None
    key: Path | None = None
    access_log: Path | None = None  # "-": standard error
    log_queries: bool = False
    places: int = PLACES

    def reaches_out(self, host: str) -> bool:
        """Return whether others than this machine can reach a server that listens on `host`."""
        return bool(not is_this_machine(host) or self.names or self.root_path or self.proxies)

    def token_for(self, host: str) -> str | None:
        """Return the token to ask for; None: none. Raises InputError for one that is easily guessed."""
        if self.token is False:
            return None
        if self.secret is not None and (
            len(self.secret) < LEAST_TOKEN
            or not self.secret.isascii()
            or not self.secret.isprintable()
        ):
            raise InputError(
                f"the token has {len(self.secret)} characters; it must be {LEAST_TOKEN} or more "
                "printable ASCII characters, such as openssl rand -hex 16 prints"
            )
        if self.secret is not None:
            return self.secret
        return secrets.token_urlsafe(24) if self.token or self.reaches_out(host) else None


def serve(
    index_folder: Path,
    *,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    device: str = "auto",
    precision: str = "auto",
    runtime: str = "auto",
    photos: Sequence[Path] = (),
    examples: Sequence[str] | None = None,
    opening: Opening | None = None,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    `model` None is the index's own, else builtin. `photos` are indexed at once, in the background.
    A page that others can reach searches but does not index, and asks for a token. Raises InputError
    if the port cannot be had, IndexDamaged, ModelError.
    """
    give_back_large_blocks()  # of the pictures that requests have decoded
    opening = opening or Opening()
    token = opening.token_for(host)
    tls = _tls(opening)

    def open_model(spec: str | None) -> LazyEncoder:
        return open_encoder(index_folder, spec, device=device, precision=precision, runtime=runtime)

    workspace = Workspace(
        index_folder,
        open_model(model),
        may_index=not opening.reaches_out(host),
        read_only=opening.read_only,
        follows=model is None,
        open_model=open_model,
    )
    with _listen(host, port) as listener, _scratch() as scratch, _log(opening) as observers:
        # Gradio's folder for uploads: ours alone, empty, and gone with the server. It is read when
        # Gradio is imported.
        os.environ["GRADIO_TEMP_DIR"] = str(scratch)
        from app.web.page import EXAMPLES, make_app

        rules = Rules(
            names=Rules.names_of(host, opening.names),
            token=token,
            root_path=opening.root_path,
            places=opening.places,
            log_queries=opening.log_queries,
            observers=observers,
        )
        config = uvicorn.Config(
            make_app(workspace, rules=rules, examples=examples or EXAMPLES),
            http=_Connection,
            ws="none",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=bool(opening.proxies),
            forwarded_allow_ips=list(opening.proxies),
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            **tls,
        )
        name = f"[{host}]" if ":" in host else host
        scheme = "https" if tls else "http"
        address = f"{scheme}://{name}:{listener.getsockname()[1]}{opening.root_path}/"
        link = address if token is None else f"{address}login#token={quote(token, safe='')}"
        print(f"clipkit is at {link}  (Ctrl-C ends it)", flush=True)
        if token is None and opening.reaches_out(host):
            print("Anybody who can reach this address can search: --no-token.", file=sys.stderr)
        if open_browser:
            threading.Timer(1.0, webbrowser.open, [link]).start()
        try:
            workspace.warm()
            if photos:
                workspace.index([str(Path(folder).absolute()) for folder in photos])
            _Server(config, rules).run(sockets=[listener])
        finally:
            workspace.close()


def is_this_machine(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; InputError for a port in use.

    It listens before the address is printed: a browser that opens at once waits for the server
    instead of being refused.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "choose another with --port"
        ) from error
    return listener


def _tls(opening: Opening) -> dict[str, Any]:
    """Return uvicorn's settings for TLS. Raises InputError for files that are no certificate and key."""
    if opening.certificate is None and opening.key is None:
        return {}
    if opening.certificate is None or opening.key is None:
        raise InputError("TLS needs both files; give --tls-cert FILE and --tls-key FILE")
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(opening.certificate, opening.key)
    except OSError as error:  # ssl.SSLError is one
        raise InputError(
            f"cannot use {opening.certificate} with {opening.key} for TLS: {error.strerror or error}; "
            "both must be PEM files, and the key without a password"
        ) from None
    return {"ssl_certfile": opening.certificate, "ssl_keyfile": opening.key}


@contextmanager
def _log(opening: Opening) -> Iterator[tuple[AccessLog, ...]]:
    """Open the access log, if there is to be one."""
    if opening.access_log is None:
        yield ()
        return
    path = None if str(opening.access_log) == "-" else opening.access_log
    log = AccessLog(path, queries=opening.log_queries)
    try:
        yield (log,)
    finally:
        log.close()


@contextmanager
def _scratch() -> Iterator[Path]:
    """Make a folder for temporary files, and remove those of servers that were killed.

    Whose server lives is locked; the system frees the lock of one that was killed.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError):
            status = folder.lstat()
            ours = not hasattr(os, "getuid") or status.st_uid == os.getuid()
            if not (ours and stat.S_ISDIR(status.st_mode)):
                continue
            if time.time() - status.st_mtime < STALE_SECONDS and not (folder / "lock").exists():
                continue
            with filelock.FileLock(folder / "lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True) as scratch,
        filelock.FileLock(Path(scratch, "lock"), timeout=0),
    ):
        yield Path(scratch)


class _Server(uvicorn.Server):
    """uvicorn's server, which ends on SIGINT and SIGTERM alike and lets its caller clean up.

    uvicorn raises the signal again at its end, and SIGTERM then kills the process.
    """

    def __init__(self, config: uvicorn.Config, rules: Rules) -> None:
        super().__init__(config)
        self._rules = rules

    @contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._rules.ending.set()
        await super().shutdown(sockets)


class _Connection(H11Protocol):
    """uvicorn's connection with bounds that it lacks: how many there are, and how slow a client is."""

    _head: asyncio.TimerHandle | None = None  # runs while the head of a request is awaited
    _stalled: asyncio.TimerHandle | None = None  # runs while the client reads nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Behind a reverse proxy all connections are from its address.
        each = CONNECTIONS if self.config.proxy_headers else CONNECTIONS_EACH
        host = self.client and self.client[0]
        alike = sum(1 for other in self.connections if other.client and other.client[0] == host)
        if len(self.connections) > CONNECTIONS or alike > each:
            transport.abort()
        else:
            self._head = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # the head is here; guard.py waits for the body
            _stop(self._head)
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        _stop(self._stalled)
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._head)
        _stop(self._stalled)
        super().connection_lost(exc)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
