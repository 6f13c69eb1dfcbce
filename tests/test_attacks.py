"""Attacks on a real server over real sockets: each is refused with its status, memory stays bounded, and
another client's search is answered meanwhile."""

from __future__ import annotations

import errno
import http.server
import json
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
from colours import ColourModel, paint
from hostile import png_bytes
from serving import Server, answer, request, serving

from clipkit.catalog import Catalog
from clipkit.embed import index_folders

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="clients choose their address")

EVIL = "127.0.0.66"
GIGABYTE = 10**9
SECRET = "a token of the tests"


def library(folder: Path) -> Path:
    """A folder with an index of three pictures."""
    for number in range(3):
        paint(folder / "photos" / f"{number}.png", "red", number=number)
    with Catalog.open(folder / "index", write=True) as catalog:
        index_folders(catalog, [folder / "photos"], encoder=ColourModel())
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on loopback, without a token."""
    names = ("server.HEAD_SECONDS", "server.STALLED_SECONDS", "guard.BODY_SECONDS")
    limits = {f"app.web.{name}": 1.0 for name in names}
    with serving(library(tmp_path_factory.mktemp("attacked")), limits=limits) as running:
        assert running.searches()
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on all addresses, which asks for a token."""
    folder = library(tmp_path_factory.mktemp("guarded"))
    with serving(folder, host="0.0.0.0", secret=SECRET) as running:
        yield running


# ---- files and addresses in Gradio's events (trap 31)


