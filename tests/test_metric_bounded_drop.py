"""Bounded drop and increase: the definition, every sentence of the proof, and what moves them little."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slow_bounded
import slow_metrics as slow
from faithmap.batch import Batch, Scored
from faithmap.errors import RequestError
from faithmap.explaining import MapSet
from faithmap.models import Model
from faithmap.records import Spec
from faithmap.registry import get
from faithmap.scoring import score_maps, use_metric

SIDE = 12
FLOORS = (1e-3, 0.01, 0.05, 0.1, 1.0, 10.0)
#: Probabilities with both ends, and what lies hard by them.
PROBABILITY = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 5e-324, 1e-12, 1 - 2**-53, 0.5])
FLOOR = st.floats(1e-3, 10) | st.sampled_from(FLOORS)
ROUNDING = 1e-12
#: A loaded machine is no fault of an example's.
unhurried = settings(deadline=None)


def score(name: str, model: Model, batch: Batch, maps: Tensor, **params: object) -> dict[str, Scored]:
    plugin = get("metric", name)
    found = plugin.make(plugin.check(params))(model, batch, maps)
    return {key: value if isinstance(value, Scored) else Scored(value) for key, value in found.items()}


def change(clean: float | Tensor, kept: float | Tensor, floor: float) -> Any:
    """G, as the plugin computes it."""
    module = importlib.import_module(get("metric", "bounded-drop").target.__module__)
    tensors = torch.broadcast_tensors(*(torch.as_tensor(p, dtype=torch.float64) for p in (clean, kept)))
    return module.bounded_change(*tensors, floor)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["pixel", "normalised"]), st.sampled_from(FLOORS))
def test_every_score_is_its_definition(seed: int, space: str, floor: float) -> None:
    model = slow.model_of(slow.Glance(seed=seed), SIDE)
    images = slow.random_images(3, SIDE, seed)
    batch = slow.batch_of(model, images, targets=torch.tensor([0, 1, 2]), grid=(3, 3))
    maps = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    found = score("bounded-drop", model, batch, maps, space=space, floor=floor)
    mean = model.mean.flatten() if space == "normalised" else None
    for i in range(3):
        view = slow.drop_view(maps[i])
        assert view is not None
        clean = slow.probability(model, images[i], i)
        kept = slow.probability(model, slow.seen_through(images[i], view, mean), i)
        for name, value in slow_bounded.scores(clean, kept, floor).items():
            assert found[name].values[i].item() == pytest.approx(value, abs=1e-2), name


class TestProof:
    """The sentences of the docstring, one by one."""

    @unhurried
    @given(PROBABILITY, PROBABILITY, FLOOR)
    def test_it_is_the_formula(self, clean: float, kept: float, floor: float) -> None:
        exact = float(slow_bounded.change(clean, kept, floor))
        assert float(change(clean, kept, floor)) == pytest.approx(exact, rel=1e-9, abs=ROUNDING)

    @unhurried
    @given(PROBABILITY, PROBABILITY, FLOOR)
    def test_bounds(self, clean: float, kept: float, floor: float) -> None:
        assert abs(float(change(clean, kept, floor))) <= 1 + ROUNDING
        exact = abs(slow_bounded.change(clean, kept, floor))
        assert exact <= 1
        assert (exact == 1) == ({clean, kept} == {0.0, 1.0})

    @unhurried
    @given(PROBABILITY, PROBABILITY, FLOOR)
    def test_limits_of_an_image(self, clean: float, kept: float, floor: float) -> None:
        exact = slow_bounded.scores(clean, kept, floor)
        assert exact["bounded_drop"] <= exact["bounded_drop_limit"] + ROUNDING
        assert exact["bounded_increase"] <= exact["bounded_increase_limit"] + ROUNDING
        # They are reached where nothing, and where everything, is left.
        assert slow_bounded.scores(clean, 0, floor)["bounded_drop"] == exact["bounded_drop_limit"]
        assert slow_bounded.scores(clean, 1, floor)["bounded_increase"] == exact["bounded_increase_limit"]

    @unhurried
    @given(PROBABILITY, PROBABILITY, PROBABILITY, PROBABILITY, FLOOR)
    def test_slope(
        self, clean: float, kept: float, moved_clean: float, moved_kept: float, floor: float
    ) -> None:
        """Whatever the two probabilities become, the change is at most the slope times the way."""
        before = float(slow_bounded.change(clean, kept, floor))
        after = float(slow_bounded.change(moved_clean, moved_kept, floor))
        way = abs(moved_clean - clean) + abs(moved_kept - kept)
        assert abs(after - before) <= (1 + floor) / floor * way + 1e-9

    def test_the_slope_is_reached(self) -> None:
        step = 1e-9
        steepest = float(change(0.0, step, 0.05)) / step
        assert steepest == pytest.approx(21, rel=1e-6)

    @unhurried
    @given(PROBABILITY, PROBABILITY, FLOOR)
    def test_exchanging_the_two_turns_the_sign(self, clean: float, kept: float, floor: float) -> None:
        assert float(change(clean, kept, floor)) == -float(change(kept, clean, floor))

    @unhurried
    @given(st.lists(st.tuples(PROBABILITY, PROBABILITY), min_size=1, max_size=8), FLOOR)
    def test_means_add_up_to_100_at_most(self, pairs: list[tuple[float, float]], floor: float) -> None:
        found = [slow_bounded.scores(*pair, floor) for pair in pairs]
        drop, gain = (sum(s[name] for s in found) for name in ("bounded_drop", "bounded_increase"))
        assert drop + gain <= 100 * len(pairs) + ROUNDING
        assert all(min(s["bounded_drop"], s["bounded_increase"]) == 0 for s in found)

    @unhurried
    @given(st.floats(0.01, 1), PROBABILITY)
    def test_between_the_average_drop_and_the_difference(self, clean: float, kept: float) -> None:
        dropped = max(0.0, clean - kept) / clean
        assert max(0.0, -float(change(clean, kept, 1e-9))) == pytest.approx(dropped, abs=1e-6)
        assert float(change(clean, kept, 1e9)) == pytest.approx(kept - clean, abs=1e-6)

    def test_a_million_pairs(self) -> None:
        generator = torch.Generator().manual_seed(0)
        # Half of the probabilities hard by the ends.
        uniform = torch.rand(2, 1_000_000, generator=generator, dtype=torch.float64)
        ends = torch.sigmoid(40 * uniform - 20)
        clean, kept = torch.where(torch.rand(2, 1_000_000, generator=generator) < 0.5, uniform, ends)
        for floor in FLOORS:
            found = change(clean, kept, floor)
            assert float(found.abs().max()) <= 1 + ROUNDING
            assert bool((found <= (1 - clean) + ROUNDING).all())
            assert bool((-found <= (1 + floor) * clean / (clean + floor) + ROUNDING).all())


class Swinging(nn.Module):
    """Nearly sure of the first class whatever the image; `swing` moves its logit by a little."""

    def __init__(self, swing: float, bias: float) -> None:
        super().__init__()
        self.swing, self.bias = swing, bias

    def forward(self, images: Tensor) -> Tensor:
        waves = torch.sin(1e4 * images.mean((1, 2, 3)))
        return torch.stack([self.bias + self.swing * waves, torch.zeros_like(waves)], 1)


def test_fluctuations_move_them_little() -> None:
    """A score that trembles by a thousandth of its logit: what each number makes of nothing."""
    images = slow.random_images(64, SIDE)
    maps = 1 - 0.1 * torch.rand(64, SIDE, SIDE)
    found = {}
    for bias in (-7.0, 7.0):
        model = slow.model_of(Swinging(0.1, bias), SIDE)
        batch = slow.batch_of(model, images, targets=torch.zeros(64, dtype=torch.long))
        scored = score("bounded-drop", model, batch, maps) | score("drop", model, batch, maps, margin=0.0)
        found[bias] = {name: float(values.values.nanmean()) for name, values in scored.items()}
    # An unlikely class: one in a thousand, moved by a tenth of that.
    assert found[-7.0]["average_drop"] > 20 * found[-7.0]["bounded_drop"]
    # A sure one: there is hardly any room, and every tremble is a gain.
    assert found[7.0]["average_gain"] > 20 * found[7.0]["bounded_increase"]
    for bias in found:
        assert found[bias]["increase"] > 25
        assert found[bias]["bounded_increase"] < 0.25
        assert found[bias]["bounded_drop"] < 0.25


def test_a_model_of_one_class_has_nothing_to_win_and_nothing_to_lose() -> None:
    class Sure(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((1, 2, 3)).unsqueeze(1)

    model = slow.model_of(Sure(), SIDE)
    found = score(
        "bounded-drop", model, slow.batch_of(model, slow.random_images(2, SIDE)), torch.rand(2, 12, 12)
    )
    assert found["bounded_drop"].values.tolist() == found["bounded_increase"].values.tolist() == [0, 0]
    assert found["bounded_drop_limit"].values.tolist() == pytest.approx([100, 100])
    assert found["bounded_increase_limit"].values.tolist() == [0, 0]


def test_the_limits_need_no_map(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(3, 32), grid=(8, 8))
    maps = torch.randn(3, 32, 32)
    maps[1] = -maps[1].abs() - 0.1
    found = score("bounded-drop", cnn, batch, maps)
    for name in ("bounded_drop", "bounded_increase"):
        assert list(found[name].empty) == [1]
        assert found[name].values[1].isnan()
    for name in ("bounded_drop_limit", "bounded_increase_limit"):
        assert found[name].values.isfinite().all()
    failed = MapSet(maps, ["failed"] * 3, ["broken"] * 3)
    verdicts = {v.metric: v for v in score_maps(use_metric(Spec("bounded-drop")), cnn, batch, failed)}
    assert set(verdicts["bounded_drop"].status) == {"failed"}
    assert set(verdicts["bounded_drop_limit"].status) == {"ok"}


def test_one_forward_an_image_and_no_graph(model: Model) -> None:
    batch = slow.batch_of(model, slow.random_images(3, 32), grid=(8, 8))
    _ = batch.logits
    with model.counting() as meter:
        found = score("bounded-drop", model, batch, torch.randn(3, 32, 32))
    assert (meter.forwards, meter.backwards) == (3, 0)
    assert not any(scored.values.requires_grad for scored in found.values())


@pytest.mark.parametrize(
    ("floor", "words"),
    [
        (0.0, "got 0.0; expected a positive number"),
        (-0.1, "got -0.1; expected a positive number"),
        (float("inf"), "got inf; expected a positive number"),
        (float("nan"), "got nan, which is no number"),
    ],
)
def test_a_floor_is_a_positive_number(cnn: Model, floor: float, words: str) -> None:
    batch = slow.batch_of(cnn, slow.random_images(1, 32))
    with pytest.raises(RequestError, match=f"parameter 'floor': {words}"):
        score("bounded-drop", cnn, batch, torch.rand(1, 32, 32), floor=floor)


def test_an_unknown_space_suggests_the_nearest(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(1, 32))
    with pytest.raises(RequestError, match="did you mean 'normalised'"):
        score("bounded-drop", cnn, batch, torch.rand(1, 32, 32), space="normalized")
