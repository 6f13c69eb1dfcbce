"""Serve many clients at once while an index run goes on: errors, latency, requests per second, memory.

    python tests/bench/bench_serving.py /tmp/million/base --against /tmp/old

For each checkout a copy of the index gets some real photos (their thumbnails are asked for), then a
real `clipkit app` answers CLIENTS keep-alive clients on addresses of their own for --seconds, each
asking again as soon as it is answered: 60 % searches for different words, 30 % thumbnails, 10 %
"similar", while a real `clipkit index` adds small pictures to the same index. The clients are threads
of this process and share the machine with the server, so its own limit is above what is printed.
Searches go to /api/v1, or where that is absent to the page's /results.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from bench_million import CACHE, DATA, ROOT, lines, queries, table

CLIENTS = 32
PHOTOS, SMALL = 200, 15_000
Rows = dict[str, list[float]]


@dataclass
class Answers:
    """What the clients got. Threads append to it."""

    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    statuses: Counter[str] = field(
        default_factory=Counter
    )  # kind and status of each failed request
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, status: int, seconds: float) -> None:
        with self.lock:
            if status == 200:
                self.milliseconds.setdefault(kind, []).append(1000 * seconds)
            else:
                self.statuses[f"{kind} {status}"] += 1


def command(checkout: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start a clipkit command of a checkout, in a process group that a signal can end."""
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        cwd=checkout,  # `-m` looks in the current folder first
    )


class Client(threading.Thread):
    """Asks until `stop` is set."""

    def __init__(self, number: int, server: Server, answers: Answers, words: list[str]) -> None:
        super().__init__()
        self.number, self.server, self.answers, self.words = number, server, answers, words
        self.random = random.Random(number)
        self.stop = threading.Event()

    def run(self) -> None:
        source = (f"127.0.1.{self.number + 1}", 0) if sys.platform == "linux" else None
        connection = http.client.HTTPConnection(
            *self.server.address, timeout=60, source_address=source
        )
        while not self.stop.is_set():
            kind, method, path, body = self._next()
            began = time.perf_counter()
            try:
                connection.request(method, path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                status = answer.status
            except OSError:
                connection.close()
                status = 0
            except http.client.HTTPException:
                connection.close()
                status = -1
            self.answers.add(kind, status, time.perf_counter() - began)
        connection.close()

    def _next(self) -> tuple[str, str, str, str | None]:
        picture = self.random.choice(self.server.pictures)
        drawn = self.random.random()
        if drawn < 0.3:
            return "thumbnail", "GET", f"/thumbnails/{picture}", None
        if drawn < 0.4:
            return "similar", "POST", *self.server.similar(picture)
        return "search", "POST", *self.server.search(self.random.choice(self.words))


class Server:
    """A running `clipkit app`."""

    def __init__(self, checkout: Path, index: Path) -> None:
        self.process = command(checkout, "app", "--index", index, "--port", "0")
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r"http://([\d.]+):(\d+)", line)
        if match is None:
            raise RuntimeError(f"the server said {line!r}")
        self.address = (match[1], int(match[2]))
        self.pictures: list[str] = []
        status, _ = self.ask("POST", "/api/v1/search", json.dumps({"query": "a dog"}))
        self.has_api = status == 200

    def ask(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=120)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, data

    def search(self, words: str) -> tuple[str, str]:
        if self.has_api:
            return "/api/v1/search", json.dumps({"query": words, "limit": 24})
        return "/results", json.dumps({"words": words})

    def similar(self, image_id: str) -> tuple[str, str]:
        if self.has_api:
            return "/api/v1/similar", json.dumps({"image_id": image_id, "limit": 24})
        return "/results", json.dumps({"similar": image_id})

    def pictures_now(self) -> int:
        return int(json.loads(self.ask("GET", "/health")[1])["pictures"])

    def memory_mb(self, name: str) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(rf"{name}:\s+(\d+) kB", status)
        return int(match[1]) / 1024 if match else 0.0

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


def photos(folder: Path) -> Path:
    """Copy PHOTOS real photos into a folder of their own."""
    folder.mkdir(parents=True)
    for path in sorted((DATA / "flickr8k" / "images").iterdir())[:PHOTOS]:
        shutil.copy(path, folder)
    return folder


