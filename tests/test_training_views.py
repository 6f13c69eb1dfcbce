"""Two views of a picture: the views, the head, SimCLR and BYOL, the sheet that shows them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torchvision.transforms.v2 import functional
from training_runs import metrics, run, weights

from clipkit import towers
from clipkit.errors import InputError
from clipkit.losses import LOSSES
from clipkit.losses.views import cosine_regression, nt_xent
from clipkit.training import TrainConfig, distributed, draw_views
from clipkit.training.augment import CropAndFlip, StrongView
from clipkit.training.data import CaptionedPictures
from clipkit.training.gradient_cache import ChunkedTower, backward
from clipkit.training.inputs import PictureInputs, readable_batch
from clipkit.training.methods.byol import Byol
from clipkit.training.methods.method import Setup
from clipkit.training.methods.views import Perceptron, PictureViews, SimClr
from clipkit.training.registry import ByolOptions, PictureViewOptions
from clipkit.training.towers import TrainableTowers

# ---- the views


def drawn(view: StrongView, picture: Image.Image, rng: np.random.Generator) -> torch.Tensor:
    pixels, numbers = view.draw(picture, rng)
    return view.finish(pixels[None], numbers[None])[0]


@pytest.fixture
def crop(tiny_checkpoint: Callable[..., Path]) -> CropAndFlip:
    encoder = towers.load(str(tiny_checkpoint("vit")), device="cpu", precision="float32")
    return CropAndFlip(encoder, keep=1.0, flip=False)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_view_depends_on_its_generator_alone(
    crop: CropAndFlip, noise_picture: Callable[..., Image.Image]
) -> None:
    """Fails for torchvision's own transforms, which draw from torch's generator."""
    view = StrongView(CropAndFlip(crop.encoder, keep=0.2))
    torch.manual_seed(1)
    first = drawn(view, noise_picture(), rng())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(drawn(view, noise_picture(), rng()), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(drawn(view, noise_picture(), rng(1)), first)
    assert first.dtype == torch.uint8 and first.shape == (3, *crop.encoder.config.image_size)


def test_each_change_can_be_switched_off(
    crop: CropAndFlip, noise_picture: Callable[..., Image.Image]
) -> None:
    picture = noise_picture()
    plain = crop.encoder.preprocess(picture)
    assert torch.equal(drawn(StrongView(crop, jitter=0, grey=0, blur=0), picture, rng()), plain)
    grey = drawn(StrongView(crop, jitter=0, grey=1, blur=0), picture, rng())
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
    blurred = [drawn(StrongView(crop, jitter=0, grey=0, blur=1), picture, rng(s)) for s in range(8)]
    change = np.mean([(view.float() - plain.float()).abs().mean() for view in blurred])
    assert 1 < change < 30  # a sigma of 0.1 alone changes nothing
    jittered = [
        drawn(StrongView(crop, jitter=1, grey=0, blur=0), picture, rng(s)) for s in range(40)
    ]
    unchanged = sum(torch.equal(view, plain) for view in jittered)
    assert 2 <= unchanged <= 15  # 8 of 40 by expectation; SimCLR leaves a fifth as they are


@pytest.mark.parametrize("which", range(4), ids=["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("amount", [-0.4, -0.1, 0.0, 0.3])
def test_colours_are_changed_as_torchvision_does_it(
    crop: CropAndFlip, noise_picture: Callable[..., Image.Image], which: int, amount: float
) -> None:
    """Within rounding, also of grey pixels and of black and white ones."""
    view = torch.from_numpy(np.array(noise_picture())).permute(2, 0, 1).contiguous()
    view[:, :4] = torch.tensor([0, 255, 100, 101])[None, :, None].to(torch.uint8)
    change = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )[which]
    by = amount if which == 3 else 1 + amount
    numbers = np.full((1, 10), -1, np.float32)
    numbers[0, 0], numbers[0, 4 + which], numbers[0, 8:] = which, by, 0
    got = StrongView(crop).finish(view[None], numbers)[0]
    assert (got.int() - change(view, by).int()).abs().max() <= 1


def test_a_view_is_the_same_alone_and_among_others(
    crop: CropAndFlip, noise_picture: Callable[..., Image.Image]
) -> None:
    """Bit for bit: a run that is taken up again makes other blocks of its pictures."""
    view = StrongView(crop, jitter=1.0)
    made = [view.draw(noise_picture(seed=seed), rng(seed)) for seed in range(24)]
    pixels, numbers = torch.stack([v for v, _ in made]), np.stack([n for _, n in made])
    together = view.finish(pixels, numbers)
    for row in range(24):
        assert torch.equal(
            view.finish(pixels[row : row + 1], numbers[row : row + 1])[0], together[row]
        )
    assert torch.equal(pixels, torch.stack([v for v, _ in made]))  # not changed in place


def test_a_blur_by_hand(crop: CropAndFlip) -> None:
    """A white point of sigma 1 becomes the product of two Gaussians: 255 * 0.3989^2 = 40.6 in its place,
    24.6 beside it; an edge is as if it went on."""
    point = torch.zeros((2, 3, 32, 32), dtype=torch.uint8)
    point[0, :, 16, 16] = point[1, :, :, :16] = 255
    numbers = np.zeros((2, 10), np.float32)
    numbers[:, :4], numbers[:, 9] = -1, 1.0
    blurred = StrongView(crop).finish(point, numbers)
    assert blurred[0, 0, 16, 15:18].tolist() == [25, 41, 25] and blurred[0, 0, 15, 15] == 15
    assert blurred[1, 0, 5, [0, 15, 16, 31]].tolist() == [255, 178, 77, 0]
    assert torch.equal(blurred[1, 0, 0], blurred[1, 0, 20])


def test_small_pictures_are_not_blurred_unless_asked(crop: CropAndFlip) -> None:
    """The tiny tower takes 32 pixels."""
    views = {}
    for blur in (-1.0, 0.3):
        method = simclr(blur=blur)
        method.setup.towers.encoder = crop.encoder  # type: ignore[misc]
        views[blur] = method.augment()
    assert isinstance(views[-1.0], StrongView) and isinstance(views[0.3], StrongView)
    assert views[-1.0].blur == 0.0 and views[0.3].blur == 0.3
    assert views[-1.0].crop.keep == 0.2


# ---- the methods


class Towers:
    """A linear image tower, in double precision."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.encoder = SimpleNamespace(dim=4, preferred_batch=3)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = torch.nn.ModuleDict({"visual": torch.nn.Linear(6, 4)}).double()

    def mode(self, training: bool) -> None:
        self.model.train(training)

    def images(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.model["visual"](inputs), dim=1)


