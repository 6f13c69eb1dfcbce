"""The dual encoder against OpenCLIP itself, on small random models of every family."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PREPROCESS, TINY, WORDS
from PIL import Image

from clipkit import checkpoint, towers
from clipkit.errors import InputError, ModelError

KINDS = sorted(TINY)
TEXTS = ["a red car", "penguin", "", "a photo of the blue house " * 30]
Checkpoint = Callable[..., Path]
Picture = Callable[..., Image.Image]


def open_clip_reference(folder: Path) -> tuple[torch.nn.Module, object, object]:
    """Model, inference transform and tokenizer as OpenCLIP alone opens the folder."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    overrides = {}
    if "hf_model_name" in config["text_cfg"]:  # OpenCLIP alone would ask the hub for the settings
        overrides = {"text_cfg": {**config["text_cfg"], "hf_model_name": str(folder)}}
        overrides["text_cfg"]["hf_model_pretrained"] = False
    name = f"local-dir:{folder}"
    model = open_clip.create_model(name, require_pretrained=True, **overrides).eval()
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    return model, transform, open_clip.get_tokenizer(name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_equal_open_clips(
    kind: str, precision: towers.Precision, tiny_checkpoint: Checkpoint
) -> None:
    """The shortened context of a causal tower, and dropped padding, leave every embedding as it is.

    On a CPU the text tower computes in float32 whatever the image tower's precision.
    """
    folder = tiny_checkpoint(kind)
    model, _, tokenizer = open_clip_reference(folder)
    with torch.no_grad():
        expected = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()
    actual = towers.load(str(folder), device="cpu", precision=precision).encode_texts(TEXTS)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(96, 64), (64, 97), (31, 300), (500, 400)])
def test_pictures_equal_open_clips(
    kind: str, size: tuple[int, int], tiny_checkpoint: Checkpoint, noise_picture: Picture
) -> None:
    """Same geometry to the pixel; the uint8 resize may differ from PIL's by a rounding step."""
    folder = tiny_checkpoint(kind)
    model, transform, _ = open_clip_reference(folder)
    encoder = towers.load(str(folder))
    picture = noise_picture(*size)

    reference = transform(picture)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.config.mean, encoder.config.std))
    expected_pixels = (reference * std + mean) * 255
    difference = (encoder.preprocess(picture).float() - expected_pixels).abs()
    assert difference.max() <= 2.01
    assert difference.mean() < 0.3

    with torch.no_grad():
        expected = model.encode_image(reference[None], normalize=True).numpy()
    assert float(expected[0] @ encoder.encode_images([picture])[0]) > 0.9995


def test_resizing_without_antialias_would_be_noticed(tiny_checkpoint: Checkpoint) -> None:
    """The bound above is tight: a resize without antialias breaks it on a detailed picture."""
    encoder = towers.load(str(tiny_checkpoint("vit")))
    detailed = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8))
    pixels = torch.from_numpy(np.array(detailed)).permute(2, 0, 1)[None]
    aliased = torch.nn.functional.interpolate(pixels.float(), size=(32, 32), mode="bicubic")
    assert (encoder.preprocess(detailed).float() - aliased[0]).abs().mean() > 10


def test_a_strip_is_not_blown_up(tiny_checkpoint: Checkpoint) -> None:
    """20,000 x 1 pixels, brought to a shorter side of 32, would be 20 million pixels: 61 MB."""
    encoder = towers.load(str(tiny_checkpoint("vit")))
    strip = Image.new("RGB", (20_000, 1), "red")
    strip.paste("blue", (10_000, 0, 20_000, 1))
    pixels = encoder.preprocess(strip)
    assert pixels.shape == (3, 32, 32)
    red, blue = pixels[:, 5, 0].int(), pixels[:, 5, -1].int()
    assert red[0] > 245 and red[2] < 10 and blue[0] < 10 and blue[2] > 245


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_keep_the_identity(
    kind: str, tiny_checkpoint: Checkpoint, noise_picture: Picture, tmp_path: Path
) -> None:
    """Activation, statistics, interpolation, context length and tokenizer survive; OpenCLIP agrees."""
    first = towers.load(str(tiny_checkpoint(kind)), precision="float32")
    first.save(tmp_path / "saved", provenance={"parent": first.encoder_id})
    again = towers.load(str(tmp_path / "saved"), precision="float32")
    assert again.config == first.config
    assert again.encoder_id == first.encoder_id
    assert checkpoint.identify(str(tmp_path / "saved")) == (first.encoder_id, first.space_id)
    picture = noise_picture(70, 50)
    np.testing.assert_array_equal(again.encode_images([picture]), first.encode_images([picture]))
    np.testing.assert_array_equal(again.encode_texts(TEXTS), first.encode_texts(TEXTS))

    model, _, tokenizer = open_clip_reference(tmp_path / "saved")
    with torch.no_grad():
        texts = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()
    np.testing.assert_allclose(first.encode_texts(TEXTS), texts, atol=1e-5)
    assert list(model.visual.preprocess_cfg["mean"]) == list(first.config.mean)
    note = json.loads((tmp_path / "saved" / "clipkit.json").read_text())
    ids = {"encoder_id": first.encoder_id, "space_id": first.space_id}
    assert note == {**ids, "parent": first.encoder_id}


