"""The controls and the nulls: their shapes, their seeds, and that they look at nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import explain

import slow_explainers
from faithmap import registry
from faithmap.batch import Batch
from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.resize import reduce_to_grid


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("centre", "control"), ("edges", "control"), ("oracle", "control"), ("fake-cam", "control"),
        ("random", "null"), ("random-grid", "null"),
    ],
)  # fmt: skip
def test_roles(name: str, role: str) -> None:
    facts = registry.get("explainer", name).facts
    assert (facts.role, facts.class_specific, facts.forwards, facts.backwards) == (role, False, 0, 0)


class TestCentre:
    def test_is_a_gaussian_of_a_fifth_of_the_side(self, cnn: Model, batch: Batch) -> None:
        maps = explain("centre", cnn, batch)
        pixel = maps[0, 15, 15 + 6].item()
        distance = (0.5**2 + 5.5**2) ** 0.5 / 32
        assert pixel == pytest.approx(float(np.exp(-(distance**2) / (2 * 0.2**2))))
        assert torch.equal(maps[0], maps[0].flip(0)) and torch.equal(maps[0], maps[0].T)

    def test_sigma_must_be_positive(self, cnn: Model, batch: Batch) -> None:
        with pytest.raises(RequestError, match=r"sigma: got 0\.0"):
            explain("centre", cnn, batch, sigma=0.0)


class TestEdges:
    def test_unblurred_equals_the_slow_sobel(self, cnn: Model, batch: Batch) -> None:
        maps = explain("edges", cnn, batch, blur=0.0)
        expected = slow_explainers.sobel(batch.images[1].double().numpy())
        assert maps[1].numpy() == pytest.approx(expected, abs=1e-6)

    def test_a_plain_image_has_none(self, cnn: Model, batch: Batch) -> None:
        plain = replace(batch, images=torch.full_like(batch.images, 0.3))
        assert float(explain("edges", cnn, plain).abs().max()) < 1e-6

    def test_blur_of_a_cell_follows_the_grid(self, cnn: Model, batch: Batch) -> None:
        step = torch.zeros_like(batch.images)
        step[..., 16:] = 1
        for grid, cell in (((8, 8), 4), ((4, 4), 8)):
            profile = explain("edges", cnn, replace(batch, images=step, grid=grid))[0, 16]
            x = torch.arange(32.0)
            mean = float((profile * x).sum() / profile.sum())
            spread = float((profile * (x - mean) ** 2).sum() / profile.sum()) ** 0.5
            assert mean == pytest.approx(15.5, abs=0.1)
            assert spread == pytest.approx(cell, rel=0.15)

    def test_takes_the_models_grid_where_the_run_has_none(self, cnn: Model, batch: Batch) -> None:
        native = explain("edges", cnn, replace(batch, grid=None))
        assert torch.equal(native, explain("edges", cnn, replace(batch, grid=cnn.grid)))


class TestOracle:
    def test_is_the_mask(self, cnn: Model, batch: Batch) -> None:
        assert batch.masks is not None
        assert torch.equal(explain("oracle", cnn, batch), batch.masks.float())

    def test_else_the_union_of_the_boxes(self, cnn: Model, batch: Batch) -> None:
        boxes = [torch.tensor([[0.0, 0.0, 4.0, 2.0], [10.0, 8.0, 12.0, 32.0]]) for _ in range(len(batch))]
        maps = explain("oracle", cnn, replace(batch, masks=None, boxes=boxes, cache={}))
        assert float(maps[0].sum()) == 4 * 2 + 2 * 24
        assert bool((maps[0, :2, :4] == 1).all()) and bool((maps[0, 8:, 10:12] == 1).all())

    def test_needs_either(self, cnn: Model, batch: Batch) -> None:
        assert registry.get("explainer", "oracle").facts.needs == {"region"}
        with pytest.raises(RequestError, match="neither masks nor boxes"):
            explain("oracle", cnn, replace(batch, masks=None, boxes=None))


def test_fake_cam_has_a_single_zero(cnn: Model, batch: Batch) -> None:
    maps = explain("fake-cam", cnn, batch)
    assert float(maps[0, 0, 0]) == 0
    assert float(maps[0].sum()) == 32 * 32 - 1
    assert float(reduce_to_grid(maps, cnn.grid).amin()) < 1  # still a map on the run's grid


class TestNulls:
    @pytest.mark.parametrize("name", ["random", "random-grid"])
    def test_seeded_by_run_image_and_draw(self, name: str, cnn: Model, batch: Batch) -> None:
        maps = explain(name, cnn, batch)
        assert torch.equal(maps, explain(name, cnn, batch))
        assert torch.equal(maps[2:], explain(name, cnn, batch.select([2, 3])))
        others = [
            explain(name, cnn, batch, draw=1),
            explain(name, cnn, replace(batch, seed=1)),
            explain(name, cnn, replace(batch, ids=("e", "f", "g", "h"))),
            maps.roll(1, 0),
        ]
        for other in others:
            assert not torch.isclose(maps, other).all(2).all(1).any()

    def test_pixels_are_uniform(self, cnn: Model, batch: Batch) -> None:
        maps = explain("random", cnn, batch)
        assert maps.shape == (4, 32, 32)
        assert float(maps.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(maps.std()) == pytest.approx(12**-0.5, abs=0.02)

    def test_cells_follow_the_runs_grid(self, cnn: Model, batch: Batch) -> None:
        assert explain("random-grid", cnn, replace(batch, grid=(5, 3))).shape == (4, 5, 3)
        assert explain("random-grid", cnn, replace(batch, grid=None)).shape == (4, *cnn.grid)

    def test_cells_are_not_shrunken_pixels(self, cnn: Model, batch: Batch) -> None:
        pixels = reduce_to_grid(explain("random", cnn, batch), cnn.grid)
        cells = explain("random-grid", cnn, batch)
        assert float(cells.std()) > 3 * float(pixels.std())
