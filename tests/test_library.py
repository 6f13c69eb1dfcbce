"""The front door: `import clipkit`, `clipkit.load`, `clipkit.Library` and the hits it returns."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from colours import ColourModel, paint
from PIL import Image

import clipkit
from clipkit.catalog import Catalog
from clipkit.embed import Progress
from clipkit.errors import (
    CatalogBusy,
    EncoderMismatch,
    ImageError,
    InputError,
    ModelError,
    QueryError,
)
from clipkit.library import SHOWN_HITS, default_index
from clipkit.query import Query, Term

ROOT = Path(__file__).parent.parent
PARTY = ROOT / "data_prep" / "gallery" / "pictures" / "party"


class ColourLibrary(clipkit.Library):
    """A library whose model knows colours (see `colours`)."""

    encoder = ColourModel()  # type: ignore[assignment]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for colour in ("red", "green", "blue", "yellow"):
        paint(folder / f"{colour}.png", colour)
    return folder


@pytest.fixture
def library(tmp_path: Path, photos: Path) -> Iterator[clipkit.Library]:
    with ColourLibrary.open(tmp_path / "index") as library:
        library.add(photos)
        yield library


@pytest.fixture(scope="module")
def party(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of some sample pictures, made with the built-in model."""
    folder = tmp_path_factory.mktemp("party") / "index"
    with clipkit.Library.open(folder) as library:
        summary = library.add(PARTY)
        assert summary.added == len(library) == len(list(PARTY.glob("*.png")))
    return folder


def names(hits: clipkit.Hits) -> list[str]:
    return [Path(hit.picture.path).name for hit in hits]


# ---- imports


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_clipkit_loads_no_heavy_module() -> None:
    heavy = ["numpy", "torch", "faiss", "PIL", "sqlite3", "open_clip"]
    assert (
        run_python(f"import clipkit, sys; print([m for m in {heavy} if m in sys.modules])") == "[]"
    )


@pytest.mark.end_to_end
def test_a_library_needs_no_torch_to_search_by_text(party: Path) -> None:
    code = (
        "import sys, clipkit\n"
        f"library = clipkit.Library.open({str(party)!r})\n"
        "hits = library.search('birthday cake', k=3)\n"
        "library.similar(hits[0])\n"
        "print(len(hits), 'torch' in sys.modules)"
    )
    assert run_python(code) == "3 False"


@pytest.mark.end_to_end
def test_a_search_on_the_command_line_imports_little(party: Path) -> None:
    """Each of the modules named here takes 20 to 2,000 ms to import."""
    heavy = ["torch", "open_clip", "pydantic", "rich", "numpy.ma", "filelock", "PIL", "jinja2"]
    code = (
        "import sys; from app.cli import main\n"
        f"sys.argv = ['clipkit', 'search', 'cake', 'after:2000', '--index', {str(party)!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in [*{heavy}, 'app.cli.train'] if name in sys.modules])"
    )
    lines = run_python(code).splitlines()
    assert len(lines) > 2 and lines[-1] == "[]"


def test_the_front_door_lists_its_names() -> None:
    assert {"Hits", "Library", "load", "__version__"} <= set(dir(clipkit))
    with pytest.raises(AttributeError, match="no attribute 'Libary'"):
        clipkit.Libary  # noqa: B018


def test_load_returns_the_towers(tiny_checkpoint: Callable[..., Path]) -> None:
    encoder = clipkit.load(str(tiny_checkpoint()), device="cpu", precision="float32")
    rows = encoder.encode_texts(["a red car", "a cat"])
    assert rows.shape == (2, 16) and encoder.precision == "float32"
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1], abs=1e-5)


# ---- opening and adding


def test_a_folder_without_an_index_is_an_empty_library(tmp_path: Path) -> None:
    with clipkit.Library.open(tmp_path / "none") as library:
        assert len(library) == 0
        assert "0 pictures" in repr(library)
        with pytest.raises(InputError, match=r"no index at .*none; create one with"):
            library.search("red")
        with pytest.raises(InputError, match="no index at"):
            library.remove(tmp_path)
    assert not (tmp_path / "none").exists()


def test_a_mistyped_folder_leaves_no_index_behind(tmp_path: Path) -> None:
    with clipkit.Library.open(tmp_path / "index") as library:
        with pytest.raises(InputError, match="nowhere does not exist; name a folder"):
            library.add(tmp_path / "nowhere")
        assert not (tmp_path / "index").exists()


def test_an_unknown_model_leaves_no_index_behind(tmp_path: Path, photos: Path) -> None:
    with (
        clipkit.Library.open(tmp_path / "index", model="nonsense") as library,
        pytest.raises(ModelError, match="model 'nonsense' is unknown"),
    ):
        library.add(photos)
    assert not (tmp_path / "index").exists()


