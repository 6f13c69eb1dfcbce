"""The guard by itself, around a small app: places, time, bodies, tokens, prefixes, the log."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from app.web import guard, limits
from app.web.access_log import AccessLog
from app.web.guard import Answered, Guard, Rules, names_file
from app.web.limits import Bodies, Rate, Refused
from app.web.login import Login
from clipkit.errors import InputError

Handler = Callable[[Any, Any, Any], Awaitable[None]]


async def hello(scope: Any, _receive: Any, send: Any) -> None:
    """Answers at once with the path."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


class Reply:
    """What one request was answered."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.ended = False

    async def send(self, message: Any) -> None:
        assert not self.ended, "sent after the end"
        if message["type"] == "http.response.start":
            assert not self.status, "two answers"
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.ended = not message.get("more_body", False)

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"])


async def ask(
    guarded: Guard,
    path: str = "/health",
    *,
    method: str = "GET",
    body: list[bytes] | None = None,
    client: str = "10.0.0.1",
    raw_path: bytes | None = None,
    **headers: str,
) -> Reply:
    """Send one request. `body` are the pieces as they arrive; the last one never ends if it is None."""
    given = {"host": "localhost", **headers}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": raw_path or path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "client": (client, 1),
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in given.items()],
    }
    pieces = list(body or [])
    reply = Reply()

    async def receive() -> Any:
        if pieces:
            return {
                "type": "http.request",
                "body": pieces.pop(0),
                "more_body": bool(pieces) or headers.get("endless") == "yes",
            }
        if method in ("GET", "HEAD") or headers.get("endless") != "yes":
            return {"type": "http.request", "body": b"", "more_body": False}
        return await asyncio.Event().wait()

    await guarded({**scope}, receive, reply.send)
    return reply


def made(app: Handler = hello, **rules: Any) -> Guard:
    return Guard(app, rules=Rules(**rules))


# ---- places


def test_one_client_cannot_take_all_places() -> None:
    """Of 10 places it has 2; two more of its requests wait, the next is refused. Another is answered."""

    async def scenario() -> None:
        go = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await go.wait()
            await hello(scope, receive, send)

        guarded = made(slow, places=10)
        guarded._places._waiting = 2
        greedy = [asyncio.ensure_future(ask(guarded)) for _ in range(4)]
        await asyncio.sleep(0)
        refused = await ask(guarded)
        assert refused.status == 503 and refused.headers["retry-after"] == "1"
        assert "more than 2 requests at a time from 10.0.0.1" in refused.error
        other = asyncio.ensure_future(ask(guarded, client="10.0.0.2"))
        await asyncio.sleep(0)
        go.set()
        assert (await other).status == 200
        assert [reply.status for reply in await asyncio.gather(*greedy)] == [200] * 4
        assert not guarded._places._clients, "nothing is left behind"

    asyncio.run(scenario())


def test_a_full_server_still_gives_its_metrics() -> None:
    """Prometheus on the same machine is the same client as a proxy, or as what fills the server."""

    async def scenario() -> None:
        go = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] != "/metrics":
                await go.wait()
            await hello(scope, receive, send)

        guarded = made(slow, places=1)
        busy = asyncio.ensure_future(ask(guarded))
        await asyncio.sleep(0)
        async with asyncio.timeout(limits.WAIT_SECONDS):
            assert (await ask(guarded, "/metrics")).status == 200
        go.set()
        assert (await busy).status == 200

    asyncio.run(scenario())


def test_a_full_server_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WAIT_SECONDS", 0.05)

    async def scenario() -> None:
        async def never(*_: Any) -> None:
            await asyncio.Event().wait()

        guarded = made(never, places=1)
        first = asyncio.ensure_future(ask(guarded))
        await asyncio.sleep(0)
        refused = await ask(guarded, client="10.0.0.2")
        assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
        assert "busy" in refused.error
        first.cancel()

    asyncio.run(scenario())


def test_clients_of_one_ipv6_network_are_one() -> None:
    async def scenario() -> list[str]:
        seen: list[str] = []
        guarded = made(observers=(lambda answered: seen.append(answered.client),))
        for client in ("2001:db8::1", "2001:db8::ffff:1", "::ffff:10.1.2.3", "10.1.2.3"):
            await ask(guarded, client=client)
        return seen

    assert asyncio.run(scenario()) == ["2001:db8::/64"] * 2 + ["10.1.2.3"] * 2


# ---- time


def test_an_answer_that_takes_too_long_is_504_and_keeps_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread goes on working, so its place is not free before it ends."""
    monkeypatch.setattr(guard, "ANSWER_SECONDS", 0.05)

    async def scenario() -> None:
        end = asyncio.Event()

        async def stubborn(scope: Any, receive: Any, send: Any) -> None:
            while not end.is_set():
                try:
                    await end.wait()
                except asyncio.CancelledError:
                    continue
            await hello(scope, receive, send)  # too late: nothing of this is sent

        guarded = made(stubborn, places=5)
        reply = await ask(guarded)
        assert reply.status == 504 and "no answer within" in reply.error
        assert reply.headers["connection"] == "close"
        assert guarded._places._clients, "still working"
        end.set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not guarded._places._clients

    asyncio.run(scenario())