def small_pictures(folder: Path) -> Path:
    """Unpack SMALL pictures of 32x32, more than a run of a minute or two embeds."""
    with zipfile.ZipFile(DATA / "cifar10_train.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        archive.extractall(folder, names[:SMALL])
    return folder


def measure(checkout: Path, base: Path, scratch: Path, args: argparse.Namespace) -> Rows:
    index = scratch / "index"
    shutil.rmtree(index, ignore_errors=True)
    shutil.copytree(base, index)
    run(checkout, "index", scratch / "photos", "--index", index, "--quiet")
    server, indexing = Server(checkout, index), None
    try:
        names = {path.name for path in (scratch / "photos").iterdir()}
        server.pictures = [image_id_of(scratch / "photos" / name) for name in sorted(names)]
        for ask in (server.search("a dog"), server.similar(server.pictures[0])):
            if server.ask("POST", *ask)[0] != 200:
                raise RuntimeError(f"{ask} is not answered")
        if not args.no_indexing:
            indexing = command(checkout, "index", scratch / "small", "--index", index, "--quiet")
            before = server.pictures_now()
            while server.pictures_now() == before:  # until its first commit
                if indexing.poll() is not None:
                    raise RuntimeError("the index run ended at once")
                time.sleep(0.5)
        time.sleep(args.warm_up)
        before, answers, words = server.pictures_now(), Answers(), list(queries())
        clients = [Client(number, server, answers, words) for number in range(CLIENTS)]
        began = time.monotonic()
        for client in clients:
            client.start()
        time.sleep(args.seconds)
        for client in clients:
            client.stop.set()
        for client in clients:
            client.join()
        seconds = time.monotonic() - began
        if indexing is not None and indexing.poll() is not None:
            raise RuntimeError("the index run ended before the clients did")
        added = server.pictures_now() - before
        count = sum(map(len, answers.milliseconds.values()))
        rows: Rows = {"answered [1/s]": [count / seconds]}
        rows["not answered with 200"] = [float(answers.statuses.total())]
        for what, times in sorted(answers.statuses.items()):
            rows[f"answered otherwise: {what}"] = [float(times)]
        rows["pictures added meanwhile [1/s]"] = [added / seconds]
        for kind, values in sorted(answers.milliseconds.items()):
            rows[f"{kind}, p50 / p95 (requests) [ms]"] = values
            rows[f"{kind}, p99 [ms]"] = [sorted(values)[int(0.99 * len(values))]]
        rows["server's memory [MB]"] = [server.memory_mb("VmRSS")]
        rows["server's memory, not of files [MB]"] = [server.memory_mb("RssAnon")]
        rows["server's peak [MB]"] = [server.memory_mb("VmHWM")]
        return rows
    finally:
        for process in (indexing, server.process):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(120)
        shutil.rmtree(index, ignore_errors=True)


def run(checkout: Path, *arguments: str | Path) -> None:
    process = command(checkout, *arguments)
    assert process.stdout is not None
    process.stdout.read()
    if process.wait():
        raise RuntimeError(f"clipkit {arguments} failed")


def image_id_of(path: Path) -> str:
    from clipkit.images import image_id

    return image_id(path.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="an index, of which copies are served")
    parser.add_argument("--against", type=Path, help="an older checkout, measured too")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warm-up", type=float, default=30.0, help="seconds; it loads the model")
    parser.add_argument("--no-indexing", action="store_true", help="without an index run")
    parser.add_argument("--scratch", type=Path, default=CACHE / "serving")
    args = parser.parse_args()
    shutil.rmtree(args.scratch, ignore_errors=True)
    photos(args.scratch / "photos")
    if not args.no_indexing:
        small_pictures(args.scratch / "small")
    checkouts = {"here": ROOT} | ({"before": args.against} if args.against else {})
    results = {}
    for name, checkout in checkouts.items():
        results[name] = {"serving": measure(checkout, args.folder, args.scratch, args)}
        print(f"-- {name}", *lines(results[name]["serving"]), sep="\n", flush=True)
    print(table(results))
    shutil.rmtree(args.scratch)


if __name__ == "__main__":
    main()