class _Recorder(http.server.BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def recorder() -> Iterator[str]:
    """The address of a server that notes who asks it."""
    with http.server.HTTPServer(("127.0.0.1", 0), _Recorder) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/x"
        listening.shutdown()


def bodies(target: str) -> Iterator[dict[str, Any]]:
    """Events that name a file in each way that Gradio knows, at each place."""
    file = {"path": target, "meta": {"_type": "gradio.FileData"}}
    bare = {"path": target}
    nested: Any = file
    for _ in range(50):
        nested = [{"a": nested}]
    yield {"data": [file]}
    yield {"data": [nested]}
    yield {"data": [{"value": file}]}
    yield {"data": file}
    yield {"data": [json.dumps(file)]}
    for value in (file, bare, nested, json.dumps(file), json.dumps(json.dumps([file]))):
        yield {"data": [], "event_data": value}
        yield {"data": [], "event_data": {"words": value}}
    yield {"data": [], "event_data": {"url": target, "meta": {"_type": "gradio.FileData"}}}
    yield {"data": [], "batched": True, "event_data": [file]}
    yield {"data": [], "oauth_token": file}
    yield {"data": None}
    yield {}


def test_no_event_reads_a_file_or_an_address(server: Server, tmp_path: Path, recorder: str) -> None:
    """One such request read any file or address, or hung the server: review item 1. A pipe shows who
    opens it: opening it to write without waiting fails as long as nobody reads it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    targets = ["/dev/zero", "/etc/shadow", str(pipe), str(secret), recorder, f"file://{secret}"]
    for index in range(12):  # there are fewer events than that; test_page_cost.py looks at each
        target = targets[index % len(targets)]
        for body in bodies(target):
            status, said = server.post(
                "/gradio_api/queue/join",
                {"fn_index": index, "session_hash": "abc", "trigger_id": 5, **body},
                EVIL,
            )
            assert status == 400, (body, said)
    for target in targets:
        for body in bodies(target):
            event = {"fn_index": 0, "session_hash": "abc", **body}
            assert server.post("/gradio_api/queue/join", event, EVIL)[0] == 400
            for encoding in ("utf-16", "utf-32"):  # json.loads reads these as well
                sent = json.dumps(event).encode(encoding)
                assert server.post("/gradio_api/queue/join", sent, EVIL)[0] == 400
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    assert not _Recorder.asked
    files = [path.name for path in server.scratch.rglob("*") if not path.is_dir()]
    assert files == ["lock"]
    assert server.searches()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"[" * 50_000,
        b'{"data":[],"fn_index":0}',
        b'{"data":[],"fn_index":0,"session_hash":"../x"}',
        b'{"data":[],"fn_index":0,"session_hash":"' + b"a" * 65 + b'"}',
        b"\xff\xfe\xff",
    ],
)
def test_an_event_that_is_none_is_refused(server: Server, body: bytes) -> None:
    assert server.post("/gradio_api/queue/join", body, EVIL)[0] == 400


@pytest.mark.parametrize(
    "path",
    [
        "config",
        "manifest.json",
        "svelte/svelte.js",
        "gradio_api/reset",
        "gradio_api/cancel",
        "gradio_api/startup-events",
        "gradio_api/heartbeat/abc",
        "gradio_api/upload",
        "gradio_api/run/predict",
        "gradio_api/call/predict",
        "gradio_api/component_server",
        "gradio_api/file=/etc/passwd",
        "gradio_api/proxy=http://127.0.0.1/",
        "gradio_api/deep_link?session_hash=abc",
        "monitoring",
        "queue/join",
    ],
)
def test_gradios_other_routes_are_closed(server: Server, path: str) -> None:
    assert server.get(f"/{path}", EVIL)[0] == 404
    assert server.post(f"/{path}", b"{}", EVIL)[0] == 404


# ---- paths


@pytest.mark.parametrize(
    "path",
    [
        "/thumbnails/../../../../etc/passwd",
        "/thumbnails/..%2f..%2f..%2fetc%2fpasswd",
        "/thumbnails/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/thumbnails/..%252f..%252fetc%252fpasswd",
        "/thumbnails/..%5c..%5cetc%5cpasswd",
        "/thumbnails/%c0%ae%c0%ae%c0%afetc%c0%afpasswd",
        "/thumbnails/%00",
        "/thumbnails/" + "0" * 32 + "%00.png",
        "/ui/..%2f..%2fguard.py",
        "/ui/%2fetc%2fpasswd",
        "/reports/..%2f..%2fetc",
        "/reports/run@..",
        "/assets/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/assets//etc/passwd",
        "/static/js/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/sortings/..%2f..%2fx.csv",
        "//etc/passwd",
        "/.%2e/.%2e/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1/etc/passwd",
        "*",
        "/" + "a" * 2_000,
        "/api/v1/search?" + "a" * 5_000,
    ],
)
def test_no_path_leads_out(server: Server, path: str) -> None:
    status, said = server.get(path, EVIL)
    assert status in (400, 403, 404, 414), said
    assert b"root:" not in said and b"Traceback" not in said and b"import " not in said


# ---- bodies


def flood(server: Server, head: bytes, piece: bytes) -> tuple[int, int]:
    """Send a head and pieces until the server refuses, up to a gigabyte; return status and bytes."""
    sent = 0
    with server.connect(EVIL) as connection:
        connection.sendall(head)
        try:
            while sent < GIGABYTE:
                connection.sendall(piece)
                sent += len(piece)
        except OSError:
            pass
        return answer(connection)[0], sent


@pytest.mark.parametrize(
    "path", ["/api/v1/search", "/gradio_api/queue/join", "/api/v1/marks", "/queries"]
)
def test_a_gigabyte_is_refused_by_its_length(server: Server, path: str) -> None:
    before = server.peak_megabytes()
    head = request("POST", path, content_length=str(GIGABYTE))
    status, sent = flood(server, head, bytes(65_536))
    assert status == 413 and sent < 20_000_000  # what the system's buffers hold
    assert server.peak_megabytes() - before < 100
    assert server.searches()


@pytest.mark.parametrize(
    ("path", "most"),
    [
        ("/api/v1/search", 90),  # pictures in base64
        ("/api/v1/similar", 4),
        ("/folders/forget", 1),
        ("/gradio_api/queue/join", 0.3),
        ("/queries", 64),
    ],
)
def test_a_gigabyte_in_chunks_is_refused_at_the_limit(
    server: Server, path: str, most: float
) -> None:
    """Nobody says how much will come: counted on arrival."""
    before = server.peak_megabytes()
    head = request("POST", path, transfer_encoding="chunked", content_length="")
    head = head.replace(b"content-length: \r\n", b"")
    piece = b"10000\r\n" + bytes(65_536) + b"\r\n"
    status, sent = flood(server, head, piece)
    assert status == 413 and sent < (most + 20) * 1_000_000
    assert server.peak_megabytes() - before < 2 * most + 100
    assert server.searches()


def test_a_body_longer_than_it_says_is_no_second_request(server: Server) -> None:
    """The rest is read as the next request, and refused as one."""
    smuggled = b"GET /corrections.jsonl HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n"
    raw = request(
        "POST", "/api/v1/search", b"{}" + smuggled, content_length="2", connection="keep-alive"
    )
    status, said = server.ask(raw, EVIL)
    assert status == 200
    assert said.count(b"HTTP/1.1 ") == 2 and b"HTTP/1.1 400" in said


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 2\r\ntransfer-encoding: chunked\r\n",
        b"content-length: 2\r\ncontent-length: 3\r\n",
        b"content-length: 2, 3\r\n",
        b"content-length: +2\r\n",
        b"content-length: -1\r\n",
        b"transfer-encoding: identity, chunked\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"transfer-encoding : chunked\r\n",
        b"host: evil.example\r\n",
        b"x: a\r\n b\r\n\x00: c\r\n",
        b"x: " + b"a" * 20_000 + b"\r\n",
        b"x: a\r\n" * 3_000,
    ],
)
def test_what_servers_read_differently_is_refused(server: Server, head: bytes) -> None:
    raw = b"POST /api/v1/search HTTP/1.1\r\nhost: 127.0.0.1\r\n" + head + b"\r\n0\r\n\r\n"
    status, said = server.ask(raw, EVIL)
    assert status in (400, 431, 501), said
    assert said.count(b"HTTP/1.1 ") == 1


def test_a_get_with_a_body_is_refused(server: Server) -> None:
    assert server.ask(request("GET", "/health", b"x" * 10), EVIL)[0] == 400


# ---- pictures


def test_a_picture_that_unfolds_is_refused_or_bounded(server: Server) -> None:
    """600 megapixels in 75 kB: refused by its header."""
    before = server.peak_megabytes()
    bomb = png_bytes((30_000, 20_000), 1, 0, zlib.compress(bytes(20_000 * 3_751), 9))
    with ThreadPoolExecutor(8) as clients:
        done = list(clients.map(lambda _: server.post("/queries", bomb, EVIL), range(8)))
    assert {status for status, _ in done} <= {422, 503} and 422 in {status for status, _ in done}
    assert server.peak_megabytes() - before < 100
    assert server.searches()


def test_large_pictures_are_decoded_one_at_a_time(server: Server) -> None:
    """48 megapixels with transparency, 200 kB: 192 MB for each of two copies on the way to RGB, beside
    the process's own 0.5 GB; eight at a time would need 4 GB."""
    picture = png_bytes((8_000, 6_000), 8, 6, zlib.compress(bytes(6_000 * (1 + 4 * 8_000)), 9))
    too_large = png_bytes((10_000, 10_000), 8, 6, b"")
    with ThreadPoolExecutor(12) as clients:
        sent = [picture + bytes([n]) for n in range(8)] + [too_large] * 4  # not known from before
        done = list(clients.map(lambda data: server.post("/queries", data, EVIL)[0], sent))
        assert server.searches()
    assert set(done[:8]) <= {200, 503} and set(done[8:]) <= {422, 503} and 200 in done
    assert server.peak_megabytes() < 1_300


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/v1/search", {"query": "red", "limit": 10**9}),
        ("/api/v1/search", {"query": "red", "limit": 10**400}),
        ("/api/v1/search", {"query": "red", "limit": -1}),
        ("/api/v1/search", {"query": "red", "cursor": "9" * 5_000}),
        ("/api/v1/search", {"query": "red " * 100_000}),
        ("/api/v1/search", {"query": "", "images": ["AAAA"] * 100_000}),
        ("/api/v1/similar", {"image_id": "0" * 32, "limit": 10**9}),
        ("/api/v1/embed/text", {"texts": ["x"] * 100_000}),
        ("/api/v1/marks?limit=1000000000", None),
        (f"/api/v1/pictures/{'0' * 32}/thumbnail?size=1000000000", None),
    ],
)
def test_huge_numbers_are_refused(server: Server, path: str, body: object) -> None:
    started, before = time.monotonic(), server.peak_megabytes()
    status, said = server.get(path, EVIL) if body is None else server.post(path, body, EVIL)
    assert status in (400, 404, 413, 422), said[:300]
    assert b'{"error":' in said and b"Traceback" not in said
    assert time.monotonic() - started < 20 and server.peak_megabytes() - before < 100


