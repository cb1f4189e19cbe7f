"""Our numbers beside those of other libraries, on the same maps and images."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slow_metrics as slow
from faithmap.batch import Batch, Scored
from faithmap.models import Model
from faithmap.registry import get

pytestmark = pytest.mark.races

COUNT, SIDE = 6, 32


class Given:
    """Maps that are there already, in the shape of one of torchcam's extractors."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(
        self, class_idx: Any = None, scores: Any = None, normalized: bool = True, **_: Any
    ) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, maps: list[Tensor]) -> Tensor:
        return maps[0]

    def _hooks_off(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@pytest.fixture
def torchcam() -> Any:
    return pytest.importorskip("torchcam.metrics")


def distinct_maps(count: int, side: int) -> Tensor:
    """Maps in [0, 1] without a tie."""
    generator = torch.Generator().manual_seed(4)
    orders = torch.stack([torch.randperm(side * side, generator=generator) for _ in range(count)])
    return orders.view(count, side, side) / (side * side - 1)


def values(name: str, model: Model, batch: Batch, maps: Tensor, **params: object) -> dict[str, Tensor]:
    plugin = get("metric", name)
    found = plugin.make(plugin.check(params))(model, batch, maps)
    return {key: scored.values if isinstance(scored, Scored) else scored for key, scored in found.items()}


@pytest.mark.parametrize("steps", [16, 32])
def test_deletion_and_insertion_of_torchcam(torchcam: Any, model: Model, steps: int) -> None:
    """AUC-D of the probability curve is torchcam's insertion less its deletion, in percent."""
    batch = slow.batch_of(model, slow.random_images(COUNT, SIDE), grid=(8, 8))
    maps = distinct_maps(COUNT, SIDE)
    race = torchcam.DeletionInsertionMetric(
        Given(model, maps), functools.partial(torch.softmax, dim=-1), steps=steps, batch_size=8
    )
    race.update(batch.images, class_idx=batch.targets.tolist())
    theirs = race.summary()
    ours = values("perturbation", model, batch, maps, span=1.0, steps=steps)
    deletion, insertion = 100 * theirs["deletion_auc"], 100 * theirs["insertion_auc"]
    # 1e-5 of the probability's full scale is 1e-3 percent.
    assert ours["pos_auc@probability"].mean().item() == pytest.approx(deletion, abs=1e-3)
    assert ours["neg_auc@probability"].mean().item() == pytest.approx(insertion, abs=1e-3)
    assert ours["auc_d@probability"].mean().item() == pytest.approx(insertion - deletion, abs=1e-3)


def test_drop_and_increase_of_torchcam(torchcam: Any, model: Model) -> None:
    batch = slow.batch_of(model, slow.random_images(COUNT, SIDE), grid=(8, 8))
    maps = distinct_maps(COUNT, SIDE)
    race = torchcam.ClassificationMetric(Given(model, maps), functools.partial(torch.softmax, dim=-1))
    race.update(batch.images, class_idx=batch.targets.tolist())
    theirs = race.summary()
    ours = values("drop", model, batch, maps, margin=0.0)
    assert ours["average_drop"].mean().item() == pytest.approx(100 * theirs["avg_drop"], abs=1e-3)
    assert ours["increase"].mean().item() == pytest.approx(100 * theirs["conf_increase"], abs=1e-3)
