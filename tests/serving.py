"""A real server in a process of its own: `with serving(folder) as server: ...`.

It searches by colours (tests/colours.py) and is otherwise `clipkit app`. Run as a program, this module
is that process.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass
class Server:
    """A server that runs. Linux lets a client choose its address among 127.0.0.0/8."""

    process: subprocess.Popen[str]
    address: str  # with the token's link, as it was printed
    scratch: Path  # where it may write temporary files

    @property
    def port(self) -> int:
        match = re.search(r":(\d+)/", self.address)
        assert match is not None, self.address
        return int(match[1])

    def connect(self, client: str = "127.0.0.1", *, timeout: float = 30) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout, (client, 0))

    def ask(self, raw: bytes, client: str = "127.0.0.1") -> tuple[int, bytes]:
        """Send bytes and return status and answer; (0, b"") if the server cut the connection off."""
        with self.connect(client) as connection:
            try:
                connection.sendall(raw)
            except OSError:
                pass  # it may have refused already
            return answer(connection)

    def post(
        self, path: str, body: object, client: str = "127.0.0.1", **headers: str
    ) -> tuple[int, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask(request("POST", path, data, **headers), client)

    def get(self, path: str, client: str = "127.0.0.1", **headers: str) -> tuple[int, bytes]:
        return self.ask(request("GET", path, **headers), client)

    def peak_megabytes(self) -> float:
        """The most memory that the process has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) / 1000

    def searches(self, client: str = "127.0.0.9") -> bool:
        """Whether another client's search is answered."""
        status, answer = self.post("/api/v1/search", {"query": "red"}, client)
        return status == 200 and b'"rank"' in answer


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    lines = {"host": "127.0.0.1", "connection": "close", **headers}
    if body or method == "POST":
        lines.setdefault("content_length", str(len(body)))
        lines.setdefault("content_type", "application/json")
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Read until the server closes; (0, b"") if nothing came."""
    data = bytearray()
    try:
        while piece := connection.recv(65_536):
            data += piece
    except OSError:
        pass
    match = re.match(rb"HTTP/1\.1 (\d+)", data)
    return (int(match[1]), bytes(data)) if match else (0, bytes(data))


@contextmanager
def serving(
    folder: Path,
    *,
    limits: Mapping[str, float] | None = None,
    **options: Any,
) -> Iterator[Server]:
    """Serve the index in `folder`/index. `limits` replace constants by their full name; `options` are
    those of `app.web.server.serve`, those of its Opening among them."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    settings = json.dumps({"folder": str(folder), "limits": dict(limits or {}), "options": options})
    with (
        (folder / "stderr.txt").open("w") as errors,
        subprocess.Popen(
            [sys.executable, __file__, settings],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"https?://\S+", line)
        assert found is not None, (folder / "stderr.txt").read_text()
        try:
            yield Server(process, found[0], scratch)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def _main() -> None:
    from colours import ColourModel

    from app.web import server

    settings = json.loads(sys.argv[1])
    for name, value in settings["limits"].items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    options = settings["options"]
    fields = server.Opening.__dataclass_fields__
    opening = {name: options.pop(name) for name in list(options) if name in fields}
    for name in ("certificate", "key", "access_log"):
        if name in opening:
            opening[name] = Path(opening[name])
    server.open_encoder = lambda *_, **__: ColourModel()  # type: ignore[assignment]
    folder = Path(settings["folder"])
    photos = [Path(photo) for photo in options.pop("photos", ())]
    server.serve(
        folder / "index", port=0, photos=photos, opening=server.Opening(**opening), **options
    )


if __name__ == "__main__":
    _main()
