"""The server: it listens, loads the model in the background, and ends with everything closed."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from app.web.page import EXAMPLES, make_app
from app.web.workspace import Workspace
from clipkit.errors import InputError
from clipkit.lazy_encoder import LazyEncoder
from clipkit.library import open_encoder


def serve(
    index_folder: Path,
    *,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    device: str = "auto",
    precision: str = "auto",
    photos: Sequence[Path] = (),
    examples: Sequence[str] = EXAMPLES,
) -> None:
    """Serve the page until Ctrl-C.

    `model` None is the index's own, else builtin. `photos` are indexed at once, in the background.
    A page that other machines can reach (`host` not this machine's own) searches but does not
    index. Raises InputError if the port cannot be had, IndexDamaged, ModelError.
    """
    import uvicorn

    def open_model(spec: str | None) -> LazyEncoder:
        return open_encoder(index_folder, spec, device=device, precision=precision)

    workspace = Workspace(
        index_folder,
        open_model(model),
        may_index=_is_this_machine(host),
        follows=model is None,
        open_model=open_model,
    )
    with _listen(host, port) as listener, tempfile.TemporaryDirectory(prefix="clipkit-") as scratch:
        # Gradio's folder for uploads: ours alone, empty, and gone with the server.
        os.environ["GRADIO_TEMP_DIR"] = scratch
        config = uvicorn.Config(
            make_app(workspace, host=host, examples=examples),
            log_level="warning",
            timeout_graceful_shutdown=2,  # open pages hold a connection
            server_header=False,
            ws="none",
        )
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listener.getsockname()[1]}/"
        print(f"clipkit is at {address}  (Ctrl-C ends it)", flush=True)
        if open_browser:
            threading.Timer(1.0, webbrowser.open, [address]).start()
        try:
            workspace.model.warm()
            if photos:
                workspace.index([str(Path(folder).absolute()) for folder in photos])
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            workspace.close()


def _is_this_machine(host: str) -> bool:
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
