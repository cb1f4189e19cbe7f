"""RISE and the learned mask against exact expectations, closed forms and slow rewrites."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import slow_perturbation
from faithmap import perturb, registry
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.explaining import bind
from faithmap.models import Model
from faithmap.records import canonical_json


def explain(name: str, model: Model, batch: Batch, **params: object) -> torch.Tensor:
    plugin = registry.get("explainer", name)
    return bind(plugin, plugin.check(params))(model, batch)


def inside(name: str) -> Any:
    """The module of a plugin, for the parts that its file keeps to itself."""
    return inspect.getmodule(registry.get("explainer", name).target)


def seeded(name: str, batch: Batch, **params: object) -> Batch:
    """The batch as the explainer sees it, with its own draws."""
    plugin = registry.get("explainer", name)
    return batch.with_seed_key(canonical_json([name, plugin.check(params)]))


def make_small(side: int = 8, seed: int = 0) -> Model:
    """A network that is neither linear nor symmetric, quick enough to enumerate all masks."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, 8), nn.Tanh(), nn.Linear(8, 4))
    nn.init.normal_(module[3].weight, std=2.0)
    return Model(module, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5), input_size=side, name="small")


def some_batch(model: Model, count: int = 2) -> Batch:
    images = torch.rand(count, 3, *model.input_size, generator=torch.Generator().manual_seed(5))
    return Batch(images, torch.arange(count), tuple("abcdef"[:count]), Context(model, images))


def probability_of(model: Model, target: int, dtype: torch.dtype) -> Callable[[np.ndarray], float]:
    def score(image: np.ndarray) -> float:
        with torch.no_grad():
            normalised = model.normalise(torch.from_numpy(image)[None].to(dtype))
            return float(model.module(normalised)[0].double().softmax(0)[target])

    return score


