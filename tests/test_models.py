"""Which models there are, without torch; and OpenCLIP's own files of weights as models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipkit import checkpoint, models, towers
from clipkit.errors import ModelError

ROOT = Path(__file__).parent.parent
TEXTS = ["a red car", "penguin"]
Checkpoint = Callable[..., Path]
Clipkit = Callable[..., tuple[int, str, str]]


# ---- what there is


def test_openclips_files_are_read_as_openclip_reads_them() -> None:
    """Every architecture with its settings, and every tag with its file on the hub."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    assert list(models.architectures()) == open_clip.list_models()
    assert models.architectures()["RN50"] == open_clip.get_model_config("RN50")
    files = {
        (a, tag): file for a, tags in models.pretrained().items() for tag, file in tags.items()
    }
    assert files == {
        (architecture, tag): get_pretrained_cfg(architecture, tag)["hf_hub"]
        for architecture, tag in open_clip.list_pretrained()
    }


def counted(architecture: str) -> int:
    """Parameters of an architecture, made without memory for them."""
    import open_clip

    model = open_clip.create_model(
        architecture, device="meta", load_weights=False, pretrained_text=False
    )
    return sum(parameter.numel() for parameter in model.parameters())


def recorded() -> dict[str, int]:
    file = Path(models.__file__).parent / "towers" / "parameters.json"
    return json.loads(file.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("architecture", ["ViT-B-32", "RN50", "ViT-B-16-SigLIP", "ViT-S-32-alt"])
def test_recorded_numbers_of_parameters(
    architecture: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ViT-B-32 is known to have 151.28 M: arXiv 2103.00020's model, model_profile.csv of OpenCLIP."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert recorded()[architecture] == counted(architecture)
    assert recorded()["ViT-B-32"] == 151_277_313


@pytest.mark.slow
def test_all_recorded_numbers_of_parameters() -> None:
    """When this fails after an upgrade of OpenCLIP, write `counted` of every architecture again."""
    assert recorded().keys() <= models.architectures().keys()
    assert {name: counted(name) for name in recorded()} == recorded()


def test_listing_needs_no_torch_and_finds_runs_and_fetched_weights(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Made: a run, a folder that is none, and a hub's cache with one model's file of 7 bytes."""
    shutil.copytree(tiny_checkpoint("vit"), tmp_path / "runs" / "mine" / "checkpoint")
    (tmp_path / "runs" / "unfinished").mkdir()
    repository = tmp_path / "hub" / "models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "open_clip_model.safetensors").write_bytes(b"weights")
    code = (
        "import json, sys; from dataclasses import asdict; from clipkit.models import list_models; "
        "print(json.dumps([asdict(row) for row in list_models()])); assert 'torch' not in sys.modules"
    )
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {row["spec"]: row for row in json.loads(done.stdout)}
    assert list(rows)[:2] == ["builtin", "runs/mine"]
    weights = tiny_checkpoint("vit") / "open_clip_model.safetensors"
    assert rows["runs/mine"]["bytes"] == weights.stat().st_size
    assert (rows["runs/mine"]["dim"], rows["runs/mine"]["image_size"]) == (16, [32, 32])
    values = sum(array.size for _, array in checkpoint.read_weights(weights))
    assert rows["runs/mine"]["parameters"] == values
    assert rows["ViT-B-32/laion2b_s34b_b79k"]["bytes"] == 7
    assert rows["ViT-B-32/openai"] == {
        "spec": "ViT-B-32/openai",
        "dim": 512,
        "image_size": [224, 224],
        "parameters": 151_277_313,
        "bytes": None,
    }
    assert "ViT-S-32-alt:FILE" in rows and "ViT-B-32:FILE" not in rows
    assert "runs/unfinished" not in rows


def test_the_command_filters_by_words(clipkit: Clipkit) -> None:
    code, out, _ = clipkit("models", "b-32", "LAION2B_S34B")
    assert code == 0
    assert out.splitlines() == [
        "model                        dim   pixels  parameters  on this disk",
        "ViT-B-32/laion2b_s34b_b79k   512      224       151 M",
        "1 model, 0 on this disk",
    ]
    code, out, _ = clipkit("models", "--here", "built", "--json")
    (row,) = json.loads(out)
    assert (row["spec"], row["dim"]) == ("builtin", 512) and row["bytes"] > 1e7
    assert clipkit("models", "nonsense")[1] == "0 models, 0 on this disk\n"


# ---- names that are wrong


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("vit-b-32/OpenAI", "model 'vit-b-32/OpenAI' is unknown; did you mean ViT-B-32/openai"),
        ("builtn", r"did you mean builtin\? All: clipkit models"),
        (
            "ViT-B-32/laion2b_s34b",
            r"has no pretrained tag 'laion2b_s34b'; did you mean ViT-B-32/la",
        ),
        ("ViT-B-32/laion2b_s34b", r"did you mean ViT-B-32/laion2b_s34b_b79k or "),
        ("ViT-B-32", "ViT-B-32 names no weights; did you mean ViT-B-32/openai or"),
        ("ViT-S-32-alt", r"names no weights; did you mean ViT-S-32-alt:FILE\?"),
        ("ViT-B-32:gone.pt", r"there is no file gone\.pt with weights of ViT-B-32"),
        ("/gone/model", "there is no checkpoint at /gone/model"),
        ("runs/gone", "model 'runs/gone' is unknown: use builtin, ARCHITECTURE/TAG"),
    ],
)
def test_a_wrong_name_gets_the_nearest(spec: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        models.check(spec)
    assert models.is_gone(spec) == ("/" in spec)


def test_a_run_is_among_the_nearest(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_checkpoint("vit"), tmp_path / "runs" / "f8k-heads" / "checkpoint")
    monkeypatch.chdir(tmp_path)
    models.check("runs/f8k-heads")
    with pytest.raises(ModelError, match=r"did you mean runs/f8k-heads\?"):
        models.check("runs/f8k-head")


@pytest.mark.parametrize("command", ["search", "eval"])
def test_a_wrong_name_is_refused_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    """Importing torch and OpenCLIP takes six seconds; the refusal must not wait for it."""
    arguments = {
        "search": ["search", "dog", "--index", str(tmp_path)],
        "eval": ["eval", "retrieval", "--data", str(ROOT / "data_prep/gallery/pictures/party")],
    }[command]
    code = (
        "import sys; from app.cli import main\n"
        f"sys.argv = ['clipkit', *{arguments!r}, '--model', 'ViT-B-33/openai']\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    if command == "search":
        from clipkit import Library

        with Library.open(tmp_path) as library:
            library.add(ROOT / "data_prep/gallery/pictures/party")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "False\n", done.stdout + done.stderr
    assert "did you mean ViT-B-32/openai" in done.stderr


# ---- files of weights


@pytest.fixture
def trained(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """trained(kind, suffix=".pt"): a file as open_clip_train writes it, of the architecture "tiny"."""
    import open_clip
    import torch
    from conftest import TINY
    from safetensors.torch import load_file, save_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(kind: str = "vit-quickgelu", suffix: str = ".pt", **more: Any) -> Path:
        configs = {"tiny": TINY[kind]}
        monkeypatch.setattr(models, "architectures", lambda: configs)
        monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)
        state = load_file(tiny_checkpoint(kind) / "open_clip_model.safetensors")
        file = tmp_path / "logs" / "mine" / "checkpoints" / f"epoch_1{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".safetensors":
            save_file(state, file)
        else:
            names = {f"module.{name}": tensor for name, tensor in state.items()}
            content = {"epoch": 1, "name": "mine", "state_dict": names, **more}
            torch.save(content, file)
        return file

    return make


@pytest.mark.parametrize("form", ["tiny:{}", "tiny/{}"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_weights_is_the_model_it_was_saved_from(
    form: str, suffix: str, trained: Callable[..., Path], tiny_checkpoint: Checkpoint
) -> None:
    """The same texts give the same rows as from the folder that the weights are of."""
    spec = form.format(trained(suffix=suffix))
    assert checkpoint.identify(spec) is None  # nothing is converted yet
    encoder = towers.load(spec, device="cpu", precision="float32")
    expected = towers.load(str(tiny_checkpoint("vit-quickgelu")), device="cpu", precision="float32")
    np.testing.assert_array_equal(encoder.encode_texts(TEXTS), expected.encode_texts(TEXTS))
    assert checkpoint.identify(spec) == (
        encoder.encoder_id,
        encoder.space_id,
    )  # known without torch from now on


def test_a_file_is_converted_once_by_content(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved, it is the same model; with other weights another one."""
    file = trained()
    first = towers.load(f"tiny:{file}", device="cpu")
    folders = list((tmp_path / "cache" / "clipkit" / "models").iterdir())
    moved = file.rename(tmp_path / "moved.pt")
    monkeypatch.chdir(tmp_path)
    for spec in (f"tiny:{moved}", "tiny:moved.pt", "tiny/moved.pt", "tiny//moved.pt"):
        assert checkpoint.identify(spec) == (first.encoder_id, first.space_id)
        assert checkpoint.absolute(spec) == f"tiny:{moved}"
    assert list((tmp_path / "cache" / "clipkit" / "models").iterdir()) == folders
    note = json.loads((folders[0] / "clipkit.json").read_text())
    ids = {"encoder_id": first.encoder_id, "space_id": first.space_id}
    assert note == {**ids, "converted_from": str(file)}
    trained("resnet").rename(moved)
    assert checkpoint.identify("tiny:moved.pt") is None
    assert towers.load("tiny:moved.pt", device="cpu").encoder_id != first.encoder_id


class Payload:
    """An object that, unpickled, creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.file,)


def test_a_file_that_would_run_code_is_refused(
    trained: Callable[..., Path], tmp_path: Path
) -> None:
    file = trained(extra=Payload(tmp_path / "ran"))
    with pytest.raises(ModelError, match=r"holds more than tensors.*where you trust it") as caught:
        towers.load(f"tiny:{file}")
    assert not (tmp_path / "ran").exists()
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("tiny-*"))


def test_weights_of_another_architecture_are_refused(trained: Callable[..., Path]) -> None:
    file = trained("vit")
    other = file.with_name("other.pt")
    file.rename(other)
    trained("resnet")
    with pytest.raises(ModelError, match=r"could not be loaded as tiny \(.*name the architecture"):
        towers.load(f"tiny:{other}")
    other.write_bytes(other.read_bytes()[:3000])
    with pytest.raises(ModelError, match="could not be loaded as tiny"):
        towers.load(f"tiny:{other}")


def test_a_file_without_its_architecture_is_told_what_is_missing(
    trained: Callable[..., Path],
) -> None:
    """open_clip_train writes the architecture beside the checkpoints; then it is named."""
    file = trained()
    with pytest.raises(ModelError, match=f"--model ARCHITECTURE:{file}"):
        models.check(str(file))
    (file.parent.parent / "params.txt").write_text("lr: 0.1\nmodel: tiny\nname: mine\n")
    with pytest.raises(ModelError, match=f"--model tiny:{file}"):
        models.check(str(file))
    with pytest.raises(ModelError, match=f"no architecture tinny; did you mean tiny:{file}"):
        models.check(f"tinny:{file}")
