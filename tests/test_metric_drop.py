"""Drop, increase and their kin against their definitions, and what they reward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slow_metrics as slow
from faithmap.batch import Batch, Scored
from faithmap.errors import RequestError
from faithmap.explaining import MapSet
from faithmap.models import Model
from faithmap.records import Spec
from faithmap.registry import get
from faithmap.scoring import score_maps, use_metric

SIDE = 12


def score(model: Model, batch: Batch, maps: Tensor, **params: object) -> dict[str, Scored]:
    plugin = get("metric", "drop")
    found = plugin.make(plugin.check(params))(model, batch, maps)
    return {name: value if isinstance(value, Scored) else Scored(value) for name, value in found.items()}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from(["pixel", "normalised"]),
    st.sampled_from(["soft", "half"]),
    st.booleans(),
)
def test_every_score_is_its_definition(seed: int, space: str, mute: str, tied: bool) -> None:
    model = slow.model_of(slow.Glance(seed=seed), SIDE)
    images = slow.random_images(3, SIDE, seed)
    batch = slow.batch_of(model, images, targets=torch.tensor([0, 1, 2]), grid=(3, 3))
    maps = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    maps = maps.round() if tied else maps
    found, ties = score(model, batch, maps, space=space, mute=mute), batch.ties()
    mean = model.mean.flatten() if space == "normalised" else None
    for i in range(3):
        view, equal = slow.drop_view(maps[i]), slow.equalised_view(maps[i], ties[i])
        assert view is not None
        if mute == "half":
            view, equal = slow.half_muted(view, maps[i], ties[i]), slow.half_muted(equal, maps[i], ties[i])
        clean = slow.probability(model, images[i], i)
        kept = slow.probability(model, slow.seen_through(images[i], view, mean), i)
        level = slow.probability(model, slow.seen_through(images[i], equal, mean), i)
        expected = slow.drop_scores(clean, kept, 1e-3) | {"area": 100 * view.mean()}
        ranked = slow.drop_scores(clean, level, 1e-3)
        expected |= {"drop_equalised": ranked["average_drop"], "increase_equalised": ranked["increase"]}
        for name, value in expected.items():
            assert found[name].values[i].item() == pytest.approx(value, abs=1e-2, nan_ok=True), name
        no_gain = expected["increase"] == 0
        assert found["scan_inc"].reasons[i] == ("no gain" if no_gain else "")


def test_scores_of_logits_are_those_of_the_code_read() -> None:
    model = slow.model_of(slow.Glance(), SIDE)
    images = slow.random_images(4, SIDE)
    logits = model(images)
    targets = torch.stack([row.argmax() if i < 3 else row.argmin() for i, row in enumerate(logits)])
    batch = slow.batch_of(model, images, targets=targets, grid=(3, 3))
    maps = torch.rand(4, SIDE, SIDE)
    found = score(model, batch, maps, score="logit", space="normalised", margin=0.0)
    for i in range(4):
        view = slow.drop_view(maps[i])
        assert view is not None
        clean = float(logits[i, targets[i]])
        kept = float(model(slow.seen_through(images[i], view, model.mean.flatten())[None])[0, targets[i]])
        assert found["increase"].values[i].item() == (0.0 if clean > kept else 100.0)
        if clean > 0:
            expected = 100 * max(0.0, clean - kept) / clean
            assert found["average_drop"].values[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-3)
        else:
            assert found["average_drop"].values[i].isnan()
            assert found["average_drop"].reasons[i] == "the clean logit is not positive"
    for name in ("average_gain", "scan_inc"):
        assert found[name].values.isnan().all()
        assert set(found[name].reasons) == {"defined for probabilities"}


class Constant(torch.nn.Module):
    """The same logits whatever the image."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([2.0, 1.0]).repeat(len(images), 1)


def test_ties_count_as_increases_for_logits_only() -> None:
    model = slow.model_of(Constant(), SIDE)
    batch, maps = slow.batch_of(model, slow.random_images(2, SIDE)), torch.rand(2, SIDE, SIDE)
    assert score(model, batch, maps, margin=0.0)["increase"].values.tolist() == [0, 0]
    assert score(model, batch, maps, margin=0.0, score="logit")["increase"].values.tolist() == [100, 100]
    assert score(model, batch, maps)["average_drop"].values.tolist() == [0, 0]


def test_ones_with_a_single_zero_win_although_they_say_nothing() -> None:
    """Why the drop is never ranked: the image stays as it is, and any rounding can count as a gain."""
    model = slow.model_of(slow.Glance(), 64)
    batch = slow.batch_of(model, slow.random_images(32, 64), grid=(8, 8))
    fake = torch.ones(32, 64, 64)
    fake[:, 0, 0] = 0
    found, honest = score(model, batch, fake), score(model, batch, torch.rand(32, 64, 64))
    assert found["average_drop"].values.mean() < 1
    assert found["area"].values.min() > 99.9
    assert honest["average_drop"].values.mean() > 20 * found["average_drop"].values.mean()
    without_margin = score(model, batch, fake, margin=0.0)["increase"].values.mean()
    assert without_margin > 25
    assert without_margin > honest["increase"].values.mean()
    assert found["increase"].values.mean() < without_margin
    # By its ranks the fake is one plateau with a hole, and brightness no longer helps it.
    assert found["drop_equalised"].values.mean() > 20 * found["average_drop"].values.mean()