# ---- slow clients and many of them


def test_slow_heads_are_cut_off_and_others_served(server: Server) -> None:
    """Slowloris: each connection sends a byte of its head now and then."""
    connections = [server.connect(EVIL) for _ in range(60)]
    for connection in connections:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nx: ")
    assert server.searches()
    ended = 0
    for connection in connections:
        connection.settimeout(0.2)
        for _ in range(100):
            try:
                connection.sendall(b"a")
                if connection.recv(10) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            raise AssertionError("a connection was kept for 20 s")
        ended += 1
        connection.close()
    assert ended == 60
    assert server.searches()


def test_slow_bodies_are_cut_off(server: Server) -> None:
    with server.connect(EVIL) as connection:
        connection.sendall(request("POST", "/queries", b"x", content_length="1000000"))
        assert server.searches()
        status, said = answer(connection)
    assert status == 408 and b"did not arrive" in said


def test_who_reads_nothing_is_cut_off(server: Server) -> None:
    """300 answers of 26 kB, 8 MB in all, of which the system's buffers hold some 4 MB. The client must
    not read, which would be no stall, so the kernel is asked whether the server has closed."""
    with server.connect(EVIL) as connection:
        connection.sendall(request("GET", "/ui/clipkit.js", connection="keep-alive") * 300)
        assert server.searches()
        ends = f":{server.port:04X}", f":{connection.getsockname()[1]:04X}"
        started = time.monotonic()
        while any(
            (fields[1][-5:], fields[2][-5:]) == ends and fields[3] == "01"  # established
            for fields in map(str.split, Path("/proc/net/tcp").read_text().splitlines())
        ):
            assert time.monotonic() - started < 60
            time.sleep(0.05)
        assert len(answer(connection)[1]) < 8_000_000
    assert server.searches()