def test_event_streams_end_with_the_server() -> None:
    async def scenario() -> None:
        async def stream(_scope: Any, _receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.Event().wait()

        rules = Rules()
        guarded = Guard(stream, rules=rules)
        open_stream = asyncio.ensure_future(ask(guarded, "/gradio_api/queue/data"))
        await asyncio.sleep(0.01)
        assert not open_stream.done()
        rules.ending.set()
        reply = await asyncio.wait_for(open_stream, 5)
        assert reply.status == 200 and reply.ended

        async def over(_scope: Any, _receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            await asyncio.Event().wait()

        ended = await ask(Guard(over, rules=rules), "/gradio_api/queue/data")
        assert ended.ended, "it had sent its end, and sends no second one"

    asyncio.run(scenario())


# ---- bodies


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    data, more = b"", True
    while more:
        message = await receive()
        data, more = data + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": data})


def test_bodies_arrive_whole_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_LIMITS", ())
    monkeypatch.setattr(guard, "BODY_LIMIT", 10)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)

    async def scenario() -> None:
        guarded = made(echo)
        post = {"path": "/api/v1/marks", "method": "POST"}
        assert (await ask(guarded, body=[b"abc", b"def"], **post)).body == b"abcdef"
        assert (await ask(guarded, body=[], **post)).body == b""
        long = await ask(guarded, body=[b"a" * 6, b"b" * 5], **post)
        assert long.status == 413 and long.headers["connection"] == "close"
        assert (await ask(guarded, body=[b""], content_length="11", **post)).status == 413
        assert (await ask(guarded, body=[b""], content_length="1e1", **post)).status == 413
        slow = await ask(guarded, body=[b"a"], endless="yes", **post)
        assert slow.status == 408
        assert guarded._bodies._total == 0 and not guarded._bodies._clients

    asyncio.run(scenario())


def test_bodies_in_memory_are_bounded() -> None:
    """One client has half of all: with 256 MB, 128 MB."""
    bodies = Bodies()
    bodies.add("a", 128_000_000)
    with pytest.raises(Refused, match="too many large requests"):
        bodies.add("a", 1)
    bodies.add("b", 127_999_999)
    with pytest.raises(Refused):
        bodies.add("c", 1)
    bodies.remove("a", 128_000_001)
    bodies.remove("c", 1)
    bodies.add("c", 1)


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ({"path": "/x", "meta": {"_type": "gradio.FileData"}}, True),
        ({"path": 1}, True),
        ([[{"a": [{"_type": "gradio.FileData"}]}]], True),
        ('{"path": "/x"}', True),
        (' ["{\\"path\\": \\"/x\\"}"]', True),
        ({"words": json.dumps(json.dumps({"path": "/x"}))}, True),
        ("[" * 100_000, True),  # too deep to look at
        ({"words": "path: {not JSON"}, False),
        ({"words": "path:trips", "k": 5, "group": None, "x": [1.5, True]}, False),
        (None, False),
    ],
)
def test_a_file_is_seen_wherever_it_stands(sent: Any, named: bool) -> None:
    assert names_file(sent) is named


