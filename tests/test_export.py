"""Exported towers: the same vectors in other runtimes, without torch, under ids that do not lie."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from textured import textured

import clipkit
from clipkit import checkpoint, towers
from clipkit.checkpoint import Export, Identity
from clipkit.errors import EncoderMismatch, InputError, ModelError
from clipkit.lazy_encoder import LazyEncoder
from clipkit.runtimes import RUNTIMES, ExportedEncoder, Graph, standalone

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: clipkit[onnx]"),
    pytest.mark.end_to_end,  # an export takes seconds
]

SIZES = ((64, 64), (200, 90), (33, 170), (20, 900), (700, 500))  # width, height
TEXTS = ["a photo of a red car", "cat", "the house and the blue boat " * 12, "a dog, 3 trees!"]
KINDS = ["vit", "resnet", "siglip", "timm-hf"]

Exports = Callable[..., Path]


def pictures() -> list[Image.Image]:
    return [textured(size, seed=at) for at, size in enumerate(SIZES)]


@pytest.fixture(scope="session")
def exported(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Exports:
    """exported(kind="vit", int8=False): the folder of an export, made once a session."""
    made: dict[tuple[str, bool], Path] = {}

    def make(kind: str = "vit", *, int8: bool = False) -> Path:
        from clipkit.towers.exporting import export_onnx

        if (kind, int8) not in made:
            folder = tmp_path_factory.mktemp("exported") / f"{kind}{'-int8' if int8 else ''}"
            encoder = towers.load(str(tiny_checkpoint(kind)), device="cpu", precision="float32")
            sides = ("image", "text") if int8 else ()
            export_onnx(encoder, folder, int8=sides, pictures=pictures())
            made[kind, int8] = folder
        return made[kind, int8]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_export_is_the_same_encoder(
    kind: str, exported: Exports, tiny_checkpoint: Callable[..., Path]
) -> None:
    """One of each family, for one row and for several parts of rows, texts of any length among them."""
    torchs = towers.load(str(tiny_checkpoint(kind)), device="cpu", precision="float32")
    ours = clipkit.load(str(exported(kind)))
    assert (ours.encoder_id, ours.space_id) == (torchs.encoder_id, torchs.space_id)
    assert (ours.dim, ours.preferred_side) == (torchs.dim, torchs.preferred_side)
    assert ours.logit_scale == pytest.approx(torchs.logit_scale)
    assert json.loads(ours.describe()) == json.loads(torchs.describe())
    pixels = np.stack([torchs.preprocess(picture).numpy() for picture in pictures() * 4])
    import torch

    expected = torchs.encode_images(torch.from_numpy(pixels))
    assert np.allclose(ours.encode_images(pixels), expected, atol=1e-5)
    assert np.allclose(ours.encode_images(pixels[:1]), expected[:1], atol=1e-5)
    texts = [*TEXTS, "", *(word for text in TEXTS for word in text.split())]
    assert np.allclose(ours.encode_texts(texts), torchs.encode_texts(texts), atol=1e-5)
    assert ours.encode_texts([]).shape == ours.encode_images([]).shape == (0, torchs.dim)
    # Pillow's resize is torch's but for rounding: whole pictures come within a hair of it.
    cosines = (ours.encode_images(pictures()) * torchs.encode_images(pictures())).sum(axis=1)
    assert cosines.min() > 0.999


@pytest.mark.parametrize("kind", [*KINDS, "vit-quickgelu"])
def test_pictures_are_prepared_as_for_torch(
    kind: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Every resize mode, both filters. Each rounds after each axis: no value differs by more than 2."""
    encoder = towers.load(str(tiny_checkpoint(kind)), device="cpu")
    config = encoder.config
    settings = {
        "shape": ["n", 3, *config.image_size],
        "resize_mode": config.resize_mode,
        "interpolation": config.interpolation,
        "fill": config.fill,
    }
    for size in ((64, 64), (200, 90), (33, 170), (20, 900), (9, 5), (1, 40)):
        picture = textured(size)
        difference = standalone.preprocess(picture, settings).astype(int) - encoder.preprocess(
            picture
        ).numpy().astype(int)
        assert np.abs(difference).max() <= 2, size