def test_idle_connections_are_few_and_end(server: Server) -> None:
    connections = [server.connect(EVIL) for _ in range(200)]
    assert server.searches()
    for connection in connections:
        assert answer(connection) == (0, b"")
        connection.close()
    assert server.searches(EVIL), "its own connections count no more"


def test_many_events_of_one_client_leave_room_for_others(server: Server) -> None:
    """Its events are refused (429) after 40 at once; another client's are answered."""
    event = {"data": [], "event_data": None, "fn_index": 0, "trigger_id": 0}

    def join(number: int) -> int:
        return server.post(
            "/gradio_api/queue/join", {**event, "session_hash": f"flood{number % 150}"}, EVIL
        )[0]

    before = server.peak_megabytes()
    with ThreadPoolExecutor(8) as clients:
        statuses = list(clients.map(join, range(300)))
    assert set(statuses) == {200, 429} and statuses.count(429) > 100
    session = {**event, "session_hash": "honest"}
    assert server.post("/gradio_api/queue/join", session, "127.0.0.9")[0] == 200
    status, said = server.get("/gradio_api/queue/data?session_hash=honest", "127.0.0.9")
    assert status == 200 and b"process_completed" in said
    assert server.peak_megabytes() - before < 100


def test_many_classifications_leave_room_for_a_search(server: Server) -> None:
    """64 clients ask for one each, all at once: every one is answered or told to come back."""
    found = re.search(rb'"id":(\d+),"targets":\[\[\d+,"evaluate"\]\]', server.get("/")[1])
    assert found is not None
    evaluate = int(found[1])

    def classify(number: int) -> int:
        event = {
            "data": [],
            "event_data": {"words": f"red, blue, word {number}"},
            "fn_index": evaluate,
            "session_hash": f"sort{number}",
        }
        return server.post("/gradio_api/queue/join", event, f"127.0.1.{number + 1}")[0]

    with ThreadPoolExecutor(64) as clients:
        joined = [clients.submit(classify, number) for number in range(64)]
        for _ in range(5):
            started = time.monotonic()
            assert server.searches()
            assert time.monotonic() - started < 30
    assert {one.result() for one in joined} <= {200, 503} and joined[0].result() == 200
    status, said = server.get("/gradio_api/queue/data?session_hash=sort0", "127.0.1.1")
    assert status == 200 and b"process_completed" in said