class TestRise:
    def test_tends_to_the_exact_expectation(self) -> None:
        model = make_small()
        batch = some_batch(model, 1)
        score = probability_of(model, 0, torch.float32)
        mean, spread = slow_perturbation.rise_moments(score, batch.images[0].double().numpy(), 2, 0.5)
        for count in (500, 8000):
            maps = explain("rise", model, batch, n_masks=count, cells=2)
            off = (maps[0].double().numpy() - mean) / (spread / count**0.5)
            # The error in standard errors: on 64 pixels that hang together, far from 5 and about 1.
            assert np.abs(off).max() < 4.5
            assert 0.2 < np.sqrt((off**2).mean()) < 2

    def test_keep_is_divided_out(self) -> None:
        model = make_small()
        batch = some_batch(model, 1)
        score = probability_of(model, 0, torch.float32)
        mean, spread = slow_perturbation.rise_moments(score, batch.images[0].double().numpy(), 2, 0.2)
        maps = explain("rise", model, batch, n_masks=4000, cells=2, keep=0.2)
        assert np.abs((maps[0].double().numpy() - mean) / (spread / 4000**0.5)).max() < 4.5

    @pytest.mark.parametrize("size", [(8, 8), (15, 9), (6, 10)])
    def test_masks_are_the_slow_ones(self, size: tuple[int, int]) -> None:
        model = Model(make_small().module, mean=0.5, std=0.5, input_size=size)
        images = torch.zeros(2, 3, *size)
        batch = seeded("rise", Batch(images, torch.zeros(2), ("a", "b"), Context(model, images)), n_masks=6)
        masks = inside("rise").Masks(batch, 6, 4, 0.5)
        made = torch.cat([mask for _, mask in masks.chunks(5)])
        assert made.shape == (12, *size) and masks.owner.tolist() == [0] * 6 + [1] * 6
        offsets = set()
        for i in range(2):
            generator = batch.generator(i)
            cells = (torch.rand(6, 4, 4, generator=generator) < 0.5).double().numpy()
            tall, wide = -(-size[0] // 4), -(-size[1] // 4)
            down = torch.randint(0, tall, (6,), generator=generator).tolist()
            across = torch.randint(0, wide, (6,), generator=generator).tolist()
            offsets |= set(zip(down, across, strict=True))
            for k in range(6):
                expected = slow_perturbation.rise_mask(cells[k], down[k], across[k], *size)
                assert np.abs(made[6 * i + k].numpy() - expected).max() < 1e-5
        assert len(offsets) > 2  # each mask is shifted on its own

    @pytest.mark.parametrize("space", ["pixel", "normalised"])
    def test_equals_the_slow_loop(self, space: str, model: Model, batch: Batch) -> None:
        batch = batch.select([0, 3])
        params = {"n_masks": 9, "cells": 3, "space": space}
        maps = explain("rise", model, batch, **params)
        masks = inside("rise").Masks(seeded("rise", batch, **params), 9, 3, 0.5)
        made = torch.cat([mask for _, mask in masks.chunks(100)]).double().numpy()
        for i in range(2):
            image = batch.images[i].double().numpy()
            colour = 0.5 if space == "normalised" else 0.0
            predict = probability_of(model, int(batch.targets[i]), torch.float32)

            def score(masked: np.ndarray, predict=predict, colour=colour) -> float:  # type: ignore[no-untyped-def]
                return float(predict(masked + colour))

            expected = slow_perturbation.rise(score, image - colour, list(made[9 * i : 9 * i + 9]), 0.5)
            assert np.abs(maps[i].numpy() - expected).max() <= 1e-4 * np.ptp(expected)

    def test_all_classes_come_from_one_pass(self, cnn: Model) -> None:
        batch = some_batch(cnn)
        drawn = seeded("rise", batch, n_masks=20)
        with cnn.counting() as meter:
            everything = inside("rise").saliencies(cnn, drawn, n_masks=20)
        assert everything.shape == (2, cnn.num_classes, *batch.size) and meter.forwards == 40
        maps = explain("rise", cnn, batch, n_masks=20)
        assert torch.allclose(everything[torch.arange(2), batch.targets], maps, atol=1e-6)
        # Probabilities add up to one, so that the classes' maps add up to the mean mask over `keep`.
        masks = torch.cat([mask for _, mask in inside("rise").Masks(drawn, 20, 7, 0.5).chunks(100)])
        mean = masks.view(2, 20, *batch.size).mean(1) / 0.5
        assert torch.allclose(everything.sum(1), mean, atol=1e-5)

    def test_chunks_neither_change_the_map_nor_the_count(
        self, cnn: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch = some_batch(cnn, 3)
        whole = explain("rise", cnn, batch, n_masks=10)
        sizes: list[int] = []
        cnn.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
        monkeypatch.setattr(perturb, "chunk_size", lambda _model, _size: 7)
        with cnn.counting() as meter:
            maps = explain("rise", cnn, batch, n_masks=10)
        assert max(sizes) == 7 and meter.forwards == 30
        assert torch.allclose(maps, whole, atol=1e-5)

    def test_images_have_masks_of_their_own(self, cnn: Model) -> None:
        masks = inside("rise").Masks(some_batch(cnn), 50, 7, 0.5)
        made = torch.cat([mask for _, mask in masks.chunks(100)])
        assert not torch.allclose(made[:50].mean(0), made[50:].mean(0), atol=1e-3)

    def test_defaults_are_published(self) -> None:
        plugin = registry.get("explainer", "rise")
        assert plugin.parameters | {"n_masks": 8000, "cells": 7, "keep": 0.5} == plugin.parameters
        assert (plugin.parameters["score"], plugin.parameters["space"]) == ("probability", "pixel")

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"n_masks": 0}, "got n_masks 0"),
            ({"cells": 0}, "cells >= 1"),
            ({"keep": 1.0}, "0 < keep < 1"),
            ({"score": "logits"}, "unknown score 'logits'; did you mean 'logit'"),
            ({"space": "pixels"}, "unknown space 'pixels'; did you mean 'pixel'"),
        ],
    )
    def test_wrong_parameters_are_refused(self, params: dict[str, object], message: str, cnn: Model) -> None:
        with pytest.raises(RequestError, match=message):
            explain("rise", cnn, some_batch(cnn), **{"n_masks": 4, **params})


