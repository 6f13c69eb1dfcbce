"""What the page costs a browser: first paint, requests and bytes, a search, and thousands of cards.

    python tests/bench/bench_page.py [--pictures 10300] [--runs 3] [--project OTHER_CHECKOUT]

A headless Chromium opens the page of a synthetic library with an empty cache. Bytes are those that
went over the wire, Gradio's own (assets, theme, config, queue) beside clipkit's. A search is the time
from Enter to the first cards. Then it scrolls to the 10,000th card: frames are 60 of scrolling there.
The renderer's memory is resident, with the browser's program (some 140 MB). With --project the same is
measured of another checkout, such as the commit before a change.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TESTS = Path(__file__).parents[1]
SERVER = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from colours import ColourModel
from app.web.page import make_app
from app.web.workspace import Workspace
import uvicorn
app = make_app(Workspace(Path(sys.argv[1]), ColourModel()))
uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
"""
GRADIO = re.compile(r"/(assets|static|theme\.css|config|gradio_api|svelte|manifest)")
SECONDS = 120  # for scrolling
HOLD_END = """seconds => new Promise(done => {
    const cards = () => document.querySelectorAll('#results .hit').length, start = performance.now();
    const press = () => {
        scrollTo({top: document.documentElement.scrollHeight, behavior: 'instant'});
        if (cards() >= 10000 || performance.now() - start > 1000 * seconds) done(cards());
        else setTimeout(press, 33);
    };
    press(); })"""
FRAMES = """() => new Promise(done => {
    const times = []; let last = performance.now(), n = 0;
    const step = now => { times.push(now - last); last = now; scrollBy(0, -300);
                          n++ < 60 ? requestAnimationFrame(step) : done(times.slice(1)); };
    requestAnimationFrame(step); })"""
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=10_300)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--project", type=Path, default=TESTS.parent)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "PYTHONPATH": f"{options.project}:{TESTS}"}
        make = "import sys; from pathlib import Path; from many_pictures import fill; "
        make += "fill(Path(sys.argv[1]), int(sys.argv[2]))"
        arguments = [sys.executable, "-c", make, scratch, str(options.pictures)]
        subprocess.run(arguments, env=environment, cwd=options.project, check=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, scratch, str(port), str(TESTS)],
            env=environment,
            cwd=options.project,  # where `python -c` looks first
        )
        try:
            measure(f"http://127.0.0.1:{port}", options.runs, far=options.pictures > 10_000)
        finally:
            server.terminate()
            server.wait()


def measure(address: str, runs: int, *, far: bool) -> None:
    sys.path.insert(0, str(TESTS))
    import httpx
    from chromium import ARGUMENTS, CHROMIUM, playwright

    for _ in range(600):
        try:
            httpx.get(f"{address}/health", timeout=10)
            break
        except httpx.HTTPError:
            time.sleep(0.1)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        opened = [open_page(browser, address) for _ in range(runs)]
        for name in opened[0]:
            print(f"{name:<34}{statistics.median(one[name] for one in opened):>10,.0f}")
        if far:
            scroll_far(browser, address)
        browser.close()


def open_page(browser: Any, address: str) -> dict[str, float]:
    """Open the page with an empty cache and search once."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    page.set_default_timeout(120_000)
    sizes: list[tuple[str, float]] = []
    cdp = context.new_cdp_session(page)
    cdp.send("Network.enable")
    urls: dict[str, str] = {}
    cdp.on(
        "Network.requestWillBeSent", lambda e: urls.update({e["requestId"]: e["request"]["url"]})
    )
    cdp.on(
        "Network.loadingFinished",
        lambda e: sizes.append((urls.get(e["requestId"], ""), e["encodedDataLength"])),
    )
    started = time.perf_counter()
    page.goto(address)
    page.wait_for_selector("#results [data-view]")
    usable = time.perf_counter() - started
    page.wait_for_load_state("load")
    own = [(urlsplit(url).path, size) for url, size in sizes if url.startswith("http")]
    gradio = [size for path, size in own if GRADIO.match(path) or path == "/"]
    before = len(sizes)
    page.fill("input[name=words]", "red")
    started = time.perf_counter()
    page.press("input[name=words]", "Enter")
    page.wait_for_selector("#results .hit .score")
    searched = time.perf_counter() - started
    result = {
        "first paint, ms": page.evaluate(PAINT) or 0,
        "start page shown, ms": usable * 1000,
        "requests": len(own),
        "requests of Gradio": len(gradio),
        "kB": sum(size for _, size in own) / 1000,
        "kB of Gradio": sum(gradio) / 1000,
        "search: Enter to cards, ms": searched * 1000,
        "search: requests": len(sizes) - before,
    }
    context.close()
    return result


def scroll_far(browser: Any, address: str) -> None:
    """Scroll to the 10,000th card as with the End key held down, as far as that goes in SECONDS, and
    measure frames there, the renderer's memory, and the way back to it."""
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.set_default_timeout(300_000)
    page.goto(f"{address}/#words=red")
    page.wait_for_selector("#results .hit")
    devtools = page.context.new_cdp_session(page)
    cpu = renderer(browser)[1]
    started = time.perf_counter()
    reached = page.evaluate(HOLD_END, SECONDS)
    show(f"scroll to card {reached:,}, s", time.perf_counter() - started)
    show("... CPU time of the renderer, s", renderer(browser)[1] - cpu)
    page.wait_for_timeout(1000)
    devtools.send("HeapProfiler.collectGarbage")
    devtools.send("Performance.enable")
    metrics = {m["name"]: m["value"] for m in devtools.send("Performance.getMetrics")["metrics"]}
    show("JavaScript heap there, MB", metrics["JSHeapUsedSize"] / 1e6)
    show("nodes there, thousands", metrics["Nodes"] / 1e3)
    show("boxes there, thousands", metrics["LayoutObjects"] / 1e3)
    resident, anonymous = renderer(browser)[0]
    show("resident memory of the renderer, MB", resident)
    show("... of it anonymous, MB", anonymous)
    cpu = renderer(browser)[1]
    times = page.evaluate(FRAMES)
    show("frames there, median ms", statistics.median(times))
    show("slowest of 60 frames, ms", max(times))
    show("CPU time a frame, ms", (renderer(browser)[1] - cpu) / 60 * 1000)
    page.wait_for_timeout(500)
    started = time.perf_counter()
    page.reload()
    page.wait_for_function(
        "count => document.querySelectorAll('#results .hit').length >= count",
        arg=min(reached, 2400),
    )
    show("reload there, s", time.perf_counter() - started)


def show(name: str, value: float) -> None:
    print(f"{name:<38}{value:>10,.1f}")


def renderer(browser: Any) -> tuple[tuple[float, float], float]:
    """Return the memory in MB, resident and of it anonymous, and the CPU seconds of the renderer that
    has most memory."""
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    session.detach()
    best = ((0.0, 0.0), 0.0)
    for process in processes:
        if process["type"] == "renderer":
            status = Path(f"/proc/{process['id']}/status").read_text()
            sizes = re.findall(r"(?:VmRSS|RssAnon):\s+(\d+)", status)
            best = max(best, ((int(sizes[0]) / 1000, int(sizes[1]) / 1000), process["cpuTime"]))
    return best


if __name__ == "__main__":
    main()