def made(kind: type[PictureViews], options: PictureViewOptions, batch: int = 8) -> Any:
    fake: Any = Towers()
    setup = Setup(
        SimpleNamespace(seed=3, crop=0.2, flip=True, chunk=0),  # type: ignore[arg-type]
        LOSSES["ntxent"],
        options,
        {"temperature": 0.5},
        fake,
        None,  # type: ignore[arg-type]
        batch,
        10,
    )
    method = kind(setup)
    method.features = lambda rows: fake.model["visual"](rows)  # type: ignore[method-assign]
    method.projection.double()
    if isinstance(method, Byol):
        method.predictor.double()
    return method


def simclr(batch: int = 8, **options: Any) -> Any:
    return made(SimClr, PictureViewOptions(**options), batch)


def byol(**options: Any) -> Any:
    method = made(Byol, ByolOptions(projection_width=3, **options))
    method.prepare(SimpleNamespace(data=[]), lambda *_: None, threading.Event())
    return method


def turned(method: Any) -> Any:
    """A tower that is no longer the start."""
    method.prepare(None, None, None)
    with torch.no_grad():
        method.setup.towers.model["visual"].bias += 0.5
    return method


METHODS = {
    "simclr": simclr,
    "headless": lambda: simclr(projection_layers=0),
    "kept": lambda: turned(simclr(keep_space=0.5)),
    "byol": byol,
    "simsiam": lambda: byol(momentum=0.0),
}


