"""Compare exported towers with torch's, and time /api/v1/similarity and a cold query served from each.

    python tests/bench/bench_export.py --data DIR [--limit 200] [--models builtin ViT-B-32]

DIR holds flickr8k/dev.jsonl (default: $CLIPKIT_DATA). "ViT-B-32" is OpenCLIP's architecture with random
weights: its cosines and speed count, its recall is chance. Rows: torch in float32 and, where the
hardware computes in it, bfloat16; ONNX Runtime in float32 and int8; OpenVINO, if it is installed, in
float32 and bfloat16. All are timed in turn in one process. Then a `clipkit app` for torch and for
each export answers --requests texts and photos, in turn: median, p95, memory. Last, a fresh process
encodes one text. Exports stay in --work and are used again.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from app.cli.export import table
from clipkit import checkpoint, images, towers
from clipkit.lazy_encoder import Towers, load
from clipkit.towers.exporting import SIDES, export_onnx
from data_prep import gallery
from eval.data import Captioned, open_captioned
from eval.runtimes import compare_runtimes

COLD_RUNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("CLIPKIT_DATA"))
    parser.add_argument("--limit", type=int, help="pictures to compare on; default: all")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--models", nargs="+", default=["builtin", "ViT-B-32"])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "clipkit-export")
    args = parser.parse_args()
    if args.data is None:
        parser.error("name the folder with flickr8k/ by --data or CLIPKIT_DATA")
    data = open_captioned(str(args.data / "flickr8k" / "dev.jsonl"), limit=args.limit)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {len(data.pictures)} pictures, "
        f"{len(data.captions)} texts"
    )
    for name in args.models:
        spec = "builtin" if name == "builtin" else str(random_model(name, args.work / name))
        exports = {
            kind: exported(spec, args.work / f"{name}-{kind}") for kind in ("float32", "int8")
        }
        print(
            f"\n## {name}\n",
            *(f"{kind} {folder_size(path) / 1e6:.0f} MB" for kind, path in exports.items()),
        )
        rows = compare_runtimes(sides(spec, exports), data, runs=args.runs, on_progress=progress)
        print(*table(rows), sep="\n", flush=True)
        specs = {"torch": spec, **{f"onnx {kind}": str(path) for kind, path in exports.items()}}
        print(*similarity(specs, data, args.requests), sep="\n", flush=True)
        print(*cold(spec, exports["float32"]), sep="\n", flush=True)


def progress(what: str, done: int, total: int) -> None:
    print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


def random_model(architecture: str, folder: Path) -> Path:
    """Write an OpenCLIP architecture with random weights, seed 0, as a checkpoint folder."""
    if (folder / checkpoint.CONFIG_FILE).is_file():
        return folder
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    state = open_clip.create_model(architecture).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / checkpoint.WEIGHTS_FILE)
    config = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": {}}
    (folder / checkpoint.CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    return folder


def exported(spec: str, folder: Path) -> Path:
    """Export a model into `folder`, or return what was exported there before."""
    if not (folder / checkpoint.EXPORT_FILE).is_file():
        encoder = towers.load(spec, device="cpu", precision="float32")
        files = sorted(gallery.folder().rglob("*.png"))
        sample = [
            images.decode(file.read_bytes(), target=encoder.preferred_side).rgb
            for file in files[:: max(1, len(files) // 64)][:64]
        ]
        int8 = SIDES if folder.name.endswith("int8") else ()
        export_onnx(encoder, folder, int8=int8, pictures=sample)
    return folder


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.onnx*"))


def sides(spec: str, exports: dict[str, Path]) -> dict[str, Towers]:
    """Return what is compared, by name; torch in float32, the reference, first."""
    found: dict[str, Towers] = {"torch float32": load(spec, device="cpu", precision="float32")}
    usual = towers.choose_precision(towers.choose_device("cpu"))
    if usual != "float32":
        found[f"torch {usual}"] = load(spec, device="cpu", precision=usual)
    for kind, folder in exports.items():
        found[f"onnx {kind}"] = load(str(folder))
    if find_spec("openvino"):
        found["openvino float32"] = load(str(exports["float32"]), runtime="openvino")
        if usual == "bfloat16":
            found["openvino bfloat16"] = load(
                str(exports["float32"]), runtime="openvino", precision="bfloat16"
            )
    return found


# ---- /api/v1/similarity


def similarity(specs: dict[str, str], data: Captioned, requests: int) -> list[str]:
    """Return the lines of a table: the time of one text and one photo compared, by who serves it."""
    seconds: dict[str, list[float]] = {name: [] for name in specs}
    memory: dict[str, float] = {}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        ports = {
            name: stack.enter_context(served(spec, Path(scratch) / str(at)))
            for at, (name, spec) in enumerate(specs.items())
        }
        for number in range(requests + 3):  # the first three load the towers
            row = number % len(data.pictures)
            body = json.dumps(
                {
                    "a": {"text": f"{data.captions[number % len(data.captions)]} {number}"},
                    "b": {"image": base64.b64encode(data.pictures.read(row)).decode()},
                }
            )
            for name, (port, _) in ports.items():
                began = time.perf_counter()
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
                connection.request(
                    "POST", "/api/v1/similarity", body, {"Content-Type": "application/json"}
                )
                answer = connection.getresponse()
                content = answer.read()
                assert answer.status == 200, content
                if number >= 3:
                    seconds[name].append(time.perf_counter() - began)
        memory = {name: resident(pid) for name, (_, pid) in ports.items()}
    lines = [f"/api/v1/similarity, a text and a photo, n = {requests}, all servers in turn"]
    for name, values in seconds.items():
        median, p95 = 1000 * np.percentile(values, [50, 95])
        lines.append(
            f"{name:<14} p50 {median:6.1f} ms  p95 {p95:6.1f} ms  memory {memory[name]:5.0f} MB"
        )
    return lines


@contextmanager
def served(spec: str, folder: Path) -> Iterator[tuple[int, int]]:
    """Serve an index of one picture with a model; yield the port and the process id."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    shutil.copy(next(gallery.folder().rglob("*.png")), pictures)
    index = [
        sys.executable,
        "-m",
        "app.cli",
        "index",
        str(pictures),
        "--index",
        str(folder / "index"),
    ]
    subprocess.run([*index, "--model", spec, "-q"], check=True, stdout=subprocess.DEVNULL)
    command = [
        sys.executable,
        "-m",
        "app.cli",
        "app",
        "--index",
        str(folder / "index"),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://[\d.]+:(\d+)", line)
        if match is None:
            raise RuntimeError(f"the server said {line!r}")
        yield int(match[1]), process.pid
    finally:
        process.terminate()
        process.wait(30)


def resident(pid: int) -> float:
    """Return a process's resident memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000  # type: ignore[index]


# ---- a cold query


def cold(spec: str, folder: Path) -> list[str]:
    """Return the lines of a table: the time of a fresh process that encodes one text."""
    code = "import sys; from clipkit.lazy_encoder import LazyEncoder; "
    code += "LazyEncoder(sys.argv[1], device='cpu').encode_texts(['a red car'])"
    seconds: dict[str, list[float]] = {"the model itself": [], "its float32 export": []}
    for _ in range(COLD_RUNS + 1):  # the first reads the files from the disk
        for name, one in zip(seconds, (spec, str(folder)), strict=True):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code, one], check=True)
            seconds[name].append(time.perf_counter() - began)
    return [
        f"cold query, {name}: {statistics.median(values[1:]):.2f} s "
        f"({min(values[1:]):.2f} to {max(values[1:]):.2f}, n = {COLD_RUNS})"
        for name, values in seconds.items()
    ]


if __name__ == "__main__":
    main()
