"""The access log: one JSON object per request, written by a thread of its own.

A full disk or a slow terminal loses lines, never a request.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from app.web.guard import Answered
from clipkit.errors import InputError

LINES_HELD = 10_000  # that wait to be written


class AccessLog:
    """An observer of the guard. `path` None: standard error. Close it at the end.

    Raises InputError if the file cannot be opened.
    """

    def __init__(self, path: Path | None, *, queries: bool = False) -> None:
        self._queries = queries
        self._lines: queue.Queue[logging.LogRecord] = queue.Queue(LINES_HELD)
        writer: logging.Handler
        if path is None:
            writer = _Stream(sys.stderr)
        else:
            try:
                writer = _File(path, encoding="utf-8", errors="replace")
            except OSError as error:
                raise InputError(
                    f"cannot write the access log {path}: {error.strerror or error}"
                ) from None
        self._writer = writer
        self._thread = logging.handlers.QueueListener(self._lines, writer)
        self._thread.start()

    def __call__(self, answered: Answered) -> None:
        """Write a line. Neither an address nor a query is in it, unless `queries`."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "client": answered.client,
            "method": answered.method,
            "route": answered.route,
            "status": answered.status,
            "bytes": answered.bytes,
            "ms": round(answered.seconds * 1000, 1),
        }
        if self._queries:
            line |= {"path": answered.path, "query": answered.query}
        record = logging.makeLogRecord({"msg": json.dumps(line)})
        with suppress(queue.Full):
            self._lines.put_nowait(record)

    def close(self) -> None:
        """Write what is left."""
        self._thread.stop()
        with suppress(OSError):
            self._writer.close()


class _Quiet(logging.Handler):
    """A handler that says once that it cannot write, and goes on."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, ARG002
        if not self._said:
            self._said = True
            error = sys.exc_info()[1]
            logging.getLogger(__name__).warning("lines of the access log are lost: %s", error)


class _File(_Quiet, logging.handlers.WatchedFileHandler):
    """Goes on in a new file when logrotate has moved the old one."""


class _Stream(_Quiet, logging.StreamHandler):  # type: ignore[type-arg]
    """Standard error."""
