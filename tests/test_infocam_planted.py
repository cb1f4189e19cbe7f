"""InfoCAM (reconstruction) where the answer is planted: channels and patches that alone carry the class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import planted_channels as scene
import pytest
import torch
from conftest import explain, inside
from planted_channels import fitted
from torch import nn

from faithmap import _planted, bottleneck, registry, streams
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.cuts import cut_at
from faithmap.errors import RequestError
from faithmap.explaining import bind, explain_batch
from faithmap.models import Model

QUICK = {"iterations": 4, "samples": 4, "prior_samples": 4}


def shares(model: Model, batch: Batch, **params: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel's part of the information (n, K), and its gate."""
    features, gates = fitted(model, batch, **params)
    nats = gates.nats(features).mean(2)
    return nats / nats.sum(1, keepdim=True), gates.passed(features).mean(2)


def own_channels(batch: Batch) -> torch.Tensor:
    """Bool (n, K): the channels that were planted for each image's target."""
    own = torch.zeros(len(batch), scene.CHANNELS, dtype=torch.bool)
    for i, target in enumerate(batch.targets.tolist()):
        own[i, scene.evidence(target)] = True
    return own


def agreement(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of rows."""
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(one, two, strict=True)])


class Moved(nn.Module):
    """Each channel on a scale of its own, c A + d."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.scale = nn.Parameter(torch.rand(scene.CHANNELS, 1, 1) * 3 + 0.5)
        self.shift = nn.Parameter(shift * torch.randn(scene.CHANNELS, 1, 1))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps * self.scale + self.shift


def changed(*, shift: float, statistics: str, **params: Any) -> float:
    """By how much gates change at most where channels are moved, and the head makes up for it but for 3."""
    model, other, moved = scene.planted(), scene.planted(), Moved(shift)
    other.module.body = nn.Sequential(other.module.body, moved)
    other.module.fc.weight.data = model.module.fc.weight.data / moved.scale.data[:, 0, 0]
    weight = other.module.fc.weight.data
    other.module.fc.bias = nn.Parameter(3.0 - weight @ moved.shift.data[:, 0, 0])
    batch = scene.planted_batch(model, 2)
    many = scene.planted_batch(model, 64, seed=9).images
    found = []
    for network in (model, other):
        here = Batch(batch.images, batch.targets, batch.ids, Context(network, batch.images))
        noise = bottleneck.fit_statistics(network, [many]) if statistics == "fitted" else statistics
        features, gates = fitted(network, here, statistics=noise, min_std=1e-6, **params)
        found.append(gates.passed(features))
    return float((found[0] - found[1]).abs().max())


class Appended(nn.Module):
    """Sixteen channels more, which vary like the others."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        more = 0.7 * maps[:, :16].flip(3) + 0.3 * maps[:, scene.LOUD.start : scene.LOUD.start + 16]
        return torch.cat([maps, more.roll(2, 2)], 1)


class TestPlantedChannels:
    def test_the_weight_lies_on_the_planted_channels(self) -> None:
        model = scene.planted()
        batch = scene.planted_batch(model, 12)
        own = own_channels(batch)
        for params in ({}, {"mode": "mean-field", "contexts": 2}):
            parts, _ = shares(model, batch, **params)
            assert float((parts * own).sum(1).min()) >= 0.85
            for i in range(len(batch)):
                assert float(parts[i][own[i]].min()) > float(parts[i][~own[i]].max())  # AUROC 1

    def test_the_map_is_where_the_class_is(self) -> None:
        model = scene.planted()
        batch = scene.planted_batch(model, 6)
        for params in (
            {},
            {"map": "A_plus"},
            {"mode": "element"},
            {"mode": "mean-field"},
            {"weight": "gate"},
        ):
            maps = explain("infocam", model, batch, **params)
            masks = batch.masks[:, :: scene.FACTOR, :: scene.FACTOR]
            inside_mask = (maps * masks).sum((1, 2)) / maps.sum((1, 2))
            assert float(inside_mask.min()) > 0.5 >= 2 * float(masks.float().mean())

    def test_redundant_evidence_is_found_by_the_noise_stream(self) -> None:
        model = scene.planted(gain=36.0)  # one or two channels suffice
        batch = scene.planted_batch(model, 8)
        own = own_channels(batch)
        (_, without), (_, necessary) = (shares(model, batch, gamma=gamma) for gamma in (0.0, 1.0))
        assert float(necessary[own].mean()) > float(without[own].mean()) + 0.2

    def test_two_classes_in_one_image(self) -> None:
        model = scene.planted()
        for present in ((0, 1), (1, 0)):
            batch = scene.planted_batch(model, 4, present=present)
            parts, _ = shares(model, batch)
            assert float((parts * own_channels(batch)).sum(1).min()) > 0.7

    def test_much_beta_shuts_all_gates_and_the_map_is_empty(self) -> None:
        model = scene.planted()
        batch = scene.planted_batch(model, 3)
        features, gates = fitted(model, batch, beta=1e4)
        assert float(gates.passed(features).max()) < 0.01
        assert float(gates.nats(features).mean(2).sum(1).max()) < 0.005
        maps = explain("infocam", model, batch, beta=1e4)
        assert not maps.any() and bool(torch.isfinite(maps).all())

    def test_of_a_map_that_is_zero_it_is_told_why(self, tmp_path: Path) -> None:
        model = scene.planted()
        batch = scene.planted_batch(model, 3)
        plugin, infocam = registry.get("explainer", "infocam"), inside("infocam")

        def told(**params: Any) -> tuple[list[str], list[str]]:
            found = explain_batch(bind(plugin, plugin.check({**QUICK, **params})), model, batch)
            return list(found.status), found.reasons

        assert told(beta=1e4, iterations=50) == (["empty"] * 3, [f"the map is constant; {infocam.SHUT}"] * 3)
        assert told() == (["ok"] * 3, [""] * 3)
        # Where noise is stronger than all features no channel is present, whatever passes.
        much, cut = torch.full((scene.CHANNELS, scene.GRID, scene.GRID), 2.0), cut_at(model)
        strong = bottleneck.Statistics(much, much / 4, 9, cut.layer, model.digest())
        file = str(strong.save(tmp_path / "s.safetensors"))
        assert told(statistics=file)[1] == [f"the map is constant; {infocam.ABSENT}"] * 3
        # Each image has its own note.
        maps, shut = torch.ones(3, 2, 2), torch.tensor([False, True, False])
        maps[2] = 0
        assert infocam._noted(batch, maps, shut).flatten(1).any(1).tolist() == [True, False, False]
        assert batch.notes == {1: infocam.SHUT, 2: infocam.ABSENT}

    def test_little_beta_opens_what_helps_and_shuts_what_hurts(self) -> None:
        model = scene.planted(gain=4.0)  # a head that is not yet sure: every channel still pays
        batch = scene.planted_batch(model, 4)
        features, gates = fitted(model, batch, beta=1e-3, gamma=0.0)
        passed = gates.passed(features).mean(2)
        assert float(passed[own_channels(batch)].min()) > 0.99
        assert float(passed[1::2, scene.CONTRA].max()) < 0.01

    def test_zero_beta_is_refused(self) -> None:
        model = scene.planted()
        with pytest.raises(RequestError, match="got beta 0"):
            explain("infocam", model, scene.planted_batch(model, 1), beta=0.0)

    def test_seeds_and_a_range_of_beta(self) -> None:
        model = scene.planted()
        batch = scene.planted_batch(model, 4)
        first, _ = shares(model, batch)
        other, _ = shares(model, batch.with_seed_key("another seed"))
        assert float(agreement(first, other).min()) > 0.99
        for beta in (0.5, 50.0):
            assert float(agreement(first, shares(model, batch, beta=beta)[0]).min()) > 0.95

    def test_channels_in_another_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = scene.planted()
        batch = scene.planted_batch(model, 2)
        order = torch.randperm(scene.CHANNELS, generator=torch.Generator().manual_seed(0))
        found = fitted(model, batch)[1].alpha
        # The image's channels and the head's columns change places, and the noise with them.
        body = model.module.body
        maps = body(batch.images)[:, order]
        other = scene.planted()
        other.module.fc.weight.data = model.module.fc.weight.data[:, order]
        images = nn.functional.pixel_shuffle(maps, scene.FACTOR)
        moved = Batch(images, batch.targets, batch.ids, Context(other, images))
        normal = streams._normal
        monkeypatch.setattr(streams, "_normal", lambda *a: normal(*a)[..., order])
        assert torch.allclose(fitted(other, moved)[1].alpha, found[:, order], atol=1e-3)

    @pytest.mark.parametrize("mode", ["channel", "element", "mean-field"])
    def test_scales_and_constants_do_not_matter(self, mode: str) -> None:
        """A -> cA + d, compensated in the head. Noise around zero moves with c alone."""
        params = {"mode": mode, "halves": False}  # which by default depends on the features' sign
        assert changed(shift=0.0, statistics="zero", **params) < 1e-4
        assert changed(shift=2.0, statistics="fitted", **params) < 1e-4
        assert changed(shift=2.0, statistics="zero", **params) > 0.5

    def test_channels_without_use_change_little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The KL is a mean over channels: with K' of them, beta K' / K weighs each as before."""
        model, other = scene.planted(), scene.planted()
        batch = scene.planted_batch(model, 8)
        other.module.body = nn.Sequential(other.module.body, Appended())
        other.module.fc = nn.Linear(scene.CHANNELS + 16, scene.CLASSES, bias=False)
        other.module.fc.weight.data = nn.functional.pad(model.module.fc.weight.data, (0, 16))
        more = Batch(batch.images, batch.targets, batch.ids, Context(other, batch.images))
        beta = 5.0 * (scene.CHANNELS + 16) / scene.CHANNELS
        before, _ = shares(model, batch)
        after, _ = shares(other, more, beta=beta)
        own, useless = after.split([scene.CHANNELS, 16], 1)
        assert float(useless.sum(1).max()) < 1e-3
        assert float(agreement(before, own).min()) > 0.995  # all draws are others
        assert float(agreement(before, own).mean()) > 0.999

        normal = streams._normal

        def same_draws(generators: Any, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
            drawn = normal(generators, (*shape[:-1], scene.CHANNELS), like)
            return nn.functional.pad(drawn, (0, 16), value=0.5)

        monkeypatch.setattr(streams, "_normal", same_draws)
        own = shares(other, more, beta=beta)[0][:, : scene.CHANNELS]
        assert torch.allclose(own / own.sum(1, keepdim=True), before, atol=1e-4)

    def test_weights_come_from_gates_and_not_from_slopes(self) -> None:
        # Where the head is flat the score has no slope in any feature; what counts is found all the same.
        class Step(nn.Module):
            def forward(self, maps: torch.Tensor) -> torch.Tensor:
                return (maps > 0.3).float() - (maps < -0.3).float()

        model = scene.planted(tail=Step())
        batch = scene.planted_batch(model, 3)
        assert not batch.gradients().any()
        parts, _ = shares(model, batch, mode="mean-field", beta=1.0)
        assert float((parts * own_channels(batch)).sum(1).min()) > 0.85
        maps = explain("infocam", model, batch, mode="mean-field", beta=1.0)
        assert bool((maps.amax((1, 2)) > 0).all())


class TestPlantedPatch:
    @pytest.mark.parametrize("params", [{}, {"mode": "element"}, {"mode": "mean-field"}])
    def test_a_coloured_patch_is_found(self, params: dict[str, Any]) -> None:
        model = _planted.planted_model()
        batch = _planted.planted_batch(model).select([0, 1])
        maps = explain("infocam", model, batch, **params, beta=0.5)
        on_patch = (maps * batch.masks).sum((1, 2)) / maps.sum((1, 2))
        assert float(on_patch.min()) > 0.9

    def test_a_shortcut_patch_is_found(self) -> None:
        class Shortcut(nn.Module):
            """A learnt shortcut: the class is read off a tag, whatever the object is."""

            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.stem = nn.Conv2d(3, 8, 4, stride=4)
                self.stem.weight.data.abs_()
                self.stem.bias.data.zero_()
                self.stem.weight.data[0] = -0.5
                self.stem.weight.data[0, 0] = 1.0  # red, and nothing else
                self.act, self.mix = nn.ReLU(), nn.Conv2d(8, 8, 1)
                self.mix.weight.data = torch.eye(8).view(8, 8, 1, 1)
                self.mix.bias.data.zero_()
                self.head = nn.Linear(8, 2)
                self.head.weight.data.zero_()
                self.head.weight.data[1, 0] = 120.0
                self.head.bias.data = torch.tensor([3.0, 0.0])

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                maps = self.mix(self.act(self.stem(images)))
                logits: torch.Tensor = self.head(maps.tanh().mean((2, 3)))
                return logits

        model = Model(Shortcut(), mean=0.0, std=1.0, input_size=32, target_layer="mix")
        images = 0.3 + 0.4 * torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)).expand(
            -1, 3, -1, -1
        )
        images = images.clone()
        images[:, :, 8:20, 8:20] = 0.95  # the object, which the network does not look at
        images[:, 0, 24:, 24:], images[:, 1:, 24:, 24:] = 1.0, 0.0
        batch = Batch(images, torch.tensor([1, 1]), ("a", "b"), Context(model, images))
        assert bool((batch.predicted == 1).all()) and cut_at(model).head is None
        for params in ({}, {"mode": "element"}, {"mode": "mean-field"}):
            maps = explain("infocam", model, batch, **params)
            tag = maps[:, 6:, 6:].sum((1, 2)) / maps.sum((1, 2))
            assert float(tag.min()) > 0.9