def test_what_is_added_is_found_by_the_next_search(
    library: clipkit.Library, photos: Path, tmp_path: Path
) -> None:
    """Also by another library that was open all the time."""
    with ColourLibrary.open(tmp_path / "index") as other:
        assert names(other.search("white", k=1)) != ["white.png"]
        paint(photos / "white.png", "white")
        seen: list[Progress] = []
        summary = library.add(photos, on_progress=seen.append)
        assert (summary.added, summary.unchanged) == (1, 4)
        assert (seen[-1].phase, seen[-1].done, seen[-1].total) == ("finishing", 1, 1)
        for one in (library, other):
            assert names(one.search("white", k=1)) == ["white.png"]
            assert len(one) == 5


def test_several_folders_are_added_in_one_run(library: clipkit.Library, tmp_path: Path) -> None:
    paint(tmp_path / "a" / "1.png", "red", number=1)
    paint(tmp_path / "b" / "2.png", "red", number=2)
    assert library.add(str(tmp_path / "a"), tmp_path / "b").added == 2
    assert len(library) == 6


def test_add_can_be_stopped(library: clipkit.Library, photos: Path) -> None:
    paint(photos / "white.png", "white")
    stop = threading.Event()
    stop.set()
    summary = library.add(photos, stop=stop)
    assert summary.stopped and summary.added == 0 and len(library) == 4


def test_one_writer_at_a_time_and_searches_go_on(
    library: clipkit.Library, photos: Path, tmp_path: Path
) -> None:
    with Catalog.open(tmp_path / "index", write=True):
        with pytest.raises(CatalogBusy, match="this process is writing to the index"):
            library.add(photos)
        assert names(library.search("red", k=1)) == ["red.png"]
    assert library.add(photos).unchanged == 4


def test_removed_folders_leave_the_index_and_stay_on_the_disk(
    library: clipkit.Library, photos: Path
) -> None:
    with pytest.raises(InputError, match="phots is not in the index; its folders are"):
        library.remove(photos, photos.with_name("phots"))
    assert len(library) == 4
    assert library.remove(photos) == 4
    assert len(library) == 0 and len(library.search("red")) == 0
    assert len(list(photos.iterdir())) == 4


