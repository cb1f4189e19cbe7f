"""InfoCAM (reconstruction): its settings, its costs and its fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import explain, inside, make_batch, make_cnn, make_vit
from planted_channels import fitted
from torch import nn

from faithmap import bottleneck, conformance, fitting, registry, streams
from faithmap.context import Context
from faithmap.cuts import cut_at
from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.records import Sample
from faithmap.training import Session, TrainingData, fit_in_memory

QUICK = {"iterations": 4, "samples": 4, "prior_samples": 4}


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
        plugin = registry.get("explainer", "infocam")
        reason = plugin.facts.defined_for(model, plugin.parameters)
        assert "no cut of model" in reason
        with pytest.raises(RequestError, match="no cut of model"):
            explain("infocam", model, make_batch(model, 1))

    def test_a_single_output_has_no_odds(self) -> None:
        plugin = registry.get("explainer", "infocam")
        assert "one output only" in plugin.facts.defined_for(make_cnn(classes=1), plugin.parameters)

    def test_two_gates_a_channel_have_no_map_of_the_features_as_they_are(self, vit: Model) -> None:
        """The map A once was ignored there, and the line's noise alone told it from A_plus."""
        plugin, halves = registry.get("explainer", "infocam"), {"map": "A", "mode": "channel"}
        reason = plugin.facts.defined_for(vit, plugin.check(halves))
        assert reason is not None and "two gates a channel" in reason and "halves=False" in reason
        with pytest.raises(RequestError, match='give map="A_plus"'):
            explain("infocam", vit, make_batch(vit, 1), **halves)
        assert plugin.facts.defined_for(vit, plugin.check({**halves, "halves": False})) is None
        assert plugin.facts.defined_for(make_cnn(), plugin.check({"map": "A"})) is None

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"mode": "channels"}, "did you mean 'channel'"),
            ({"map": "a"}, "unknown map 'a'"),
            ({"weight": "gates"}, "did you mean 'gate'"),
            ({"samples": 5}, "samples even"),
            ({"gamma": -1.0}, "got gamma -1"),
            ({"iterations": 0}, "got iterations 0"),
            ({"beta": float("nan")}, "parameter .beta.: got nan, which is no number"),
            ({"beta": float("inf")}, "got beta inf"),
            ({"min_std": float("nan")}, "parameter .min_std.: got nan"),
            ({"min_nats": float("nan")}, "parameter .min_nats.: got nan"),
            ({"gamma": float("inf")}, "got gamma inf"),
            ({"start": float("nan")}, "parameter .start.: got nan"),
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