def test_rounded_weights_are_not_saved(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Saved in bfloat16 and widened again, the weights would be another encoder's."""
    rounded = towers.load(str(tiny_checkpoint("vit")), precision="bfloat16")
    with pytest.raises(InputError, match="rounded to bfloat16; load it with precision='float32'"):
        rounded.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_precision_auto_can_be_set_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for forced in ("float32", "bfloat16"):
        monkeypatch.setenv("CLIPKIT_PRECISION", forced)
        assert towers.choose_precision(cpu) == forced
        assert towers.choose_precision(cpu, "float16") == "float16"
    monkeypatch.setenv("CLIPKIT_PRECISION", "int4")
    with pytest.raises(InputError, match="precision 'int4' is unknown"):
        towers.choose_precision(cpu)


def test_activation_is_part_of_the_identity(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The same weights with GELU for QuickGELU are another encoder with other embeddings."""
    shutil.copytree(tiny_checkpoint("vit-quickgelu"), tmp_path / "gelu")
    config_file = tmp_path / "gelu" / "open_clip_config.json"
    config = json.loads(config_file.read_text())
    config["model_cfg"]["quick_gelu"] = False
    config_file.write_text(json.dumps(config))
    quick = towers.load(str(tiny_checkpoint("vit-quickgelu")))
    plain = towers.load(str(tmp_path / "gelu"))
    assert (quick.config.activation, plain.config.activation) == ("quick_gelu", "gelu")
    assert quick.encoder_id != plain.encoder_id
    assert np.abs(quick.encode_texts(["penguin"]) - plain.encode_texts(["penguin"])).max() > 1e-4


@pytest.mark.parametrize(
    "change",
    [{"mean": [0.1] * 3}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}, {"size": 40}],
)
def test_what_a_picture_goes_through_is_part_of_the_identity(
    change: dict[str, object], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint("vit"), tmp_path / "changed")
    config = {"model_cfg": TINY["vit"], "preprocess_cfg": {**PREPROCESS["vit"], **change}}
    (tmp_path / "changed" / "open_clip_config.json").write_text(json.dumps(config))
    changed = checkpoint.identify(str(tmp_path / "changed"))
    assert changed != checkpoint.identify(str(tiny_checkpoint("vit")))


def test_identity_follows_values_not_storage(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Half precision on disk and its float32 copy are one encoder; one changed weight is another."""
    from safetensors.torch import load_file, save_file

    ids = {}
    tensors = load_file(tiny_checkpoint("vit") / "open_clip_model.safetensors")
    half = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    wide = {name: t.float() if t.is_floating_point() else t for name, t in half.items()}
    other = {**wide, "logit_scale": wide["logit_scale"] + 1}
    for name, state in (("half", half), ("wide", wide), ("other", other)):
        shutil.copytree(tiny_checkpoint("vit"), tmp_path / name)
        save_file(state, tmp_path / name / "open_clip_model.safetensors")
        ids[name] = checkpoint.identify(str(tmp_path / name))
    assert ids["half"] == ids["wide"] != ids["other"]
    half_towers = towers.load(str(tmp_path / "half"))
    assert (half_towers.encoder_id, half_towers.space_id) == ids["half"]


@pytest.mark.parametrize("kind", KINDS)
def test_empty_input_and_unit_rows(
    kind: str, tiny_checkpoint: Checkpoint, noise_picture: Picture
) -> None:
    encoder = towers.load(str(tiny_checkpoint(kind)))
    assert encoder.encode_texts([]).shape == encoder.encode_images([]).shape == (0, encoder.dim)
    pictures = [noise_picture(50, 40, seed) for seed in range(3)]
    rows = np.concatenate([encoder.encode_images(pictures), encoder.encode_texts(["penguin", ""])])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_batching_changes_nothing(tiny_checkpoint: Checkpoint, noise_picture: Picture) -> None:
    encoder = towers.load(str(tiny_checkpoint("timm-hf")))
    pictures = [noise_picture(50, 40, seed) for seed in range(5)]
    whole = encoder.encode_images(pictures)
    np.testing.assert_allclose(encoder.encode_images(pictures, batch_size=2), whole, atol=1e-6)
    ready = [encoder.preprocess(p) for p in pictures]
    np.testing.assert_allclose(encoder.encode_images(ready), whole, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_images(torch.stack(ready)), whole, atol=1e-6)
    texts = ["a car", "a photo of the red house", "dog"]
    single = np.concatenate([encoder.encode_texts([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode_texts(texts), single, atol=1e-6)


def test_truncated_text_ends_in_its_end_token(tiny_checkpoint: Checkpoint) -> None:
    """Cut to the context length, the last token is still end-of-text (49407) or [SEP] (3)."""
    import open_clip

    long = "red green blue " * 60
    assert open_clip.get_tokenizer(f"local-dir:{tiny_checkpoint('vit')}")([long])[0, -1] == 49407
    assert open_clip.get_tokenizer(f"local-dir:{tiny_checkpoint('timm-hf')}")([long])[0, -1] == 3
    encoder = towers.load(str(tiny_checkpoint("vit")))
    other_tail = encoder.encode_texts([long + "tree", long + "boat"])
    np.testing.assert_array_equal(other_tail[0], other_tail[1])


def test_siglip_texts_keep_their_full_length(tiny_checkpoint: Checkpoint) -> None:
    """Its text tower is read at the last position, a padding token: cut short, it reads another."""
    encoder = towers.load(str(tiny_checkpoint("siglip")))
    seen = []
    encoder.model.encode_text, original = (
        lambda tokens: seen.append(tokens.shape) or original(tokens),
        encoder.model.encode_text,
    )
    encoder.encode_texts(["a car"])
    assert seen == [(1, 16)]


def test_bfloat16_stays_close(tiny_checkpoint: Checkpoint, noise_picture: Picture) -> None:
    """The stated cosine of bfloat16 weights to float32: above 0.999 even for tiny random towers."""
    pictures = [noise_picture(80, 60, seed) for seed in range(8)]
    for kind in KINDS:
        exact = towers.load(str(tiny_checkpoint(kind)), precision="float32")
        half = towers.load(str(tiny_checkpoint(kind)), precision="bfloat16")
        assert half.encoder_id == exact.encoder_id
        rows = half.encode_images(pictures)
        assert rows.dtype == np.float32
        assert (rows * exact.encode_images(pictures)).sum(axis=1).min() > 0.999
        assert (half.encode_texts(WORDS) * exact.encode_texts(WORDS)).sum(axis=1).min() > 0.999


def test_threads_share_an_encoder(tiny_checkpoint: Checkpoint) -> None:
    """Hugging Face's fast tokenizer alone raises "Already borrowed" here."""
    encoder = towers.load(str(tiny_checkpoint("timm-hf")))
    texts = [" ".join(WORDS[i % 16 :][: 1 + i % 5]) for i in range(200)]
    expected = encoder.encode_texts(texts)
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda text: encoder.encode_texts([text])[0], texts))
    np.testing.assert_allclose(np.stack(rows), expected, atol=1e-6)


def test_a_query_does_not_wait_for_pictures(
    tiny_checkpoint: Checkpoint, noise_picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails for texts and pictures that share a pool: the parts of a batch would come first."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    encoder = towers.load(str(tiny_checkpoint("vit")), device="cpu")
    pixels = torch.stack([encoder.preprocess(noise_picture()) for _ in range(64)])
    held = threading.Event()

    def wait(part: torch.Tensor) -> torch.Tensor:
        assert held.wait(timeout=120)
        return part

    with ThreadPoolExecutor(1) as pool:
        pictures = pool.submit(encoder.spread, wait, pixels)  # 8 parts for 2 threads
        try:
            assert encoder.encode_texts(["a car"]).shape == (1, encoder.dim)
            assert not pictures.done()
        finally:
            held.set()
        assert len(pictures.result()) == 64


def test_loading_is_silent(tiny_checkpoint: Checkpoint, capfd: pytest.CaptureFixture[str]) -> None:
    handlers = list(logging.getLogger().handlers)
    towers.load(str(tiny_checkpoint("timm-hf")))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("ViT-B-33/openai", "did you mean ViT-B-32/openai"),
        ("ViT-B-32/laion2b_s34b_b79k", "use --model builtin, which needs no network"),
        ("hf-hub:nobody/nothing", "use --model builtin, which needs no network"),
        ("nonsense", "model 'nonsense' is unknown: use builtin, ARCHITECTURE/TAG"),
    ],
)
def test_a_wrong_spec_is_one_sentence(spec: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence) as caught:
        towers.load(spec)
    assert "\n" not in str(caught.value)


def test_damaged_folders(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no open_clip_config\.json"):
        towers.load(str(tmp_path))
    shutil.copytree(tiny_checkpoint("vit"), tmp_path / "cut")
    weights = tmp_path / "cut" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="could not be loaded"):
        towers.load(str(tmp_path / "cut"))
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        checkpoint.identify(str(tmp_path / "cut"))
    (tmp_path / "cut" / "open_clip_config.json").write_text("[]")
    with pytest.raises(ModelError, match="not an OpenCLIP config"):
        towers.load(str(tmp_path / "cut"))


def test_settings_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPKIT_PRECISION", raising=False)
    with pytest.raises(InputError, match="precision 'int4' is unknown; use one of auto, float32"):
        towers.choose_precision(torch.device("cpu"), "int4")
    with pytest.raises(InputError, match="device 'toaster' is unknown"):
        towers.choose_device("toaster")
    assert towers.choose_precision(torch.device("mps")) == "float32"


def test_wrong_inputs(tiny_checkpoint: Checkpoint) -> None:
    encoder = towers.load(str(tiny_checkpoint("vit")))
    with pytest.raises(InputError, match="list of texts, got the string 'dog'"):
        encoder.encode_texts("dog")
    with pytest.raises(InputError, match=r"uint8 of shape \(3, 32, 32\), got torch.float32"):
        encoder.encode_images(torch.zeros(1, 3, 32, 32))