def test_event_streams_of_one_client_are_few(server: Server) -> None:
    """A stream of a session without an event ends at once; those that wait are 32 of one client."""
    streams = []
    for number in range(40):
        event = {"data": [], "event_data": None, "fn_index": 0, "session_hash": f"stream{number}"}
        time.sleep(0.1)  # the rate of events
        server.post("/gradio_api/queue/join", event, "127.0.0.77")
        connection = server.connect("127.0.0.77")
        connection.sendall(request("GET", f"/gradio_api/queue/data?session_hash=stream{number}"))
        streams.append(connection)
    statuses = [answer(connection)[0] for connection in streams]
    for connection in streams:
        connection.close()
    assert set(statuses) <= {200, 503}
    assert server.searches()


# ---- who asks


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "[::1", "", "a@b"],
)
def test_dns_rebinding_is_refused(server: Server, host: str) -> None:
    assert server.get("/", EVIL, host=host)[0] == 400
    assert server.post("/api/v1/search", {"query": "red"}, EVIL, host=host)[0] == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
def test_other_sites_pages_may_not_post(server: Server, headers: dict[str, str]) -> None:
    for path in (
        "/queries",
        "/api/v1/search",
        "/api/v1/marks",
        "/folders/forget",
        "/gradio_api/queue/join",
    ):
        assert server.post(path, {}, EVIL, **headers)[0] == 403


def test_forwarding_headers_of_strangers_change_nothing(server: Server) -> None:
    """Neither the page's address nor the client that is counted."""
    forged = {
        "x_forwarded_host": "evil.example",
        "x_forwarded_proto": "https",
        "x_forwarded_for": "1.2.3.4",
        "x_gradio_server": "http://evil.example",
        "forwarded": "host=evil.example",
    }
    status, said = server.get("/", EVIL, **forged)
    assert status == 200 and b"evil.example" not in said and b"https://127" not in said


@pytest.mark.parametrize(
    "path", ["/", "/health", "/api/v1/search", "/metrics", "/ui/clipkit.js", "/nothing"]
)
def test_without_the_token_nothing_is_answered(guarded: Server, path: str) -> None:
    for headers in (
        {},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {SECRET}"},
        {"cookie": "clipkit=1"},
    ):
        status, said = guarded.get(path, "127.0.0.5", **headers)
        assert status == 401 and b"colours" not in said and b"clipkit.attach" not in said
    assert guarded.get(path, "127.0.0.5", authorization=f"Bearer {SECRET}")[0] != 401


def test_guessing_is_slowed_down(guarded: Server) -> None:
    """Ten wrong tokens at once, then 429 also for a right one; others are not affected."""
    statuses = [
        guarded.get("/health", EVIL, authorization=f"Bearer {number}")[0] for number in range(30)
    ]
    assert statuses[:10] == [401] * 10 and set(statuses[10:]) == {429}
    status, said = guarded.get("/health", EVIL, x_clipkit_token=SECRET)
    assert status == 429 and b"retry-after" in said.lower()
    form = f"token={SECRET.replace(' ', '+')}".encode()
    assert guarded.post("/login", form, EVIL)[0] == 429
    assert guarded.get("/health", "127.0.0.9", x_clipkit_token=SECRET)[0] == 200


def test_a_cookie_that_was_changed_is_none(guarded: Server) -> None:
    form = f"token={SECRET.replace(' ', '+')}".encode()
    status, said = guarded.post("/login", form, "127.0.0.8")
    assert status == 303
    line = next(line for line in said.split(b"\r\n") if line.lower().startswith(b"set-cookie"))
    assert b"HttpOnly" in line and b"SameSite=strict" in line and SECRET.encode() not in said
    cookie = line.split(b": ")[1].split(b";")[0].decode()
    name, _, value = cookie.partition("=")
    assert guarded.get("/health", "127.0.0.8", cookie=cookie)[0] == 200
    until, _, signature = value.partition(".")
    changed = [
        f"{int(until) + 1}.{signature}",
        f"{until}.{signature[:-1]}{'0' if signature[-1] != '0' else '1'}",
        f"{until}.",
        f".{signature}",
        signature,
        "",
        f"{until}.{signature}.{signature}",
        "a" * 5_000,
    ]
    for wrong in changed:
        assert guarded.get("/health", "127.0.0.8", cookie=f"{name}={wrong}")[0] == 401, wrong
    assert guarded.get("/health", "127.0.0.8", cookie=f"other{name}={value}")[0] == 401
    assert guarded.get("/health", "127.0.0.8", cookie=cookie)[0] == 200