# ---- rates


def test_a_rate_lets_a_burst_through_and_then_as_many_as_come_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three at once, then two a second."""
    now = 100.0
    monkeypatch.setattr(limits.time, "monotonic", lambda: now)
    rate = Rate(3, 2.0)
    assert [rate.spend("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert rate.spend("b") == 0
    now += 0.5
    assert [rate.spend("a") for _ in range(2)] == [0, 0.5]
    monkeypatch.setattr(limits, "CLIENTS", 2)
    assert rate.spend("c") == 0
    assert list(rate._clients) == ["a", "c"], "the one that is quiet for longest is forgotten"


# ---- hosts and prefixes


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("photos.example.org", 200),
        ("PHOTOS.example.org.:443", 200),
        ("localhost", 200),
        (f"{socket.gethostname().partition('.')[0]}.local:7860", 200),
        ("127.0.0.1:7860", 200),
        ("example.org", 400),
        ("x.photos.example.org", 400),
        ("photos.example.org.evil.example", 400),
    ],
)
def test_names_are_allowed_one_by_one(host: str, status: int) -> None:
    guarded = made(names=Rules.names_of("127.0.0.1", ["photos.example.org"]))
    reply = asyncio.run(ask(guarded, host=host))
    assert reply.status == status
    if status == 400:
        assert "--allow-host" in reply.error


@pytest.mark.parametrize(
    ("path", "passed"),
    [("/photos/health", "/photos/health"), ("/health", "/photos/health")],
)
def test_a_proxy_passes_the_prefix_on_or_not(path: str, passed: str) -> None:
    assert asyncio.run(ask(made(root_path="/photos"), path)).body == passed.encode()


def test_the_prefix_without_its_slash_leads_to_the_page() -> None:
    reply = asyncio.run(ask(made(root_path="/photos"), "/photos"))
    assert reply.status == 308 and reply.headers["location"] == "/photos/"
    assert asyncio.run(ask(made(root_path="/photos"), "/photosx/health")).status == 404


# ---- the token

TOKEN = "a-token-of-these-tests"


def test_the_token_is_asked_for_everywhere_but_in_health_checks() -> None:
    async def scenario() -> None:
        guarded = made(token=TOKEN)
        for path in ("/healthz", "/readyz"):
            assert (await ask(guarded, path)).status == 200
            assert (await ask(guarded, path, method="POST", body=[b""])).status == 401
        for path in ("/metrics", "/api/v1/search", "/ui/clipkit.js", "/nonesuch"):
            reply = await ask(guarded, path)
            assert reply.status == 401 and "Authorization: Bearer TOKEN" in reply.error
        for headers in ({"authorization": f"bearer {TOKEN}"}, {"x_clipkit_token": TOKEN}):
            assert (await ask(guarded, "/metrics", **headers)).status == 200
        page = await ask(guarded, "/")
        assert page.status == 401 and b"<form" in page.body
        assert page.headers["www-authenticate"] == "Bearer"
        assert "'unsafe-inline'" not in page.headers["content-security-policy"]

    asyncio.run(scenario())


def test_a_session_ends_with_its_token_and_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        guarded = made(token=TOKEN, root_path="/photos")
        form = f"token={TOKEN}".encode()
        entered = await ask(guarded, "/photos/login", method="POST", body=[form])
        assert entered.status == 303 and entered.headers["location"] == "/photos/"
        cookie = entered.headers["set-cookie"]
        assert "Path=/photos/" in cookie and "HttpOnly" in cookie and "Secure" not in cookie
        own = {"cookie": cookie.partition(";")[0]}
        assert (await ask(guarded, **own)).status == 200
        assert (await ask(guarded, "/login", **own)).status == 303
        assert (await ask(made(token=TOKEN), **own)).status == 200, "a restart keeps sessions"
        assert (await ask(made(token=TOKEN + "2"), **own)).status == 401, "another token ends them"
        until = int(cookie.partition("=")[2].partition(".")[0])
        monkeypatch.setattr("app.web.login.time.time", lambda: until + 1)
        assert (await ask(guarded, **own)).status == 401

    asyncio.run(scenario())


def test_under_tls_the_cookie_is_secure() -> None:
    answer = Login(TOKEN).enter(f"token={TOKEN}".encode(), "10.0.0.1", is_secure=True)
    assert "Secure" in answer.headers["set-cookie"]
    wrong = Login(TOKEN).enter(b"token=wrong", "10.0.0.1", is_secure=True)
    assert wrong.status_code == 401 and b"not the token" in wrong.body
    assert "set-cookie" not in wrong.headers


# ---- the log


def answered(**changes: Any) -> Answered:
    values = {
        "client": "10.0.0.1",
        "method": "POST",
        "route": "/api/v1/marks",
        "path": "/api/v1/marks",
        "query": None,
        "status": 200,
        "bytes": 12,
        "seconds": 0.25,
    }
    return Answered(**{**values, **changes})


def test_the_log_has_a_line_of_json_for_each_request(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.jsonl")
    log(answered(query="my secret"))
    (tmp_path / "access.jsonl").rename(tmp_path / "old.jsonl")  # what logrotate does
    log.close()
    files = [path for path in (tmp_path / "old.jsonl", tmp_path / "access.jsonl") if path.exists()]
    (line,) = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "client": "10.0.0.1",
        "method": "POST",
        "route": "/api/v1/marks",
        "status": 200,
        "bytes": 12,
        "ms": 250.0,
    }


def test_a_full_disk_loses_lines_and_no_request(caplog: pytest.LogCaptureFixture) -> None:
    """/dev/full takes no byte: said once, not for each request."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full on this system")
    log = AccessLog(Path("/dev/full"))
    for _ in range(5):
        log(answered())
    try:
        log.close()
    except OSError:
        pytest.fail("closing fails on a full disk")
    assert [record.message for record in caplog.records if "access log" in record.message] == [
        "lines of the access log are lost: [Errno 28] No space left on device"
    ]


def test_a_log_that_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write the access log .*: No such file"):
        AccessLog(tmp_path / "none" / "access.jsonl")


def test_routes_are_logged_and_words_only_if_wanted() -> None:
    """A refused address is somebody's text: "-" stands for it."""

    class Route:
        path_format = "/thumbnails/{image_id}"

    async def routed(scope: Any, receive: Any, send: Any) -> None:
        scope["route"] = Route()
        await echo(scope, receive, send)

    async def scenario(log_queries: bool) -> list[Answered]:
        seen: list[Answered] = []
        guarded = made(routed, observers=(seen.append,), log_queries=log_queries)
        await ask(guarded, "/thumbnails/abc")
        await ask(guarded, "/etc/passwd")
        words = json.dumps({"query": "a red car"}).encode()
        await ask(guarded, "/api/v1/marks", method="POST", body=[words])
        return seen

    seen = asyncio.run(scenario(False))
    assert [one.route for one in seen] == ["/thumbnails/{image_id}", "-", "/thumbnails/{image_id}"]
    assert [one.status for one in seen] == [200, 404, 200]
    assert [one.query for one in seen] == [None] * 3
    assert asyncio.run(scenario(True))[2].query == "a red car"