class PatchNet(nn.Module):
    """Class 1 is what it says while the upper left quarter is striped; blurring takes stripes away."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        quarter = images[:, :, : images.shape[2] // 2, : images.shape[3] // 2]
        stripes = (quarter[:, :, :, 1:] - quarter[:, :, :, :-1]).abs().mean((1, 2, 3))
        return torch.stack([torch.full_like(stripes, 2.0), 8 * stripes, 0 * stripes], 1)


def make_patch(count: int = 2) -> tuple[Model, Batch]:
    """Striped images whose right answer is the upper left quarter."""
    model = Model(PatchNet(), mean=0.0, std=1.0, input_size=32, target_layer=None, name="patch")
    images = torch.zeros(count, 3, 32, 32)
    images[:, :, :, ::2] = torch.linspace(0.7, 1.0, count).view(-1, 1, 1, 1)
    batch = Batch(
        images, torch.ones(count, dtype=torch.int64), tuple("abcdef"[:count]), Context(model, images)
    )
    return model, batch


class TestMask:
    def test_deletes_what_the_class_needs_and_nothing_else(self) -> None:
        model, batch = make_patch()
        params = {"iterations": 120, "grid": 8, "area": 5e-3}
        maps = explain("mask", model, batch, **params)
        assert maps.shape == (2, 32, 32) and 0 <= float(maps.min()) and float(maps.max()) <= 1
        quarter, rest = maps[:, 2:14, 2:14].mean((1, 2)), maps[:, 18:, 18:].mean((1, 2))
        assert bool((quarter > 0.3).all()) and bool((rest < 0.05).all())
        game = inside("mask").Deletion(model, batch.images, batch.targets)
        with torch.no_grad():
            left, whole = game.probabilities(1 - maps), game.probabilities(torch.ones_like(maps))
        assert bool((left < 0.5 * whole).all())

    @pytest.mark.parametrize("size", [(16, 16), (20, 12)])
    def test_equals_the_slow_descent(self, size: tuple[int, int]) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        )
        nn.init.normal_(module[4].weight, std=3.0)
        model = Model(module.double(), mean=0.5, std=0.25, input_size=size).double()
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)).double()
        targets = torch.tensor([0, 2])
        game = inside("mask").Deletion(model, images, targets)
        shape = (3, 3) if size[0] == size[1] else (5, 3)
        start = torch.rand(2, *shape, generator=torch.Generator().manual_seed(2)).double()
        weights = {"area": 0.02, "variation": 0.3, "power": 3.0}
        still = torch.zeros(4, 2, 2, dtype=torch.int64)
        learned = inside("mask")._learn(game, start, still, 0.1, *weights.values())
        for i in range(2):
            # A Model gives logits in float32, in which differences of 1e-5 are lost.
            probability = probability_of(model, int(targets[i]), torch.float64)

            def loss(low: np.ndarray, i: int = i, probability=probability) -> float:  # type: ignore[no-untyped-def]
                return slow_perturbation.deletion_loss(probability, images[i].numpy(), low, **weights)

            expected = slow_perturbation.adam(
                lambda low, loss=loss: slow_perturbation.slopes(loss, low), start[i].numpy(), 4, 0.1
            )
            assert np.abs(learned[i].numpy() - expected).max() < 2e-3
            assert np.abs(start[i].numpy() - expected).max() > 0.1

    def test_begins_with_the_smallest_disc_that_suffices(self) -> None:
        model, batch = make_patch(1)
        module = inside("mask")
        game = module.Deletion(model, batch.images, batch.targets)
        discs = module._discs((32, 32))
        assert torch.equal(discs[0], torch.ones(32, 32)) and float(discs[-1].max()) < 1e-5
        with torch.no_grad():
            scores = [float(game.probabilities(disc[None])) for disc in discs]
        share = [(score - scores[-1]) / (scores[0] - scores[-1]) for score in scores]
        first = next(k for k, left in enumerate(share) if left < 0.01)
        assert 0 < first < len(discs) - 1
        assert torch.equal(game.first_mask(32)[0], discs[first])

    def test_begins_with_all_deleted_where_blurring_changes_nothing(self) -> None:
        model, batch = make_patch(1)
        game = inside("mask").Deletion(model, torch.full_like(batch.images, 0.5), batch.targets)
        assert float(game.first_mask(8).max()) < 1e-5

    def test_shifts_move_the_image_under_the_mask(self) -> None:
        model, batch = make_patch()
        seen: list[torch.Tensor] = []
        model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        game = inside("mask").Deletion(model, images, batch.targets, jitter=4)
        game.probabilities(torch.ones(2, 32, 32), torch.tensor([[0, 0], [1, -2]]))
        assert torch.equal(seen[0][0], images[0])
        assert torch.equal(seen[0][1, :, :-1, 2:], images[1, :, 1:, :-2])

    def test_images_are_learned_as_if_alone(self) -> None:
        model, batch = make_patch(3)
        together = explain("mask", model, batch, iterations=25, grid=8)
        for i in range(3):
            alone = explain("mask", model, batch.select([i]), iterations=25, grid=8)[0]
            assert torch.allclose(together[i], alone, atol=1e-3)

    def test_defaults_are_published(self) -> None:
        assert registry.get("explainer", "mask").parameters == {
            "iterations": 300, "rate": 0.1, "grid": 28, "area": 1e-4, "variation": 1e-2, "power": 3.0,
            "jitter": 4,
        }  # fmt: skip

    def test_counts_are_as_declared(self, cnn: Model) -> None:
        plugin = registry.get("explainer", "mask")
        with cnn.counting() as meter:
            explain("mask", cnn, some_batch(cnn), iterations=3)
        params = plugin.check({"iterations": 3})
        assert meter.forwards == 2 * plugin.facts.forwards(cnn, params) == 76  # type: ignore[operator]
        assert meter.backwards == 2 * plugin.facts.backwards(cnn, params) == 6  # type: ignore[operator]

    @pytest.mark.parametrize(
        "params",
        [{"iterations": 0}, {"rate": 0.0}, {"grid": 1}, {"area": -1.0}, {"power": 0.5}, {"jitter": 0}],
    )
    def test_wrong_parameters_are_refused(self, params: dict[str, object], cnn: Model) -> None:
        with pytest.raises(RequestError, match="expected iterations and jitter >= 1"):
            explain("mask", cnn, some_batch(cnn), **params)