def test_the_model_is_the_indexs_own(
    tiny_checkpoint: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    spec = str(tiny_checkpoint("timm-hf"))
    with clipkit.Library.open(tmp_path / "index", model=spec, device="cpu") as library:
        library.add(photos)
    with clipkit.Library.open(tmp_path / "index") as library:
        assert library.encoder.spec == spec
    with clipkit.Library.open(tmp_path / "other") as library:
        assert library.encoder.spec == "builtin"


@pytest.fixture
def made_with_a_run(
    tiny_checkpoint: Callable[..., Path],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """An index that was made in the folder tmp_path / "work", with the relative path of a run."""
    work = tmp_path / "work"
    shutil.copytree(tiny_checkpoint("timm-hf"), work / "runs" / "mine" / "checkpoint")
    monkeypatch.chdir(work)
    with clipkit.Library.open(tmp_path / "index", model="runs/mine", device="cpu") as library:
        assert library.add(photos).model == "runs/mine"
    monkeypatch.chdir(tmp_path)
    return tmp_path / "index"


def test_an_index_made_with_a_run_works_from_any_folder(made_with_a_run: Path) -> None:
    run = made_with_a_run.parent / "work" / "runs" / "mine"
    with clipkit.Library.open(made_with_a_run) as library:
        assert library.encoder.spec == str(run)
        assert len(library.search("a red car", k=2)) == 2


def test_a_model_that_is_gone_is_named_with_what_helps(
    made_with_a_run: Path, photos: Path, tmp_path: Path
) -> None:
    """What needs no model works on; so does the index once the run is back, or named where it is."""
    run = tmp_path / "work" / "runs" / "mine"
    run.rename(tmp_path / "renamed")
    with clipkit.Library.open(made_with_a_run) as library:
        message = (
            f"the pictures in the index at {made_with_a_run} were encoded with {run}, which is not "
            "there any more; if the model has moved, name its new place with --model PATH; or index "
            "the pictures with another one: clipkit index FOLDER --model builtin"
        )
        with pytest.raises(ModelError, match=re.escape(message)):
            library.search("a red car")
        assert names(library.search("path:red")) == ["red.png"]
        hit = library.search("path:red")[0]
        assert len(library.similar(hit)) == 3
        assert library.add(photos).unchanged == 4
        paint(photos / "white.png", "white")
        with pytest.raises(ModelError, match=re.escape(message)):
            library.add(photos)
        (tmp_path / "renamed").rename(run)
        assert len(library.search("a red car")) == 4
    run.rename(tmp_path / "renamed")
    with clipkit.Library.open(made_with_a_run, model="renamed", device="cpu") as library:
        assert len(library.search("a red car")) == 4
    with clipkit.Library.open(made_with_a_run) as library:
        assert library.encoder.spec == str(tmp_path / "renamed")
        assert len(library.search("a red car")) == 4


def test_a_model_that_is_gone_leaves_the_index_to_another(
    made_with_a_run: Path, tmp_path: Path
) -> None:
    """One with vectors of these pictures is named; if it has none, its error does not recommend
    the model that is gone."""
    shutil.rmtree(tmp_path / "work")
    with (
        clipkit.Library.open(made_with_a_run, model="builtin") as library,
        pytest.raises(EncoderMismatch, match=r"encoder \w+\); index the pictures with the other"),
    ):
        library.search("a red car")
    with Catalog.open(made_with_a_run, write=True) as catalog:
        catalog.register_encoder("more", spec="builtin", config_json="{}", dim=2)
        nums = catalog.live_nums(catalog.encoders()[0].encoder_id).nums[:3]
        catalog.add_vectors("more", nums, np.full((3, 2), 0.5**0.5, np.float32))
    with (
        clipkit.Library.open(made_with_a_run) as library,
        pytest.raises(ModelError, match=r"pictures here: --model builtin \(3 pictures\)$"),
    ):
        library.search("a red car")


def test_an_older_index_with_a_relative_path_says_that_it_is_one(
    made_with_a_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Catalog.open(made_with_a_run, write=True) as catalog:
        catalog.move_encoder(catalog.encoders()[0].encoder_id, "runs/mine")
    with (
        clipkit.Library.open(made_with_a_run) as library,
        pytest.raises(ModelError, match="with runs/mine, a path from the folder in which that was"),
    ):
        library.search("a red car")
    monkeypatch.chdir(tmp_path / "work")
    with clipkit.Library.open(made_with_a_run) as library:
        assert len(library.search("a red car")) == 4


def test_a_closed_library_says_so(library: clipkit.Library, photos: Path) -> None:
    hits = library.search("red", k=1)
    library.close()
    library.close()
    for use in (lambda: library.search("red"), lambda: library.add(photos), lambda: len(library)):
        with pytest.raises(InputError, match="was closed; open it again"):
            use()
    assert "closed" in repr(library)
    assert names(hits) == ["red.png"]


def test_the_default_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLIPKIT_INDEX", str(tmp_path / "mine"))
    assert clipkit.Library.open().folder == default_index() == tmp_path / "mine"
    monkeypatch.delenv("CLIPKIT_INDEX")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert clipkit.Library.open().folder.parts[-2:] == ("clipkit", "index")


# ---- searching


def test_hits_carry_their_pictures(library: clipkit.Library, photos: Path) -> None:
    """cosine("red", red) = 1, ("red", yellow) = (1 - 1 + 1) / 3 and ("red", blue) = (-1 + 1 - 1) / 3,
    each within half-precision and the one grey pixel that `paint` sets."""
    hits = library.search("red", k=3)
    assert names(hits)[:2] == ["red.png", "yellow.png"]
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert [hit.score for hit in hits] == pytest.approx([1, 1 / 3, -1 / 3], abs=2e-3)
    assert hits[0].picture.path == str(photos / "red.png")
    assert (hits[0].picture.width, hits[0].picture.height) == (90, 60)
    assert (hits.total, hits.query) == (4, "red")
    assert hits.seconds.keys() == {"load", "encode", "filter", "scan", "rows"}


def test_the_query_language_and_parsed_queries(library: clipkit.Library) -> None:
    assert names(library.search("path:blue")) == ["blue.png"]
    assert names(library.search(Query(terms=(Term("green"),)), k=1)) == ["green.png"]
    assert len(library.search()) == 4  # the newest
    with pytest.raises(QueryError, match="quote"):
        library.search('"open')
    with pytest.raises(InputError, match="k is 0"):
        library.search("red", k=0)


def test_an_example_is_a_file_its_bytes_or_a_picture(
    library: clipkit.Library, tmp_path: Path
) -> None:
    file = paint(tmp_path / "some where" / "new.png", "blue", number=7)
    examples = (file, str(file), file.read_bytes(), Image.open(file).convert("RGB"))
    for example in examples:
        assert names(library.search(image=example, k=1)) == ["blue.png"]
    assert library.search(image=file).query == "like new.png"
    # Between blue and red lies neither green nor yellow.
    assert set(names(library.search("red", image=file, k=2))) == {"red.png", "blue.png"}
    with pytest.raises(ImageError, match=r"missing\.png"):
        library.search(image=tmp_path / "missing.png")


def test_similar_leaves_the_picture_itself_out(library: clipkit.Library) -> None:
    hit = library.search("red", k=1)[0]
    for picture in (hit, hit.picture, hit.picture.image_id):
        assert names(library.similar(picture, k=1)) == ["yellow.png"]
    assert library.similar(hit).query == "like red.png"
    assert library.similar(hit).total == 3
    # red + 3 green = (1, -1, -1) + 3 (-1, 1, -1): nearest to green, (-2, 2, -4)
    assert names(library.similar(hit, "green^3", k=1)) == ["green.png"]
    assert library.similar(hit, "green^3").query == "like red.png, green^3"
    with pytest.raises(InputError, match=r"no picture '0+' in this library"):
        library.similar("0" * 32)


# ---- what hits look like


def test_hits_as_text(library: clipkit.Library, photos: Path) -> None:
    """The fake model is not calibrated: a cosine has no strength."""
    lines = repr(library.search("red", k=2)).splitlines()
    assert re.fullmatch(r"2 of 4 pictures for 'red', [\d.]+ m?s", lines[0])
    assert re.fullmatch(rf"1  1\.000 +{photos}/red\.png", lines[1])
    assert re.fullmatch(rf"2  0\.33\d +{photos}/yellow\.png", lines[2])
    assert len(lines) == 3
    listed = repr(library.search("path:blue")).splitlines()
    assert re.fullmatch(rf"1 +{photos}/blue\.png", listed[1])
    nothing = library.search("path:nothing")
    assert repr(nothing).startswith("0 of 0 pictures for 'path:nothing'")
    assert repr(nothing).endswith("\nNo path contains “nothing”")


def test_slices_are_hits_too(library: clipkit.Library) -> None:
    hits = library.search("red", k=4)
    assert isinstance(hits[1:3], clipkit.Hits)
    assert names(hits[1:3]) == names(hits)[1:3]
    assert hits[-1].rank == 4
    assert hits[0] in hits


def pictures_in(html: str) -> list[Image.Image]:
    sources = re.findall(r'<img src="data:image/jpeg;base64,([A-Za-z0-9+/=]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]


def test_a_notebook_shows_a_gallery(library: clipkit.Library) -> None:
    html = library.search("red", k=2)._repr_html_()
    first, second = pictures_in(html)
    assert first.getpixel((45, 30)) == pytest.approx((255, 0, 0), abs=3)
    assert second.getpixel((45, 30)) == pytest.approx((255, 255, 0), abs=3)
    assert html.index("red.png") < html.index("1  1.000") < html.index("yellow.png")
    assert "2 of 4 pictures for &#39;red&#39;" in html


def test_the_gallery_escapes_names_and_queries(library: clipkit.Library, photos: Path) -> None:
    name = '"><script>alert(1)<'
    paint(photos / name / "a<b>'&.png", "white")
    library.add(photos)
    html = library.search("white <script>alert(2)</script>", k=1)._repr_html_()
    assert "<script" not in html and "a<b" not in html
    assert "a&lt;b&gt;&#39;&amp;.png" in html
    assert html.count("<img") == 1


def test_the_gallery_outlives_library_thumbnails_and_files(
    library: clipkit.Library, photos: Path, tmp_path: Path
) -> None:
    hits = library.search("red", k=1)
    library.close()
    assert len(pictures_in(hits._repr_html_())) == 1
    for file in (tmp_path / "index").glob("thumbnails.sqlite*"):
        file.unlink()
    assert len(pictures_in(hits._repr_html_())) == 1  # made anew from the file
    for file in (tmp_path / "index").glob("thumbnails.sqlite*"):
        file.unlink()
    paint(photos / "red.png", "blue")  # other content under the same name is not shown
    assert "no preview" in hits._repr_html_()
    shutil.rmtree(tmp_path / "index")
    html = hits._repr_html_()
    assert "no preview" in html and "red.png" in html


def test_long_results_are_cut_short(tmp_path: Path) -> None:
    for number in range(SHOWN_HITS + 2):
        paint(tmp_path / "many" / f"{number}.png", "green", number=number)
    with ColourLibrary.open(tmp_path / "index") as library:
        library.add(tmp_path / "many")
        hits = library.search("green", k=1000)
        assert len(hits) == SHOWN_HITS + 2
        assert repr(hits).endswith("\nand 2 more")
        html = hits._repr_html_()
        assert len(pictures_in(html)) == SHOWN_HITS and "and 2 more" in html


# ---- whole


@pytest.mark.end_to_end
def test_the_builtin_model_from_folder_to_hits(party: Path) -> None:
    with clipkit.Library.open(party) as library:
        hits = library.search("balloons", k=3)
        assert "balloon" in names(hits)[0]
        assert all(hit.strength in ("strong", "fair", "weak") for hit in hits)
        assert len(pictures_in(hits._repr_html_())) == 3
