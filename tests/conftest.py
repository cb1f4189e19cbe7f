"""Small networks and batches that the tests share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from small_runs import lay_out
from torch import nn

import faithmap  # noqa: F401  (mends torchvision's operators before anything imports it)
from faithmap import fitting, registry
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.explaining import bind
from faithmap.models import Model
from faithmap.records import Kind

SIDE = 32
#: The fixture `typed`.
Typed = Callable[..., tuple[int, str]]


class TinyCNN(nn.Module):
    """Two convolutions, a ReLU each, mean pooling and a linear head; features 8x8 at 32 pixels."""

    def __init__(self, classes: int = 5, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.body(self.stem(images))
        logits: torch.Tensor = self.head(features.mean((2, 3)))
        return logits


def make_cnn(classes: int = 5, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(TinyCNN(classes), mean=0.5, std=0.5, input_size=SIDE, name="tiny-cnn")


def make_vit(classes: int = 5, seed: int = 0) -> Model:
    import timm

    torch.manual_seed(seed)
    network = timm.create_model("test_vit", num_classes=classes, img_size=SIDE, patch_size=4)
    # Fresh transformers of timm have nearly constant logits; a larger head makes classes differ.
    nn.init.normal_(network.head.weight, std=0.5)
    return Model(network, mean=0.5, std=0.5, input_size=SIDE, name="tiny-vit")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in double precision, a function of the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_batch(model: Model, count: int = 4, seed: int = 1, grid: tuple[int, int] | None = None) -> Batch:
    """Random images with the predictions as targets, random labels and a mask in the upper left."""
    generator = torch.Generator().manual_seed(seed)
    height, width = model.input_size
    images = torch.rand(count, 3, height, width, generator=generator)
    context = Context(model, images)
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    masks[:, 4:16, 6:20] = True
    return Batch(
        images=images,
        targets=context.logits.argmax(1),
        ids=tuple(f"image-{i}" for i in range(count)),
        context=context,
        labels=torch.randint(0, model.num_classes, (count,), generator=generator),
        masks=masks,
        boxes=[torch.tensor([[6.0, 4.0, 20.0, 16.0]]) for _ in range(count)],
        grid=grid if grid is not None else model.grid,
    )


def explain(name: str, model: Model, batch: Batch, **params: Any) -> torch.Tensor:
    """Maps of an explainer with parameters over its defaults, as the core calls it."""
    plugin = registry.get("explainer", name)
    return bind(plugin, plugin.check(params))(model, batch)


def inside(name: str, kind: Kind = "explainer") -> Any:
    """The module that holds a plugin, for its inner parts."""
    return importlib.import_module(registry.get(kind, name).target.__module__)


def batch_of(model: Model, count: int = 2, seed: int = 3) -> Batch:
    """Seeded images, of the classes 0, 1, ..."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, *model.input_size, generator=generator).to(model.mean.dtype)
    return Batch(images, torch.arange(count), tuple("abcdef"[:count]), Context(model, images))


def make_linear(side: int = 8, classes: int = 4) -> Model:
    """Logits linear in the pixels: every gradient is known."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, classes))
    return Model(module, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5), input_size=side, name="linear")


def pixel_weights(model: Model) -> torch.Tensor:
    """(classes, 3, H, W): gradients of a linear model's logits with respect to pixels."""
    side = model.input_size[0]
    return model.module[1].weight.detach().view(-1, 3, side, side) / model.std


def some_batch(model: Model, count: int = 3) -> Batch:
    """Seeded images of any model, of the classes 0, 1, ..."""
    images = torch.rand(count, 3, *model.input_size, generator=torch.Generator().manual_seed(5))
    return Batch(images, torch.arange(count), tuple("abcdef"[:count]), Context(model, images))


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    """What a run sets for itself must not slow down the tests behind it."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def toy_fitted() -> Iterator[None]:
    """An explainer that must be fitted is known while the tests of a file run."""
    from fits import toy_registered

    with toy_registered():
        yield


@contextmanager
def plugins_restored() -> Iterator[None]:
    """Plugins that are registered within the block are forgotten behind it."""
    for kind in registry.KINDS:
        registry.plugins(kind)  # found before the register is put back, or they are lost
    before = dict(registry._plugins)
    try:
        yield
    finally:
        registry._plugins.clear()
        registry._plugins.update(before)


@pytest.fixture
def own_plugins() -> Iterator[None]:
    """Forget what a test registers."""
    with plugins_restored():
        yield


@pytest.fixture
def typed() -> Typed:
    """Type a command: its exit code and what it printed, to stdout and to stderr."""
    from fits import typed as type_command

    return type_command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_plugins: None) -> Path:
    """A folder with a dataset, a network and a request; what it registers is forgotten again."""
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    registry.load_file(tmp_path / "squares.py")
    return tmp_path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of fits of the test's own."""
    monkeypatch.setenv(fitting.HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def cnn() -> Model:
    return make_cnn()


@pytest.fixture
def vit() -> Model:
    return make_vit()


@pytest.fixture(params=["cnn", "vit"])
def model(request: pytest.FixtureRequest) -> Model:
    return make_cnn() if request.param == "cnn" else make_vit()


@pytest.fixture
def batch(model: Model) -> Batch:
    return make_batch(model)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A file with an image of noise, 80 pixels wide and 60 high."""
    file = tmp_path / "photo.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(file)
    return file
