"""The embedded models: what ships is what the cards say."""

from __future__ import annotations

import copy
import importlib
import pickle
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from faithmap import zoo
from faithmap.errors import RequestError

shapes = importlib.import_module("faithmap.datasets.shapes")
#: Reached by each on 2048 held-out images, in percent.
FLOORS = {"resnet": 95.0, "vit": 95.0, "convnext": 95.0}


@lru_cache(maxsize=1)
def test_images() -> Any:
    return shapes.render(range(512))


test_images.__test__ = False  # type: ignore[attr-defined]


@lru_cache(maxsize=3)
def loaded(name: str) -> nn.Module:
    return zoo.load(name)


def scaled(images: Any) -> torch.Tensor:
    return torch.from_numpy(images).float().div(127.5).sub(1)


@pytest.mark.parametrize("name", zoo.NAMES)
@torch.inference_mode()
def test_accuracy_is_that_of_the_card(name: str) -> None:
    card = zoo.card(name)
    rendered = test_images()
    labels = torch.from_numpy(rendered.labels)
    predicted = torch.cat([loaded(name)(part).argmax(1) for part in scaled(rendered.images).split(64)])
    accuracy = 100 * (predicted == labels).float().mean().item()
    assert accuracy == pytest.approx(card["accuracy_test_512"], abs=1)
    assert card["accuracy_test_2048"] >= FLOORS[name]
    assert accuracy >= FLOORS[name] - 1.5
    # No class is left behind.
    assert (
        min((predicted[labels == label] == label).float().mean() for label in range(8))
        > FLOORS[name] / 100 - 0.15
    )


@pytest.mark.parametrize("name", zoo.NAMES)
def test_weights_are_small_and_in_half_precision(name: str) -> None:
    from safetensors.torch import load_file

    with zoo.weights_path(name) as path:
        assert path.stat().st_size < 1_000_000
        stored = load_file(path)
    assert {value.dtype for value in stored.values()} <= {torch.float16, torch.int64}
    model = loaded(name)
    assert not model.training
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert sum(value.numel() for value in model.parameters()) == zoo.card(name)["parameters"]


@pytest.mark.parametrize("name", zoo.NAMES)
@torch.inference_mode()
def test_features_lie_on_a_grid_of_12_by_12(name: str) -> None:
    model: Any = loaded(name)
    images = scaled(test_images().images[:2])
    last = model.forward_intermediates(images, indices=1, intermediates_only=True)[-1]
    assert last.shape[-2:] == (12, 12)
    assert last.shape[1] == model.num_features
    assert zoo.card(name)["feature_grid"] == [12, 12]
    assert torch.allclose(model.forward_head(model.forward_features(images)), model(images), atol=1e-5)


@torch.inference_mode()
def test_the_vit_is_a_plain_transformer_after_its_stem() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model: Any = loaded("vit")
    assert isinstance(model, VisionTransformer)
    assert len(model.blocks) == 4
    assert model.patch_embed.grid_size == (12, 12)
    assert model.num_prefix_tokens == 1
    assert model.forward_features(torch.zeros(1, 3, 96, 96)).shape == (1, 145, 64)
    assert "stem" in zoo.card("vit")["kwargs"]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_other_sizes_of_image_pass(name: str) -> None:
    with torch.inference_mode():
        assert loaded(name)(torch.zeros(1, 3, 192, 192)).shape == (1, 8)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_models_can_be_copied_and_sent(name: str) -> None:
    images = scaled(test_images().images[:2])
    with torch.inference_mode():
        wanted = loaded(name)(images)
        for twin in (copy.deepcopy(loaded(name)), pickle.loads(pickle.dumps(loaded(name)))):
            assert torch.allclose(twin(images), wanted, atol=1e-5)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_cards_tell_how_the_models_came_about(name: str) -> None:
    card = zoo.card(name)
    assert card["classes"] == list(zoo.CLASSES) == list(shapes.CLASSES)
    assert card["mean"] == card["std"] == [0.5, 0.5, 0.5]
    assert card["input_size"] == 96
    assert card["command"].startswith(f"python -m faithmap.zoo.train {name} ")
    for fact in ("method", "seed", "epochs", "training_images", "seconds", "versions", "license"):
        assert fact in card
    architecture, changes = zoo.ARCHITECTURES[name]
    assert card["architecture"] == f"timm {architecture}"
    for key, value in changes.items():
        assert card["kwargs"][key] == (list(value) if isinstance(value, tuple) else value)
    model = zoo.build(name)
    assert model.training
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in loaded(name).state_dict().items()
    }


def test_an_unknown_model_is_named() -> None:
    for reach in (zoo.build, zoo.card, zoo.load):
        with pytest.raises(RequestError, match="did you mean 'resnet'"):
            reach("resnt")


def test_augmentation_and_auxiliary_loss() -> None:
    train = importlib.import_module("faithmap.zoo.train")
    images, labels, shares = train.rendered("train", 8)
    assert images.dtype == torch.uint8
    assert shares.shape == (8, 12, 12)
    assert labels.tolist() == list(range(8))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        turned, moved = train.augmented(images, shares, generator)
        assert torch.allclose(turned.float().mean((1, 2, 3)), images.float().mean((1, 2, 3)))
        assert torch.allclose(moved.sum((1, 2)), shares.sum((1, 2)))
    scores = torch.zeros(8, 144, 9)
    assert train.where_loss(scores, labels, shares).item() == pytest.approx(float(torch.tensor(9.0).log()))
    perfect = torch.full((8, 144, 9), -50.0)
    perfect[:, :, -1] = 50
    assert train.where_loss(perfect, labels, torch.zeros(8, 12, 12)).item() == pytest.approx(0, abs=1e-6)