# What is a letter is decided by each library's Unicode: characters that are newer than Python's differ.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))


@settings(max_examples=60)
@given(st.lists(st.text(ASSIGNED, max_size=40), min_size=1, max_size=4))
def test_clip_s_byte_pairs_are_those_of_openclip(exported: Exports, texts: list[str]) -> None:
    import open_clip

    folder = exported("vit")
    text = checkpoint.read_export(folder).text
    tokenizer = standalone.open_tokenizer(folder / text["tokenizer"], text)
    tokens = standalone.tokenize(tokenizer, texts, text)
    expected = open_clip.get_tokenizer("ViT-B-32")(texts).numpy()
    assert np.array_equal(tokens, expected[:, : tokens.shape[1]])
    assert not expected[:, tokens.shape[1] :].any()


def test_the_folder_is_used_without_clipkit_and_without_torch(
    exported: Exports, tmp_path: Path
) -> None:
    """The copied example.py, where importing either fails, prints the encoder's cosines."""
    folder = exported("timm-hf")
    file = tmp_path / "red.png"
    textured((90, 60)).save(file)
    code = (
        "import runpy, sys; sys.modules['clipkit'] = sys.modules['torch'] = None; "
        f"sys.argv = ['example.py', 'a red car', {str(file)!r}]; "
        f"runpy.run_path({str(folder / 'example.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    ours = clipkit.load(str(folder))
    cosine = float(
        (ours.encode_images([Image.open(file)]) @ ours.encode_texts(["a red car"]).T)[0, 0]
    )
    assert done.stdout.split() == [str(file), f"{cosine:.3f}", "a", "red", "car"], done.stderr


def test_encoding_with_an_export_imports_no_torch(exported: Exports) -> None:
    code = (
        "import sys, clipkit; from clipkit.lazy_encoder import LazyEncoder; "
        f"spec = {str(exported())!r}; clipkit.load(spec).encode_texts(['a cat']); "
        "lazy = LazyEncoder(spec); lazy.encode_texts(['a cat']); lazy.precision; lazy.towers().dim; "
        "print([m for m in ('torch', 'open_clip', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# ---- identity


def test_int8_vectors_carry_ids_of_their_own(
    exported: Exports,
) -> None:
    """Near the model's vectors, smaller files, other ids: those of a lazy and of a loaded encoder."""
    plain, int8 = exported("timm-hf"), exported("timm-hf", int8=True)
    ours, torchs = clipkit.load(str(int8)), clipkit.load(str(plain))
    assert ours.encoder_id != torchs.encoder_id and ours.space_id != torchs.space_id
    lazy = LazyEncoder(str(int8))
    assert (lazy.known_id, lazy.space_id) == (ours.encoder_id, ours.space_id)
    assert (lazy.precision, ours.precision) == ("int8 onnx", "int8 onnx")
    for rows, expected in (
        (ours.encode_images(pictures()), torchs.encode_images(pictures())),
        (ours.encode_texts(TEXTS), torchs.encode_texts(TEXTS)),
    ):
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        assert 0.9 < (rows * expected).sum(axis=1).min() < 0.999999
    for name in ("image.onnx", "text.onnx"):
        assert (int8 / name).stat().st_size < (plain / name).stat().st_size


def test_an_int8_text_tower_keeps_the_space_of_its_pictures() -> None:
    """Only what changed gets new ids, so that it may search the vectors that the model has made."""

    def identity(image: str, text: str, digest: str = "a" * 64) -> Identity:
        return Export(
            model="m",
            source=Identity("e" * 16, "s" * 16),
            dim=2,
            logit_scale=100.0,
            image={"file": "image.onnx", "precision": image},
            text={"file": "text.onnx", "precision": text},
            files={"image.onnx": "b" * 64, "text.onnx": digest},
            clipkit="0",
        ).identity()

    assert identity("float32", "float32") == ("e" * 16, "s" * 16)
    text_only = identity("float32", "int8")
    assert text_only.space_id == "s" * 16 and text_only.encoder_id != "e" * 16
    assert identity("float32", "int8", "c" * 64).encoder_id != text_only.encoder_id
    assert identity("int8", "float32").space_id != "s" * 16


def test_an_index_takes_float32_exports_for_the_model_and_int8_for_another(
    exported: Exports, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    for at, picture in enumerate(pictures()):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        picture.save(tmp_path / "pictures" / f"{at}.png")
    index = tmp_path / "index"
    model, plain, int8 = (
        tiny_checkpoint("timm-hf"),
        exported("timm-hf"),
        exported("timm-hf", int8=True),
    )
    with clipkit.Library.open(
        index, model=str(model), device="cpu", precision="float32"
    ) as library:
        library.add(tmp_path / "pictures")
        expected = library.search("a red car")
    with clipkit.Library.open(index, model=str(plain)) as library:
        hits = library.search("a red car")
        assert [hit.picture.path for hit in hits] == [hit.picture.path for hit in expected]
        assert [hit.score for hit in hits] == pytest.approx(
            [hit.score for hit in expected], abs=1e-3
        )
        assert library.add(tmp_path / "pictures").embedded == 0
    with (
        clipkit.Library.open(index, model=str(int8)) as library,
        pytest.raises(EncoderMismatch, match="int8"),
    ):
        library.search("a red car")
    with clipkit.Library.open(index, model=str(int8)) as library:
        summary = library.add(tmp_path / "pictures")
        assert (summary.embedded, summary.reencoded) == (5, 5)
        assert len(library.search("a red car")) == 5
        # One encoder, now found where the float32 export was named last; and the int8 one.
        assert [one.spec for one in library.models()] == [str(plain), str(int8)]
    with clipkit.Library.open(
        index
    ) as library:  # the model that answers now, by what the index notes
        assert library.encoder.spec == str(int8) and len(library.search("cat")) == 5


def test_int8_texts_alone_search_the_vectors_that_the_model_has_made(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """`use` makes an index search with the export; nothing is encoded again. Its calibration is not
    the model's, that of a float32 export is."""
    from clipkit.strength import Calibration
    from clipkit.towers.exporting import export_onnx

    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("timm-hf"), folder)
    encoder = towers.load(str(folder), device="cpu", precision="float32")
    Calibration(encoder.encoder_id, -9.0, 30.0).write(folder)
    export_onnx(encoder, tmp_path / "int8", int8=["text"])
    ours = clipkit.load(str(tmp_path / "int8"))
    assert ours.space_id == encoder.space_id and ours.encoder_id != encoder.encoder_id
    assert not (tmp_path / "int8" / "strength.json").exists()
    export_onnx(encoder, folder / "onnx")
    assert (folder / "onnx" / "strength.json").is_file()
    (tmp_path / "pictures").mkdir()
    pictures()[0].save(tmp_path / "pictures" / "one.png")
    with clipkit.Library.open(tmp_path / "index", model=str(folder), device="cpu") as library:
        library.add(tmp_path / "pictures")
    with clipkit.Library.open(tmp_path / "index") as library:
        assert library.use(str(tmp_path / "int8")).vectors == 1
        (hit,) = library.search("a red car")
        assert library.encoder.encoder_id == ours.encoder_id
    rows = ours.encode_texts(["a red car"]) @ encoder.encode_images([pictures()[0]]).T
    assert hit.score == pytest.approx(float(rows[0, 0]), abs=0.01)
    with pytest.raises(InputError, match="int8 is 'texts'; did you mean 'text'"):
        export_onnx(encoder, tmp_path / "more", int8=["texts"])
    with pytest.raises(InputError, match="int8 needs sample pictures"):
        export_onnx(encoder, tmp_path / "more", int8=["image"])


def test_weights_too_large_for_one_file_lie_beside_it(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX files end at 2 GB; here the limit is 10 kB."""
    from clipkit.towers import exporting

    monkeypatch.setattr(exporting, "MOST_INLINE", 10_000)
    encoder = towers.load(str(tiny_checkpoint("timm-hf")), device="cpu", precision="float32")
    for int8 in ((), ("image", "text")):
        folder = tmp_path / f"out{len(int8)}"
        exporting.export_onnx(encoder, folder, int8=int8, pictures=pictures())
        export = checkpoint.read_export(folder)
        assert {"image.onnx.data", "text.onnx.data"} <= set(export.files)
        assert set(export.files) <= {path.name for path in folder.iterdir()}
        cosines = clipkit.load(str(folder)).encode_texts(TEXTS) * encoder.encode_texts(TEXTS)
        assert cosines.sum(axis=1).min() > 0.9


def test_a_file_that_was_changed_is_refused(exported: Exports, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported(), folder)
    assert checkpoint.identify(str(folder)) == checkpoint.identify(str(exported()))
    with (folder / "text.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match=r"text\.onnx is not the file that was exported"):
        clipkit.load(str(folder))
    (folder / "text.onnx").unlink()
    with pytest.raises(ModelError, match=r"lacks text\.onnx"):
        clipkit.load(str(folder))


# ---- runtimes


def open_reference(file: Path, *, device: str, precision: str, calls: int) -> Graph:  # noqa: ARG001
    """ONNX's own evaluator in numpy: a runtime that clipkit does not have."""
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(str(file))
    (name,) = session.input_names
    return lambda batch: session.run(None, {name: batch})[0]


def test_a_runtime_from_outside_needs_one_entry(
    exported: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="runtime is 'reference'; use one of auto, torch, onnx"):
        clipkit.load(str(exported()), runtime="reference")
    monkeypatch.setitem(RUNTIMES, "reference", open_reference)
    theirs = clipkit.load(str(exported()), runtime="reference")
    ours = clipkit.load(str(exported()), runtime="onnx")
    assert np.allclose(theirs.encode_texts(TEXTS), ours.encode_texts(TEXTS), atol=1e-4)
    assert np.allclose(theirs.encode_images(pictures()), ours.encode_images(pictures()), atol=1e-4)
    assert theirs.precision == "float32 reference"


def test_the_command_line_s_runtimes_are_the_registry_s(
    clipkit: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNTIMES, "reference", open_reference)
    code, _, err = clipkit("search", "cat", "--runtime", "references")
    assert code == 2 and "did you mean 'reference'?" in err


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_gives_the_same_vectors(exported: Exports) -> None:
    ours = clipkit.load(str(exported("timm-hf")))
    theirs = clipkit.load(str(exported("timm-hf")), runtime="openvino")
    batch = pictures() * 4
    assert np.allclose(theirs.encode_images(batch), ours.encode_images(batch), atol=1e-4)
    assert np.allclose(theirs.encode_texts(TEXTS), ours.encode_texts(TEXTS), atol=1e-4)
    assert theirs.encoder_id == ours.encoder_id
    with pytest.raises(ModelError, match="is in int8, which OpenVINO computes otherwise"):
        clipkit.load(str(exported("timm-hf", int8=True)), runtime="openvino")


def test_onnx_runtime_reports_nothing(exported: Exports) -> None:
    """Its telemetry, which sends reports and leaves a device id in the user's cache, is off by the time
    that it is imported: it reads the variable then."""
    code = (
        "import os, sys, clipkit\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'onnxruntime': print(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"clipkit.load({str(exported())!r}).encode_texts(['a cat'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.strip() == "1", done.stderr


def test_texts_are_encoded_by_the_export_inside_a_checkpoint(
    exported: Exports, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A CLIP text tower, which numpy does not compute: no towers are loaded. Another model's export in
    the folder is not used."""
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(), model)
    shutil.copytree(exported(), model / "onnx")
    lazy = LazyEncoder(str(model), device="cpu", precision="float32")
    rows = lazy.encode_texts(TEXTS)
    assert lazy._towers is None
    assert np.allclose(rows, lazy.towers().encode_texts(TEXTS), atol=1e-5)
    by_runtime = clipkit.load(str(model), runtime="onnx")
    assert isinstance(by_runtime, ExportedEncoder) and by_runtime.encoder_id == lazy.encoder_id
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint(seed=1), other)
    shutil.copytree(exported(), other / "onnx")
    lazy = LazyEncoder(str(other), device="cpu", precision="float32")
    assert np.allclose(lazy.encode_texts(TEXTS), lazy.towers().encode_texts(TEXTS), atol=1e-5)


def test_errors_name_the_remedy(
    exported: Exports, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = str(tiny_checkpoint()), str(exported())
    with pytest.raises(ModelError, match=f"clipkit export {model} --onnx"):
        clipkit.load(model, runtime="onnx")
    for load in (towers.load, lambda spec: clipkit.load(spec, runtime="torch")):
        with pytest.raises(ModelError, match=f"cannot run or train; name the model: {model}"):
            load(folder)
    encoder = clipkit.load(folder)
    with pytest.raises(InputError, match="takes a list of texts"):
        encoder.encode_texts("cat")
    with pytest.raises(InputError, match=r"must be uint8 of shape \(3, 32, 32\)"):
        encoder.encode_images(np.zeros((1, 3, 8, 8), np.uint8))
    with pytest.raises(InputError, match="not in bfloat16"):
        clipkit.load(folder, precision="bfloat16").encode_texts(["cat"])
    with pytest.raises(InputError, match="device 'mps' is not usable"):
        clipkit.load(folder, device="mps").encode_texts(["cat"])
    from clipkit.runtimes import graphs
    from clipkit.towers import exporting

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(graphs, "import_module", missing)
    with pytest.raises(ModelError, match=r"pip install 'clipkit\[onnx\]'"):
        clipkit.load(folder).encode_texts(["cat"])
    with pytest.raises(ModelError, match=r"pip install 'clipkit\[openvino\]'"):
        clipkit.load(folder, runtime="openvino").encode_texts(["cat"])
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if "script" in name else name)
    with pytest.raises(ModelError, match=r"onnxscript, which is not installed; .*clipkit\[onnx\]"):
        exporting.export_onnx(towers.load(model, precision="float32"), Path("nowhere"))


# ---- the command


def test_the_command_writes_measures_and_does_not_overwrite(
    clipkit: Callable[..., tuple[int, str, str]],
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from eval import runtimes

    monkeypatch.setattr(runtimes, "RUNS", 2)
    data = tmp_path / "data"
    data.mkdir()
    lines = []
    for at, picture in enumerate(pictures()):
        picture.save(data / f"{at}.png")
        lines.append(json.dumps({"file_name": f"{at}.png", "text": f"a photo of {at} cats"}))
    (data / "metadata.jsonl").write_text("\n".join(lines))
    folder = tmp_path / "out"
    arguments = ["export", str(tiny_checkpoint()), "--onnx", "--out", str(folder), "-q"]
    arguments += ["--data", str(data)]
    code, out, err = clipkit(*arguments)
    assert code == 0, err
    assert "torch float32" in out and "onnx float32" in out and str(folder) in out
    report = json.loads((folder / "report.json").read_text())
    assert (report["data"]["pictures"], report["data"]["texts"]) == (5, 5)
    reference, *_, ours = report["rows"]
    assert reference["image_cosine"] == pytest.approx({"mean": 1, "low": 1, "n": 5})
    assert ours["text_cosine"]["low"] > 0.9999 and ours["image_cosine"]["low"] > 0.999
    assert set(ours["recall"]) == {
        f"{d}/R@{k}" for d in ("text_to_image", "image_to_text") for k in (1, 5)
    }
    assert ours["recall"]["text_to_image/R@5"] == 1  # of five pictures
    assert ours["pictures_per_second"]["median"] > 0
    assert ours["pictures_per_second"]["low"] <= ours["pictures_per_second"]["high"]
    code, _, err = clipkit(*arguments)
    assert code == 2 and "exists; name another folder with --out, or --overwrite it" in err
    assert clipkit(*arguments, "--overwrite")[0] == 0
    code, _, err = clipkit("export", folder)
    assert code == 2 and "cannot run or train; name the model" in err