def two_views(own: slice = slice(None)) -> Any:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 8, 6, generator=generator, dtype=torch.float64)
    plan = SimpleNamespace(pictures=np.arange(8))
    return SimpleNamespace(pictures=[view[own] for view in pixels], plan=plan)


def gradients(name: str, chunk: int) -> dict[str, torch.Tensor]:
    """Of the one batch that all processes share."""
    method = METHODS[name]()
    batch = two_views(distributed.own_slice(8))
    value, _ = backward(
        [
            ChunkedTower(view.encode, view.rows, chunk=chunk, trained=view.side is not None)
            for view in method.views(batch)
        ],
        lambda rows: method.loss(rows, batch),
        gather=distributed.gather,
    )
    tower = dict(method.setup.towers.model.named_parameters())
    distributed.sum_gradients(tower.values(), list(method.shared.values()))
    gradients = {n: p.grad for n, p in {**tower, **method.shared}.items()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"loss": value, **gradients}


@pytest.mark.parametrize("name", METHODS)
def test_chunks_do_not_change_the_gradients(name: str) -> None:
    whole, chunked = gradients(name, 100), gradients(name, 3)
    for key, gradient in whole.items():
        torch.testing.assert_close(chunked[key], gradient, msg=key)
    assert whole["visual.weight"].abs().max() > 0


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({name: gradients(name, 3) for name in METHODS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.end_to_end
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Fails for a BatchNorm that sees only a process's own rows, and for heads whose gradients, which
    are complete, are summed."""
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        for name in METHODS:
            for key, gradient in gradients(name, 100).items():
                torch.testing.assert_close(results[name][key], gradient, msg=f"{name} {key}")


def test_a_head_is_drawn_from_its_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = Perceptron(4, 2, layers=2, hidden=3, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = Perceptron(4, 2, layers=2, hidden=3, seed=7)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [tuple(p.shape) for p in first.parameters()] == [(3, 4), (3,), (3,), (2, 3), (2,)]
    assert not list(first.buffers())  # all state is in parameters, which a run saves
    rows = torch.randn(5, 4)
    assert torch.equal(first.eval()(rows), first.train()(rows))
    assert torch.equal(Perceptron(4, 2, layers=0, hidden=3, seed=7)(rows), rows)


def test_simclr_without_a_head_is_ntxent_of_the_vectors() -> None:
    method, batch = METHODS["headless"](), two_views()
    rows = [view.encode(view.rows) for view in method.views(batch)]
    units = [torch.nn.functional.normalize(view, dim=1) for view in rows]
    torch.testing.assert_close(method.loss(rows, batch), nt_xent(*units, temperature=0.5))
    assert not method.shared


def test_the_targets_of_byol_are_the_momentum_towers() -> None:
    """After a step the tower moves and the target stays behind: with momentum 0.75 at step 10 of 10 the
    mean no longer moves at all (BYOL, section 3.1: m rises to 1)."""
    method, batch = byol(momentum=0.75), two_views()
    online = [view for view in method.views(batch) if view.side == "image"]
    targets = [view for view in method.views(batch) if view.side is None]
    assert len(online) == len(targets) == 2
    weight = method.setup.towers.model["visual"].weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 1
    assert not torch.equal(online[0].encode(online[0].rows), targets[0].encode(targets[0].rows))
    torch.testing.assert_close(
        targets[0].encode(targets[0].rows),
        torch.nn.functional.linear(
            targets[0].rows, before, method.setup.towers.model["visual"].bias
        ),
    )
    method.after_step([], 10)
    saved = method.state_dict()["target"]
    torch.testing.assert_close(saved["visual.weight"], before)
    assert {"projection.0.weight"} < saved.keys()


def test_simsiam_is_byol_whose_target_is_the_tower_itself() -> None:
    method, batch = byol(momentum=0.0), two_views()
    views = method.views(batch)
    assert len(views) == 2 and method.state_dict() == {"variances": []}
    rows = [view.encode(view.rows) for view in views]
    unit = torch.nn.functional.normalize
    z = [unit(method.projection(view), dim=1) for view in rows]
    p = [unit(method.predictor(method.projection(view)), dim=1) for view in rows]
    expected = cosine_regression(p[0], z[1]) + cosine_regression(p[1], z[0])
    torch.testing.assert_close(method.loss(rows, batch), expected)


def test_the_stop_gradient_can_be_switched_off() -> None:
    """Without predictor the two sides are alike: the gradient through the targets doubles it."""
    with_stop = byol(momentum=0.0, predictor=False)
    without = byol(momentum=0.0, predictor=False, stop_gradient=False)
    found = []
    for method in (with_stop, without):
        batch = two_views()
        method.loss([v.encode(v.rows) for v in method.views(batch)], batch).backward()
        found.append(method.setup.towers.model["visual"].weight.grad)
    torch.testing.assert_close(found[1], 2 * found[0])


def test_the_space_is_kept_by_the_distance_to_the_start() -> None:
    """0 at the start; where the tower has turned all vectors round, 4 = 2 - 2 cos 180; weight 0.5."""
    method, batch = simclr(keep_space=0.5), two_views()
    method.prepare(None, None, None)
    tower = method.setup.towers.model["visual"]

    def kept(count: int) -> float:
        rows = [view.encode(view.rows) for view in method.views(batch)][:count]
        return float(method.kept_space(rows, batch).detach())

    assert kept(2) == pytest.approx(0) and simclr().kept_space([torch.ones(8, 4)], batch) == 0
    with torch.no_grad():
        tower.weight.neg_()
        tower.bias.neg_()
    assert kept(2) == kept(1) == pytest.approx(0.5 * 4)


def test_collapsed_projections_get_a_warning() -> None:
    """Eight orthogonal rows have the mean 1/8 of ones, so a variance of 1 - 8/64; equal ones have 0."""
    method = simclr()
    assert method.warning() is None and method.metrics() == {}
    method.unit_rows(2 * torch.eye(8))
    assert method.metrics()["projection_variance"] == pytest.approx(7 / 8)
    assert method.warning() is None
    method.unit_rows(torch.ones(8, 8))
    assert "variance fell from 0.875 to" in (method.warning() or "")
    resumed = byol()
    resumed.load_state_dict({**resumed.state_dict(), **method.state_dict()})
    assert "use predictor, stop_gradient and momentum" in (resumed.warning() or "")


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "byol", "stop_gradient": False}, "momentum is 0.996: a momentum tower gets no"),
        ({"method": "simclr", "momentum": 0.9}, "method simclr has no such option.*byol"),
        (
            {"method": "byol", "temperature": 0.1},
            "no such option; leave it out or use method moco.* or loss ntxent",
        ),
        ({"method": "simclr", "recipe": "heads"}, "recipe heads cannot learn by method simclr"),
        ({"method": "simclr", "text_rate": 2.0}, "method simclr does not use it"),
        ({"method": "simclr", "jitter": 2.0}, "jitter is 2"),
    ],
)
def test_what_a_method_cannot_use_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig.from_mapping({"data": "d", **options})


def test_defaults_fit_the_method() -> None:
    config = TrainConfig.from_mapping({"data": "d", "method": "byol"})
    assert (config.recipe, config.crop, config.keep, config.patience) == ("full", 0.2, "last", 0)
    assert TrainConfig.from_mapping(config.to_mapping()) == config


def test_one_picture_is_no_batch() -> None:
    with pytest.raises(InputError, match="batch is 1; views need others"):
        simclr(batch=1)


# ---- runs


@pytest.mark.end_to_end
@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_a_run_learns_views_and_exports_towers_alone(options: dict[str, Any], method: str) -> None:
    """The head is dropped, and nothing of the text tower is changed."""
    changes = {"learning_rate": 3e-3, "drift": 0.0, "ema": 0.0, "jitter": 0.0, "grey": 0.0}
    summary = run(options, method=method, epochs=15, eval_every=30, crop=0.6, **changes)
    start, result = weights(Path(options["start"])), weights(summary.checkpoint)
    assert result.keys() == start.keys()
    changed = {name for name, tensor in start.items() if not torch.equal(result[name], tensor)}
    assert changed and all(name.startswith("visual.") for name in changed)
    losses = [line["loss"] for line in metrics(summary.folder) if "loss" in line]
    assert len(losses) == 30 and np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    assert summary.before is not None and summary.after is not None
    assert set(summary.before) == {f"view_to_view/R@{k}" for k in (1, 5, 10)}
    assert summary.best_step == 30 and summary.alpha == 1.0  # the last weights, not mixed


@pytest.mark.end_to_end
def test_the_space_is_kept_in_a_run(options: dict[str, Any]) -> None:
    """Farther from the start's vectors without keep_space than with it."""
    moved = {}
    for weight in (0.0, 20.0):
        changes = {"name": f"k{weight}", "learning_rate": 3e-3, "drift": 0.0, "ema": 0.0}
        summary = run(options, method="simclr", epochs=10, keep_space=weight, **changes)
        vectors = []
        for spec in (options["start"], str(summary.checkpoint)):
            encoder = towers.load(str(spec), device="cpu", precision="float32")
            files = sorted((Path(options["data"]) / "validation").glob("*.png"))
            pixels = [encoder.preprocess(Image.open(file).convert("RGB")) for file in files]
            vectors.append(encoder.encode_images(torch.stack(pixels)))
        moved[weight] = float(1 - (vectors[0] * vectors[1]).sum(1).mean())
    assert moved[20.0] < 0.5 * moved[0.0]


# ---- the sheet


def test_the_sheet_shows_the_views_of_the_run(options: dict[str, Any]) -> None:
    """The second column is what the first epoch's first view is in training."""
    config = TrainConfig.from_mapping({**options, "method": "simclr"})
    sheet = draw_views(config, pictures=3, epochs=2)
    assert sheet.size == (5 * 152 + 8, 24 + 3 * 152)
    encoder = towers.load(options["start"], device="cpu", precision="float32")
    data = CaptionedPictures.read(Path(options["data"]), "train", needs=())
    method = SimClr(
        Setup(
            config,
            LOSSES["ntxent"],
            config.method_options(),
            {},
            TrainableTowers(encoder, loss=None),
            data,
            6,
            1,
        )
    )
    inputs = PictureInputs(
        data, method.setup.towers, augment=method.augment(), views=2, seed=config.seed
    )  # type: ignore[arg-type]
    batch = readable_batch(inputs, data.plans(epoch=0, batch=6, seed=config.seed, texts=0)[0])
    for row in range(3):
        top = 24 + row * 152
        shown = np.array(sheet.crop((8 + 152, top, 8 + 152 + 144, top + 144)))
        view = Image.fromarray(batch.pictures[0][torch.tensor([row])][0].permute(1, 2, 0).numpy())
        assert np.array_equal(shown, np.array(view.resize((144, 144), Image.Resampling.NEAREST)))


def test_what_has_no_views_says_so(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="recipe heads trains on features of whole pictures"):
        draw_views(TrainConfig.from_mapping({**options, "recipe": "heads"}))


def test_show_views_writes_a_sheet_and_trains_nothing(
    options: dict[str, Any], clipkit: Callable[..., tuple[int, str, str]]
) -> None:
    out = options["out"]
    code, said, _ = clipkit(
        *("train", options["data"], "--method", "simclr", "--show-views"),
        *("--model", options["start"], "--out", out),
    )
    assert code == 0 and said == f"views: {out / 'views-simclr.png'}\n"
    assert [path.name for path in out.iterdir()] == ["views-simclr.png"]
    with Image.open(out / "views-simclr.png") as sheet:
        assert sheet.size == (7 * 152 + 8, 24 + 8 * 152)
