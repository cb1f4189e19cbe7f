"""InfoCAM (reconstruction) against a slow rewrite, closed forms, and planted channels and patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import planted_channels as scene
import pytest
import torch
from conftest import explain, inside, make_batch, make_cnn, make_vit
from planted_channels import fitted
from torch import nn

from faithmap import _planted, bottleneck, conformance, fitting, registry, streams
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.cuts import cut_at
from faithmap.errors import RequestError
from faithmap.explaining import bind, explain_batch
from faithmap.models import Model
from faithmap.records import Sample
from faithmap.training import Session, TrainingData, fit_in_memory

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


class TestSettings:
    def test_defaults_by_layer_and_family(self, tmp_path: Path) -> None:
        settle, params = inside("infocam")._settle, registry.get("explainer", "infocam").parameters
        cnn, vit = make_cnn(), make_vit()
        last, early, tokens = (
            settle(m, cut_at(m, layer), params) for m, layer in ((cnn, None), (cnn, "stem"), (vit, None))
        )
        assert (last.mode, last.kind, last.iterations, last.learning_rate) == ("channel", "channel", 50, 0.5)
        assert (early.mode, early.kind, early.iterations, early.learning_rate) == (
            "element",
            "element",
            30,
            1.0,
        )
        assert (tokens.mode, tokens.map) == ("element", "density")
        assert settle(vit, cut_at(vit), {**params, "mode": "channel"}).kind == "half"

    def test_class_tokens_have_noise_of_their_own(self, vit: Model, tmp_path: Path) -> None:
        cut, batch = cut_at(vit), make_batch(vit, 2)
        output = batch.context.outputs(cut.layer)

        def noise(statistics: Any) -> streams.Features:
            return streams.with_noise(
                vit, cut, output, batch.targets, statistics, min_std=1e-6, min_active=0.0
            )

        for own in ("zero", "image"):
            found = noise(own)
            assert not found.mean[:, :, 0].any()
            assert torch.allclose(found.std[:, :, 0], output[:, 0].abs())
        assert torch.allclose(found.mean[:, :, 1], output[:, 1:].mean(1), atol=1e-6)
        images = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        statistics = bottleneck.fit_statistics(vit, images.split(4), cut.layer)
        file = statistics.save(tmp_path / "s.safetensors")
        raw = Context(vit, images).outputs(cut.layer).double()
        for found in (noise(str(file)), noise(statistics)):
            assert torch.allclose(found.mean[0, :, 0].double(), raw[:, 0].mean(0), atol=1e-5)
            assert torch.allclose(found.std[0, :, 0].double(), raw[:, 0].std(0), atol=1e-5)
            patches = raw[:, 1:].flatten(0, 1)
            assert torch.allclose(found.mean[1, :, 5].double(), patches.mean(0), atol=1e-5)
            assert torch.allclose(found.std[1, :, 5].double(), patches.std(0), rtol=0.1)
        old = bottleneck.Statistics(statistics.mean, statistics.std, 9, cut.layer, vit.digest())
        with pytest.raises(RequestError, match="know nothing of its prefix tokens"):
            noise(old)
        with pytest.raises(RequestError, match="did you mean 'zero'"):
            noise("zeros")

    def test_channels_that_are_never_active_stay_shut(self, cnn: Model, tmp_path: Path) -> None:
        cnn.module.body[0].bias.data[2] = -100.0
        batch = make_batch(cnn, 2)
        file = str(bottleneck.fit_statistics(cnn, [batch.images]).save(tmp_path / "s.safetensors"))
        for statistics in ("zero", file):
            features, gates = fitted(cnn, batch, statistics=statistics, **QUICK)
            active = (batch.activations() != 0).float().mean((2, 3))
            expected = active > 0 if statistics == "zero" else (active.mean(0) >= 0.01).expand(2, -1)
            assert torch.equal(features.alive[:, :, 0], expected) and not active[:, 2].any()
            assert torch.equal(gates.nats(features).any(2), expected)

    def test_the_cost_is_as_declared(self, model: Model) -> None:
        plugin = registry.get("explainer", "infocam")
        batch = make_batch(model, 2)
        for params in (
            {"mode": "channel", **QUICK}, {"mode": "element", **QUICK}, {"gamma": 0.0, **QUICK},
            {"mode": "mean-field", "contexts": 2, "prior_samples": 3},
        ):  # fmt: skip
            for layer in (None, "stem" if model.family == "cnn" else "blocks.0"):
                given = {**params, "layer": layer}
                with model.counting() as meter:
                    maps = explain("infocam", model, batch.select([0, 1]), **given)
                assert bool(torch.isfinite(maps).all())
                assert meter.forwards == 2 * plugin.facts.forwards(model, given)
                assert meter.backwards <= 2 * plugin.facts.backwards(model, given)

    def test_passes_that_do_not_fit_at_once(self, vit: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        batch = make_batch(vit, 2)
        for params in ({**QUICK}, {"mode": "mean-field", "contexts": 1, "prior_samples": 3}):
            whole = explain("infocam", vit, batch, **params)
            with monkeypatch.context() as patch:
                patch.setattr("faithmap.perturb.chunk_size", lambda *_: 12)  # three copies a pass
                parts = explain("infocam", vit, batch, **params)
            assert float((whole - parts).abs().max()) <= 1e-3 * float(whole.max())

    def test_a_model_that_cannot_be_cut(self) -> None:
        class Around(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(3, 2)
                self.join = nn.Linear(4, 2)

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = self.head(images.mean((2, 3))) + self.join(
                    self.body(images).mean((2, 3))
                )
                return logits

        model = Model(Around(), mean=0.0, std=1.0, input_size=8)
        reason = registry.get("explainer", "infocam").facts.defined_for(model)
        assert "no cut of model" in reason
        with pytest.raises(RequestError, match="no cut of model"):
            explain("infocam", model, make_batch(model, 1))

    def test_a_single_output_has_no_odds(self) -> None:
        model = make_cnn(classes=1)
        assert "one output only" in registry.get("explainer", "infocam").facts.defined_for(model)

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"mode": "channels"}, "did you mean 'channel'"),
            ({"map": "a"}, "unknown map 'a'"),
            ({"weight": "gates"}, "did you mean 'gate'"),
            ({"samples": 5}, "samples even"),
            ({"gamma": -1.0}, "got gamma -1"),
            ({"iterations": 0}, "got iterations 0"),
            ({"beta": float("nan")}, "got beta nan; expected finite numbers"),
            ({"beta": float("inf")}, "got beta inf"),
            ({"min_std": float("nan")}, "got min_std nan"),
            ({"min_nats": float("nan")}, "got min_nats nan"),
            ({"gamma": float("inf")}, "got gamma inf"),
            ({"start": float("nan")}, "got start nan"),
            ({"halves": "no"}, "'halves': got 'no', expected bool"),
            ({"iterations": 2.5}, r"'iterations': got 2\.5, expected int"),
            ({"statistics": "fited"}, "unknown statistics 'fited', and no such file; did you mean 'fitted'"),
            ({"statistics": "mean"}, "known are: fitted, image, zero"),
            ({"statistics": "none.safetensors"}, "known are: fitted, image, zero"),
            ({"layer": "blocks.1.norm1"}, r"these layers are cuts: blocks\.1"),
        ],
    )
    def test_senseless_settings_are_refused(self, vit: Model, params: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            explain("infocam", vit, make_batch(vit, 1), **params)


class TestFit:
    """Statistics that `faithmap train` gathers."""

    def data(self, model: Model, count: int = 11) -> TrainingData:
        generator = torch.Generator().manual_seed(4)
        images = torch.rand(count, 3, *model.input_size, generator=generator)
        samples = [Sample(id=str(i), image=image, label=0) for i, image in enumerate(images)]
        return TrainingData(samples, model, seed=0)

    def test_it_gathers_what_fit_statistics_does(self, model: Model) -> None:
        data = self.data(model)
        infocam = registry.get("explainer", "infocam").make({"statistics": "fitted"})
        tensors = infocam.fit(model, data, Session(), batch_size=4)
        images = torch.cat([images for images, _ in data.batches(4, 0, shuffle=False)])
        layer = cut_at(model).layer
        expected = bottleneck.fit_statistics(model, [images], layer)
        found = bottleneck.Statistics.of_tensors(tensors, layer, model.digest())
        assert found.count == expected.count == 11
        for name in ("mean", "std", "active", "prefix"):
            one, two = getattr(found, name), getattr(expected, name)
            assert (one is None) == (two is None)
            assert one is None or torch.allclose(one, two, atol=1e-6)

    def test_a_fit_explains_as_its_file_does(self, model: Model, tmp_path: Path) -> None:
        data, batch = self.data(model), make_batch(model, 2)
        images = [images for images, _ in data.batches(4, 0, shuffle=False)]
        file = bottleneck.fit_statistics(model, images, cut_at(model).layer).save(tmp_path / "s.safetensors")
        plugin = registry.get("explainer", "infocam")
        params = plugin.check({"statistics": "fitted", **QUICK})
        fit = fit_in_memory(plugin, params, model, data, batch_size=4)
        with_file = explain("infocam", model, batch, statistics=str(file), **QUICK)
        # The seeds depend on the parameters as they are given: the same ones for both.
        infocam = plugin.make(params)
        infocam.load(model, fit.tensors())
        again = plugin.make({**params, "statistics": str(file)})
        assert torch.equal(infocam(model, batch), again(model, batch))
        assert with_file.shape == again(model, batch).shape

    def test_without_one_it_says_what_to_do(self, cnn: Model) -> None:
        with pytest.raises(RequestError, match="infocam has no statistics for model 'tiny-cnn'"):
            explain("infocam", cnn, make_batch(cnn, 1), statistics="fitted")

    def test_a_typing_error_is_found_before_anything_is_computed(self) -> None:
        plugin = registry.get("explainer", "infocam")
        with pytest.raises(RequestError, match="did you mean 'fitted'"):
            fitting.wants_fit(plugin, plugin.check({"statistics": "fited"}))

    def test_what_needs_no_fit_says_what_does(self) -> None:
        plugin = registry.get("explainer", "infocam")
        said = fitting.needless(plugin, plugin.check({"beta": 2.0}))
        assert said.endswith(
            "needs no fit with these parameters; infocam[statistics=fitted,beta=2.0] needs one"
        )
        assert fitting.wants_fit(plugin, plugin.check({"beta": 2.0, **plugin.target.fit_when}))

    def test_two_numbers_count_for_each_channel(self, model: Model) -> None:
        plugin = registry.get("explainer", "infocam")
        params = plugin.check({"statistics": "fitted"})
        tensors = plugin.make(params).fit(model, self.data(model), Session())
        channels, tokens = cut_at(model).layout.channels, len(cut_at(model).layout.prefix)
        assert fitting.numbers_used(plugin, params, tensors) == 2 * channels * (1 + tokens)
        assert sum(value.numel() for value in tensors.values()) > 2 * channels * (1 + tokens)

    def test_the_kit_fits_it(self) -> None:
        only = ["check_facts", "check_fit", "check_resume", "check_maps", "check_batch", "check_target"]
        results = conformance.check_explainer("infocam[statistics=fitted]", only=only)
        assert [result.message for result in results if result.status != "passed"] == []
        assert {result.model for result in results} == {"", "shapes/resnet", "shapes/vit"}

    def test_wrong_batches_are_refused(self, cnn: Model) -> None:
        infocam = registry.get("explainer", "infocam").make({"statistics": "fitted"})
        with pytest.raises(RequestError, match="batch_size is 0"):
            infocam.fit(cnn, self.data(cnn), Session(), batch_size=0)
        with pytest.raises(RequestError, match="from 1 images"):
            infocam.fit(cnn, self.data(cnn, 1), Session())
