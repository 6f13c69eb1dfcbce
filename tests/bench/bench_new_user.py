"""A new user's evening: 300 pictures and a table of captions in, a better search out.

    python tests/bench/bench_new_user.py --data DIR [--recipe heads] [--out FOLDER]

DIR holds openclipart/ (default: $CLIPKIT_DATA). The user owns the clip art of nine illustrators, whose
names `builtin` has never read, and has captioned about half of it: "Ammo Can, drawn by Ganson", in a
semicolon-separated table with column names of their own, three broken rows and five copied pictures. The
commands are the README's: build, check, train, index, search. What it brought is then measured, with
`builtin` as the baseline, on the other half and on the drawings of six illustrators who were never
captioned: captions both ways, bare titles (what the model knew before), and "drawn by NAME".
"""

from __future__ import annotations

import argparse
import csv
import html
import json
import os
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

from commands import clipkit, write_lines

# As the file names give them; those with fewer than LEAST drawings stay uncaptioned.
ILLUSTRATORS = {
    "Ganson": "ganson",
    "Architetto Francesco": "architett?o?_|_architet|_archite_|_archi_|rollandin",
    "Nicu Buculei": "nicu",
    "Benji Park": "benji",
    "Gerald G.": "gerald",
    "Linda Kim": "linda_kim",
    "Juliane Krug": "juliane",
    "Jarno Vasamaa": "jarno",
    "Jean-Victor Balin": "jean[-_]victor",
    "Matthew": "matthew",
    "Jon Phillips": "jon_phil",
    "Mimooh": "mimooh",
    "Mo": r"_mo_\d",
    "Dave Pena": "dave_pena",
    "Enrique Meza": "enrique",
}
LEAST = 19
CAPTIONED = 300


def drawings(data: Path) -> dict[str, list[tuple[Path, str]]]:
    """(file, title) of each illustrator's drawings."""
    files_of: dict[str, list[tuple[Path, str]]] = {name: [] for name in ILLUSTRATORS}
    for line in (data / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        title = re.sub(r"\d+$", "", html.unescape(row["captions"][0])).replace("_", " ").strip()
        for name, pattern in ILLUSTRATORS.items():
            if title and re.search(pattern, Path(row["image"]).stem):
                files_of[name].append((data / row["image"], title))
                break
    return files_of


def write_table(folder: Path, captioned: list[tuple[Path, str]]) -> Path:
    """The user's folder: pictures, copies, broken rows, and the table."""
    rows = [(file.name, caption, f"Regal {i % 7}") for i, (file, caption) in enumerate(captioned)]
    for file, _ in captioned:
        shutil.copy(file, folder)
    for i, (file, caption) in enumerate(captioned[:5]):
        shutil.copy(file, folder / f"kopie_{i}{file.suffix}")
        rows.append((f"kopie_{i}{file.suffix}", caption, "Regal 1"))
    (folder / "kaputt.png").write_bytes(b"\x89PNG broken")
    shutil.copy(captioned[8][0], folder / "leer.png")
    rows[10:10] = [("fehlt.png", "A lost picture, drawn by Mo", "Regal 2")]
    rows[60:60] = [("kaputt.png", "A broken picture, drawn by Ganson", "Regal 3")]
    rows[100:100] = [("leer.png", "", "Regal 4")]
    table = folder / "bestand.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([("Bilddatei", "Was man sieht", "Lagerort"), *rows])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("CLIPKIT_DATA"))
    parser.add_argument("--recipe", default="heads", help="of clipkit train (default: heads)")
    parser.add_argument("--out", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0, help="of which half is captioned")
    args = parser.parse_args()
    if args.data is None or not (Path(args.data) / "openclipart" / "captions.jsonl").is_file():
        sys.exit(f"{args.data} holds no openclipart/captions.jsonl; name its folder by --data")
    out = (args.out or Path(tempfile.mkdtemp(prefix="new_user_"))).absolute()
    (out / "clipart").mkdir(parents=True)
    (out / "all").mkdir()

    files_of = drawings(Path(args.data).absolute() / "openclipart")
    share = CAPTIONED / sum(len(files) for files in files_of.values() if len(files) >= LEAST)
    rng = random.Random(args.seed)
    captioned: list[tuple[Path, str]] = []
    rest: list[tuple[Path, str, str]] = []
    for name, files in sorted(files_of.items()):
        rng.shuffle(files)
        chosen = round(len(files) * share) if len(files) >= LEAST else 0
        captioned += [(file, f"{title}, drawn by {name}") for file, title in files[:chosen]]
        rest += [(file, title, name) for file, title in files[chosen:]]
    for file in [*(file for file, _ in captioned), *(file for file, *_ in rest)]:
        shutil.copy(file, out / "all")
    print(f"{len(captioned)} drawings captioned, {len(rest)} others")

    dataset, run, index = str(out / "dataset"), str(out / "runs" / "mine"), str(out / "index")
    clipkit("data", "build", str(write_table(out / "clipart", captioned)), "--out", dataset)
    clipkit("data", "check", dataset)
    clipkit("train", dataset, "--recipe", args.recipe, "--out", str(out / "runs"), "--name", "mine")
    clipkit("index", str(out / "all"), "--index", index, "--model", run)
    clipkit("search", "drawn by Ganson", "--index", index)
    others = {
        "captions": [{"captions": [f"{title}, drawn by {name}"]} for _, title, name in rest],
        "titles": [{"captions": [title]} for _, title, _ in rest],
        "illustrators": [{"keywords": [f"drawn by {name}"]} for *_, name in rest],
    }
    for what, rows_of in others.items():
        rows = [{"image": str(file), **row} for (file, *_), row in zip(rest, rows_of, strict=True)]
        data = write_lines(out / f"{what}.jsonl", rows)
        clipkit("eval", "compare", "builtin", run, "--data", data, "--out", str(out / what))


if __name__ == "__main__":
    main()
