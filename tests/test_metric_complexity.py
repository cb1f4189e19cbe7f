"""Gini index, entropy and effective area against their definitions and in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slow_metrics as slow
import slow_metrics_form as form
from faithmap.batch import Batch, Scored
from faithmap.errors import RequestError
from faithmap.explaining import MapSet
from faithmap.records import Spec
from faithmap.registry import default_metrics, get
from faithmap.scoring import score_maps, use_metric

SIDE = 8
NAMES = ("gini", "entropy", "effective_area")


@pytest.fixture(scope="module")
def batch() -> Batch:
    model = slow.model_of(slow.Glance(), SIDE)
    return slow.batch_of(model, slow.random_images(4, SIDE))


def score(batch: Batch, maps: Tensor, **params: object) -> dict[str, Scored]:
    plugin = get("metric", "complexity")
    found: dict[str, Scored] = plugin.make(plugin.check(params))(batch.context.model, batch, maps)
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["absolute", "positive"]), st.booleans())
def test_every_score_is_its_definition(batch: Batch, seed: int, part: str, tied: bool) -> None:
    maps = torch.randn(4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    maps = maps.round() if tied else maps
    found = score(batch, maps, part=part)
    for i in range(4):
        values = maps[i].double().flatten().tolist()
        amounts = [abs(v) if part == "absolute" else max(0.0, v) for v in values]
        for name in NAMES:
            expected = 100 * getattr(form, name)(amounts)
            assert found[name].values[i].item() == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize("lit", [1, 7, 32, 64])
def test_a_map_of_one_value_on_some_pixels_in_closed_form(batch: Batch, lit: int) -> None:
    maps = torch.zeros(4, SIDE * SIDE)
    maps[:, torch.randperm(SIDE * SIDE)[:lit]] = torch.tensor([[1.0], [0.25], [-3.0], [1e-30]])
    found, share = score(batch, maps.view(4, SIDE, SIDE)), lit / SIDE**2
    assert found["effective_area"].values.tolist() == pytest.approx([100 * share] * 4)
    assert found["gini"].values.tolist() == pytest.approx([100 * (1 - share)] * 4)
    assert found["entropy"].values.tolist() == pytest.approx([100 * math.log(lit) / math.log(SIDE**2)] * 4)


def test_a_ramp_has_a_gini_index_of_a_third(batch: Batch) -> None:
    """Amounts 1, 2, ..., N: (N - 1) / (3 N)."""
    ramp = torch.arange(1, SIDE * SIDE + 1).float().view(1, SIDE, SIDE).expand(4, -1, -1)
    assert score(batch, ramp)["gini"].values.tolist() == pytest.approx([100 * (64 - 1) / (3 * 64)] * 4)


def test_neither_scale_nor_place_matters(batch: Batch) -> None:
    maps = torch.randn(4, SIDE, SIDE)
    order = torch.randperm(SIDE * SIDE)
    moved = maps.flatten(1)[:, order].view_as(maps)
    first = score(batch, maps)
    for other in (maps * 1e-30, maps * -1e30, moved):
        for name, scored in score(batch, other).items():
            assert torch.allclose(scored.values, first[name].values, rtol=1e-5)


def test_maps_without_positive_values_are_empty_where_only_these_count(batch: Batch) -> None:
    maps = torch.randn(4, SIDE, SIDE)
    maps[2] = -maps[2].abs()
    assert all(scored.values.isfinite().all() for scored in score(batch, maps).values())
    for scored in score(batch, maps, part="positive").values():
        assert list(scored.empty) == [2]
        assert scored.values.isnan().tolist() == [False, False, True, False]
    use = use_metric(Spec("complexity", {"part": "positive"}))
    found = score_maps(use, batch.context.model, batch, MapSet(maps, ["ok"] * 4, [""] * 4))
    assert {verdict.status[2] for verdict in found} == {"empty"}


def test_directions_are_the_papers_and_the_area_has_none() -> None:
    assert get("metric", "complexity").facts.scores == {
        "gini": "higher",
        "entropy": "lower",
        "effective_area": "none",
    }
    assert "complexity" not in {plugin.name for plugin in default_metrics()}


def test_no_pass_is_made(batch: Batch) -> None:
    with batch.context.model.counting() as meter:
        score(batch, torch.rand(4, SIDE, SIDE))
    assert meter.forwards == 0


def test_an_unknown_part_is_refused(batch: Batch) -> None:
    with pytest.raises(RequestError, match="parameter 'part': got 'abs'; known are: absolute, positive"):
        score(batch, torch.rand(4, SIDE, SIDE), part="abs")
