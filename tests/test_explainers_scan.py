"""SCAN's maps and what is noted of them, and its controls."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import explain, make_batch, make_vit
from scan_fits import Session, fitted, make_data, make_scan

import slow_scan
from faithmap import gradient_masks, registry
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.explaining import EVERYTHING, bind, explain_batch, undefined
from faithmap.models import Model
from faithmap.reconstruction import blurred_target, confidence_of
from faithmap.scoring import Heading, rows_of, score_maps, use_metric


class TestMaps:
    @pytest.mark.parametrize("mask", gradient_masks.MASKS)
    def test_shape_range_and_cost(self, model: Model, mask: str) -> None:
        scan = fitted(model, mask=mask)
        batch = make_batch(model, 3).select(range(3))
        facts = registry.get("explainer", "scan").facts
        with model.counting() as meter:
            maps = scan(model, batch)
        assert maps.shape == (3, 32, 32) and 0 <= float(maps.min()) < float(maps.max()) <= 1
        assert meter.forwards == 3 * facts.forwards
        assert meter.backwards == 3 * facts.backwards(model, {"mask": mask})

    def test_a_batch_equals_single_images(self, model: Model) -> None:
        scan, batch = fitted(model), make_batch(model, 4)
        maps = scan(model, batch)
        for i in range(4):
            assert torch.allclose(scan(model, batch.select([i]))[0], maps[i], atol=1e-4)

    def test_equals_its_parts(self, cnn: Model) -> None:
        scan, batch = fitted(cnn, percentile=80.0, stretch=1.5), make_batch(cnn, 2)
        kept = [slow_scan.mask(gradient.double().numpy(), 80.0) for gradient in batch.gradients()]
        given = batch.activations() * torch.tensor(np.array(kept)).float()
        with torch.no_grad():
            decoded = scan._decoder(given, (8, 8))
        assert torch.allclose(scan(cnn, batch), confidence_of(decoded[:, 0], stretch=1.5), atol=1e-5)
        assert torch.allclose(scan.reconstruct(cnn, batch), ((decoded[:, 1:] + 1) / 2).clamp(0, 1), atol=1e-5)
        scan.output = "error"
        errors = (blurred_target(batch.images, (8, 8)) - decoded[:, 1:]).abs().mean(1)
        assert torch.allclose(scan(cnn, batch), errors, atol=1e-5)

    def test_the_percentile_and_the_class_matter(self, model: Model) -> None:
        scan, batch = fitted(model), make_batch(model, 2)
        maps = scan(model, batch)
        scan.percentile = 0.0
        assert not torch.allclose(scan(model, batch), maps, atol=1e-3)
        scan.percentile, others = 95.0, copy.copy(batch)
        object.__setattr__(others, "targets", (batch.targets + 1) % 5)
        assert not torch.allclose(scan(model, others), maps, atol=1e-4)

    def test_the_random_mask_is_seeded_by_the_image(self, cnn: Model) -> None:
        scan, batch = fitted(cnn, mask="random"), make_batch(cnn, 3)
        maps = scan(cnn, batch)
        assert torch.equal(scan(cnn, batch), maps)
        assert torch.allclose(scan(cnn, batch.select([2, 0])), maps[[2, 0]], atol=1e-5)

    def test_halves_of_the_stored_precision_load(self, model: Model) -> None:
        scan, batch = make_scan(), make_batch(model, 2)
        tensors = scan.fit(model, make_data(model), Session(), epochs=1, batch_size=4)
        scan.load(model, tensors)
        maps = scan(model, batch)
        scan.load(model, {name: value.half() for name, value in tensors.items()})
        assert torch.allclose(scan(model, batch), maps, atol=0.02)
        assert not any(parameter.requires_grad for parameter in scan._decoder.parameters())
        assert not any(module.training for module in scan._decoder.modules())

    def test_images_that_are_not_square(self, cnn: Model) -> None:
        scan = fitted(cnn)
        images = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
        batch = Batch(images, torch.tensor([0, 1]), ("a", "b"), Context(cnn, images))
        assert scan(cnn, batch).shape == (2, 48, 32)

    def test_in_bf16(self, model: Model) -> None:
        scan, batch = fitted(model), make_batch(model, 2)
        model.precision = "bf16"
        maps = scan(model, batch.select([0, 1]))
        assert maps.dtype == torch.float32 and bool(torch.isfinite(maps).all())

    def test_without_a_decoder(self, cnn: Model) -> None:
        with pytest.raises(RequestError, match="faithmap train scan --model tiny-cnn --dataset DATASET"):
            make_scan()(cnn, make_batch(cnn, 1))

    def test_a_decoder_of_another_model(self, cnn: Model) -> None:
        tensors = make_scan().fit(cnn, make_data(cnn), Session(), epochs=1, batch_size=4)
        for scan, model in (
            (make_scan(width=0.25), cnn),
            (make_scan(), make_vit()),
            (make_scan(layer="stem"), cnn),
        ):
            with pytest.raises(RequestError, match="these tensors are no decoder of width"):
                scan.load(model, tensors)

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"alpha": 0.0}, "alpha: got 0, expected above 0"),
            ({"percentile": 101.0}, "percentile: got 101, expected 0 or more, up to 100"),
            ({"lowest_percentile": -1.0}, "lowest_percentile: got -1"),
            ({"width": 0.0}, "width: got 0, expected above 0, up to 8"),
            ({"flexibility": -0.1}, "flexibility: got -0.1"),
            ({"blur": -1.0}, "blur: got -1"),
            ({"stretch": -1.0}, "stretch: got -1"),
            ({"stretch": math.inf}, "stretch: got inf, expected 0 or more and finite"),
            ({"alpha": math.inf}, "alpha: got inf, expected above 0 and finite"),
            ({"blur": math.nan}, "parameter .blur.: got nan, which is no number"),
            ({"weighting": "confident"}, "weighting: got 'confident'"),
            ({"mask": "gradients"}, "did you mean 'gradient'"),
            ({"output": "errors"}, "output: got 'errors'; did you mean 'error'"),
            ({"scalar": "softmax"}, "scalar: got 'softmax'"),
            ({"squash": "sin"}, "squash: got 'sin'"),
            ({"training_class": "truth"}, "training_class: got 'truth'"),
        ],
    )  # fmt: skip
    def test_wrong_parameters_are_named(self, params: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            make_scan(**params)

    def test_models_whose_grid_does_not_fit(self, cnn: Model) -> None:
        plugin = registry.get("explainer", "scan")
        odd = Model(cnn.module, mean=0.5, std=0.5, input_size=30)
        assert undefined(plugin, cnn, EVERYTHING) == ""
        assert "power of two" in undefined(plugin, odd, EVERYTHING)


class TestNotes:
    def test_an_image_without_positive_gradients_is_noted(self, cnn: Model) -> None:
        """Class 0 has negative weights alone: nothing speaks for it, and nothing is masked."""
        cnn.module.head.weight.data[0] = -1.0
        batch = make_batch(cnn, 3)
        object.__setattr__(batch, "targets", torch.tensor([1, 0, 2]))
        scan = fitted(cnn)
        for call in (scan, bind(registry.get("explainer", "masked-features"), {})):
            found = explain_batch(call, cnn, batch)
            assert found.status == ["ok"] * 3
            assert found.reasons == ["", gradient_masks.UNMASKED, ""]
        assert batch.notes == {}  # each explainer's notes are its own

    def test_rows_carry_the_note(self, cnn: Model) -> None:
        from faithmap.config import Spec

        cnn.module.head.weight.data[:] = -cnn.module.head.weight.data.abs()
        batch = make_batch(cnn, 2)
        found = explain_batch(bind(registry.get("explainer", "masked-features"), {}), cnn, batch)
        use = use_metric(Spec("perturbation", {}))
        rows = rows_of(
            Heading("m", "d", "e", "{}", "model", 0), use, batch, score_maps(use, cnn, batch, found)
        )
        assert {row.status for row in rows} == {"ok"} and {row.reason for row in rows} == {
            gradient_masks.UNMASKED
        }

    def test_two_notes_of_an_image_and_its_selection(self, cnn: Model) -> None:
        batch = make_batch(cnn, 2)
        batch.note(torch.tensor([True, False]), "one")
        batch.note(torch.tensor([True, True]), "two")
        assert batch.notes == {0: "one; two", 1: "two"}
        assert batch.select([1]).notes == {}


class TestControls:
    def test_masked_features_of_a_cnn(self, cnn: Model) -> None:
        batch = make_batch(cnn, 3)
        maps = explain("masked-features", cnn, batch, percentile=80.0)
        for i in range(3):
            pair = (tensor[i].double().numpy() for tensor in (batch.activations(), batch.gradients()))
            assert maps[i].numpy() == pytest.approx(slow_scan.masked_mean(*pair, 80.0), abs=1e-6)

    def test_masked_features_of_a_transformer(self, vit: Model) -> None:
        batch = make_batch(vit, 2)
        name = gradient_masks.analysed_layer(vit)
        maps = explain("masked-features", vit, batch)
        for i in range(2):
            values, gradients = (
                tensor[i].double().numpy()
                for tensor in (
                    batch.context.outputs(name),
                    batch.context.output_gradients(batch.targets, name),
                )
            )
            expected = (values * slow_scan.mask(gradients, 95.0)).mean(1)[1:].reshape(8, 8)
            assert maps[i].numpy() == pytest.approx(expected, abs=1e-6)

    def test_scan_untrained_is_scan_with_seeded_weights(self, model: Model) -> None:
        from faithmap.batch import seed_of
        from faithmap.decoders import seeded_decoder

        batch = make_batch(model, 2)
        maps = explain("scan-untrained", model, batch, width=0.125, seed=4)
        scan = make_scan()
        decoder = seeded_decoder(
            gradient_masks.layout_of(model), 0.125, seed_of(4, "scan", "weights"), torch.device("cpu")
        )
        scan.load(
            model, {name: value for name, value in decoder.state_dict().items() if value.is_floating_point()}
        )
        assert torch.allclose(maps, scan(model, batch), atol=1e-6)
        assert not torch.allclose(maps, explain("scan-untrained", model, batch, width=0.125), atol=1e-3)

    def test_roles(self) -> None:
        roles = [
            registry.get("explainer", name).facts.role
            for name in ("scan", "masked-features", "scan-untrained")
        ]
        assert roles == ["method", "control", "control"]
