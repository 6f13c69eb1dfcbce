"""How much one client and all together may ask for at a time: places, bodies in memory, rates."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass

from fastapi.responses import JSONResponse, Response

BODIES_HELD = 256_000_000  # bytes of bodies in memory at a time, of which one client may have half
WAIT_SECONDS = 5.0  # for a place
CLIENTS = 10_000  # whose rates are remembered


class Refused(Exception):
    """The answer to a request that is refused. `close` ends the connection: its body was not read."""

    def __init__(
        self, status: int, sentence: str, *, retry_after: float = 0, close: bool = False
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers: dict[str, str] = {"Cache-Control": "no-store"}
        if retry_after:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))
        if close:
            self.headers["Connection"] = "close"

    def answer(self) -> Response:
        return JSONResponse({"error": str(self)}, self.status, self.headers)


@dataclass(slots=True)
class Load:
    """Requests that have a place, and that wait for one."""

    active: int = 0
    waiting: int = 0


class Places:
    """Places for requests at a time, in all and for each client. Others wait, in the order they came."""

    def __init__(self, most: int, each: int, waiting: int, load: Load | None = None) -> None:
        self._each, self._waiting = each, waiting
        self._load = load or Load()
        self._all = asyncio.Semaphore(most)
        self._clients: dict[str, tuple[asyncio.Semaphore, list[None]]] = {}

    async def take(self, client: str) -> None:
        """Take a place for the client. Raises Refused (503) if none becomes free in time."""
        own, present = self._clients.setdefault(client, (asyncio.Semaphore(self._each), []))
        if len(present) >= self._each + self._waiting:
            sentence = f"more than {self._each} requests at a time from {client}; wait for answers"
            raise Refused(503, sentence, retry_after=1)
        present.append(None)
        self._load.waiting += 1
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await own.acquire()
                try:
                    await self._all.acquire()
                except BaseException:
                    own.release()
                    raise
        except BaseException as error:
            self._leave(client)
            if isinstance(error, TimeoutError):
                sentence = "the server is busy; try again in a few seconds"
                raise Refused(503, sentence, retry_after=WAIT_SECONDS) from None
            raise
        finally:
            self._load.waiting -= 1
        self._load.active += 1

    def give(self, client: str) -> None:
        """Give a place back."""
        self._load.active -= 1
        self._all.release()
        self._clients[client][0].release()
        self._leave(client)

    def _leave(self, client: str) -> None:
        present = self._clients[client][1]
        present.pop()
        if not present:
            del self._clients[client]


class Bodies:
    """The bytes of bodies that are in memory."""

    def __init__(self) -> None:
        self._total = 0
        self._clients: dict[str, int] = {}

    def add(self, client: str, size: int) -> None:
        """Count more bytes. Raises Refused (503) beyond BODIES_HELD."""
        self._total += size
        self._clients[client] = self._clients.get(client, 0) + size
        if self._total > BODIES_HELD or self._clients[client] > BODIES_HELD // 2:
            sentence = "too many large requests at a time; try again in a few seconds"
            raise Refused(503, sentence, retry_after=WAIT_SECONDS, close=True)

    def remove(self, client: str, size: int) -> None:
        self._total -= size
        self._clients[client] = self._clients.get(client, 0) - size
        if self._clients[client] <= 0:
            del self._clients[client]


class Rate:
    """A bound for each client: `burst` at once, `per_second` on average (a token bucket)."""

    def __init__(self, burst: int, per_second: float) -> None:
        self._burst, self._per_second = burst, per_second
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()  # spent, and when

    def _spent(self, client: str) -> float:
        spent, when = self._clients.get(client, (0.0, 0.0))
        return max(0.0, spent - (time.monotonic() - when) * self._per_second)

    def wait(self, client: str) -> float:
        """Return how many seconds the client has to wait; 0 if it need not."""
        return max(0.0, (self._spent(client) + 1 - self._burst) / self._per_second)

    def spend(self, client: str) -> float:
        """Count one more, unless the client has to wait; return for how many seconds."""
        if wait := self.wait(client):
            return wait
        self._clients[client] = self._spent(client) + 1, time.monotonic()
        self._clients.move_to_end(client)
        while len(self._clients) > CLIENTS:
            self._clients.popitem(last=False)
        return 0.0