def test_brightness_alone_lowers_the_drop_but_not_the_equalised_one() -> None:
    model = slow.model_of(slow.PatchSum(torch.rand(4, 4) * 2, bar=2.0), 16)
    batch = slow.batch_of(model, torch.ones(1, 3, 16, 16), targets=torch.tensor([0]))
    maps = torch.rand(1, 16, 16)
    plain, bright = score(model, batch, maps), score(model, batch, maps**0.25)
    assert bright["average_drop"].values < plain["average_drop"].values
    assert bright["area"].values > plain["area"].values
    assert bright["drop_equalised"].values == plain["drop_equalised"].values


def test_maps_without_positive_values_are_empty_but_keep_their_ranks(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(3, 32), grid=(8, 8))
    maps = torch.randn(3, 32, 32)
    maps[1] = -maps[1].abs() - 0.1
    found = score(cnn, batch, maps)
    for name in ("average_drop", "increase", "area", "average_gain", "scan_inc"):
        assert list(found[name].empty) == [1]
        assert found[name].values[1].isnan()
        assert not any(found[name].reasons[1:2])
    for name in ("drop_equalised", "increase_equalised"):
        assert not found[name].empty
        assert found[name].values.isfinite().all()
    verdicts = score_maps(use_metric(Spec("drop")), cnn, batch, MapSet(maps, ["ok"] * 3, [""] * 3))
    status = {verdict.metric: verdict.status[1] for verdict in verdicts}
    assert status["average_drop"] == status["scan_inc"] == "empty"
    assert status["drop_equalised"] == "ok"


def test_the_view_does_not_change_with_scale_or_shift_of_its_negatives(cnn: Model) -> None:
    batch = slow.batch_of(cnn, slow.random_images(2, 32), grid=(8, 8))
    maps = torch.randn(2, 32, 32)
    found = score(cnn, batch, maps)
    scaled = score(cnn, batch, maps * 1e-20)
    deeper = score(cnn, batch, torch.where(maps < 0, maps * 5, maps))
    for name in ("average_drop", "area", "average_gain"):
        assert torch.allclose(found[name].values, scaled[name].values, atol=1e-3)
        assert torch.equal(found[name].values, deeper[name].values)


def test_certain_models_have_no_room_to_gain() -> None:
    class Certain(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([60 + images.mean((1, 2, 3)), images.mean((1, 2, 3))], 1)

    model = slow.model_of(Certain(), SIDE)
    found = score(model, slow.batch_of(model, slow.random_images(2, SIDE)), torch.rand(2, SIDE, SIDE))
    assert found["average_gain"].values.tolist() == [0, 0]


def test_an_impossible_target_has_nothing_to_lose() -> None:
    class Never(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([images.mean((1, 2, 3)), images.mean((1, 2, 3)) - 500], 1)

    model = slow.model_of(Never(), SIDE)
    batch = slow.batch_of(model, slow.random_images(1, SIDE), targets=torch.tensor([1]))
    assert score(model, batch, torch.rand(1, SIDE, SIDE))["average_drop"].values.tolist() == [0]


def test_two_forwards_an_image_and_no_graph(model: Model) -> None:
    batch = slow.batch_of(model, slow.random_images(3, 32), grid=(8, 8))
    _ = batch.logits
    with model.counting() as meter:
        found = score(model, batch, torch.randn(3, 32, 32))
    assert (meter.forwards, meter.backwards) == (6, 0)
    assert not any(scored.values.requires_grad for scored in found.values())


def test_an_image_scores_alike_in_any_company(model: Model) -> None:
    batch = slow.batch_of(model, slow.random_images(3, 32), grid=(8, 8))
    maps = torch.randn(3, 32, 32).round()
    together, alone = score(model, batch, maps), score(model, batch.select([1]), maps[1:2])
    for name, scored in alone.items():
        assert scored.values[0].item() == pytest.approx(
            together[name].values[1].item(), abs=1e-3, nan_ok=True
        ), name


@pytest.mark.parametrize("name", ["space", "score", "mute"])
def test_wrong_choices_name_the_right_ones(cnn: Model, name: str) -> None:
    batch = slow.batch_of(cnn, slow.random_images(1, 32))
    with pytest.raises(RequestError, match=f"parameter '{name}': got 'other'; known are: "):
        score(cnn, batch, torch.rand(1, 32, 32), **{name: "other"})
