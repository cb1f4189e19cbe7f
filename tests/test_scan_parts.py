"""What SCAN is made of beside its decoders: masks, target, losses; against slow rewrites and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import draw, make_batch, make_cnn

import slow_scan
from faithmap import gradient_masks, reconstruction
from faithmap.batch import Batch
from faithmap.errors import RequestError
from faithmap.gradient_masks import Layout
from faithmap.layers import middle_block
from faithmap.models import Model


class TestMask:
    @pytest.mark.parametrize("interpolation", gradient_masks.INTERPOLATIONS)
    @pytest.mark.parametrize("percentile", [0.0, 12.5, 70.0, 95.0, 99.9, 100.0])
    def test_equals_the_slow_percentile(self, percentile: float, interpolation: str) -> None:
        gradients = draw(3, 4, 5, 6)
        found, unmasked = gradient_masks.gradient_mask(gradients, percentile, interpolation)
        for one, expected in zip(found.numpy(), gradients.numpy(), strict=True):
            assert np.array_equal(one, slow_scan.mask(expected, percentile, interpolation))
        assert not unmasked.any()

    def test_tied_gradients_are_kept_or_dropped_together(self) -> None:
        values = draw(40, seed=1)
        gradients = values.repeat_interleave(9).view(1, 40, 3, 3)
        for percentile in (70.0, 90.3, 95.0):
            kept = gradient_masks.gradient_mask(gradients, percentile)[0][0].flatten(1)
            assert torch.equal(kept.any(1), kept.all(1))
            assert np.array_equal(
                kept.numpy().reshape(40, 3, 3), slow_scan.mask(gradients[0].numpy(), percentile)
            )

    def test_each_image_has_its_own_percentile(self) -> None:
        gradients = draw(3, 100)
        percentiles = torch.tensor([70.0, 95.0, 100.0])
        found, _ = gradient_masks.gradient_mask(gradients, percentiles)
        for i in range(3):
            assert torch.equal(
                found[i], gradient_masks.gradient_mask(gradients[i : i + 1], float(percentiles[i]))[0][0]
            )
        assert int(found[2].sum()) == 1  # P = 100 keeps the largest alone

    def test_without_a_positive_gradient_nothing_is_masked_and_that_is_told(self) -> None:
        gradients = torch.stack([-draw(50).abs(), draw(50), torch.zeros(50, dtype=torch.float64)])
        found, unmasked = gradient_masks.gradient_mask(gradients, 95.0)
        assert unmasked.tolist() == [True, False, True]
        assert found.all(1).tolist() == [True, False, True]

    def test_gradients_that_are_not_finite_leave_nothing_to_explain(self) -> None:
        """Else the mask of NaN would be empty, and the decoder would make a map of nothing."""
        generator = torch.Generator().manual_seed(0)
        values, gradients = torch.randn(2, 3, 4, 2, 2, generator=generator).unbind(0)
        layout = gradient_masks.Layout("layer", False, 4, (2, 2), (8, 8))
        whole = gradient_masks.apply_mask(values, gradients, layout, percentiles=50.0)
        for broken in (torch.nan, torch.inf):
            gradients[1, 2, 0, 1] = broken
            found = gradient_masks.apply_mask(values, gradients, layout, percentiles=50.0)
            assert bool(found.values[1].isnan().all()) and not bool(found.unmasked.any())
            assert torch.equal(found.values[[0, 2]], whole.values[[0, 2]])

    def test_percentile_zero_still_drops_what_is_not_positive(self) -> None:
        gradients = draw(2, 60)
        assert torch.equal(gradient_masks.gradient_mask(gradients, 0.0)[0], gradients > 0)

    def test_five_of_a_hundred_remain_at_95(self) -> None:
        gradients = torch.cat([torch.arange(1.0, 102.0), -torch.arange(1.0, 300.0)]).view(1, -1)
        kept = gradient_masks.gradient_mask(gradients, 95.0)[0]
        assert gradients[kept].tolist() == [96, 97, 98, 99, 100, 101]  # the percentile itself is 96

    def test_wrong_requests_are_named(self) -> None:
        with pytest.raises(RequestError, match=r"percentile: got 101\.0, expected 0 to 100"):
            gradient_masks.gradient_mask(draw(1, 9), 101.0)
        with pytest.raises(RequestError, match="unknown interpolation 'linnear'; did you mean 'linear'"):
            gradient_masks.gradient_mask(draw(1, 9), 95.0, "linnear")

    def test_the_random_mask_keeps_as_many_elsewhere(self) -> None:
        chosen = gradient_masks.gradient_mask(draw(3, 7, 8, 8), torch.tensor([70.0, 90.0, 95.0]))[0]
        noise = torch.rand(3, 7, 8, 8, generator=torch.Generator().manual_seed(3))
        found = gradient_masks.random_mask(chosen, noise)
        assert torch.equal(found.flatten(1).sum(1), chosen.flatten(1).sum(1))
        for i in range(3):
            assert float(noise[i][found[i]].max()) < float(noise[i][~found[i]].min())

    def test_a_pooled_linear_head_selects_whole_channels(self, cnn: Model) -> None:
        """Behind mean pooling every cell of a channel has one gradient, w / cells: no place is preferred."""
        batch = make_batch(cnn, 4)
        weights = cnn.module.head.weight[batch.targets].detach()
        for percentile in (0.0, 70.0, 95.0, 100.0):
            kept = gradient_masks.gradient_mask(batch.gradients(), percentile)[0].flatten(2)
            assert torch.equal(kept.any(2), kept.all(2))
            for weight, channels in zip(weights, kept.all(2), strict=True):
                assert float(weight[channels].min()) > max(0.0, float(weight[~channels].max()))
            if percentile == 0:
                assert torch.equal(kept.all(2), weights > 0)


class TestMaskedFeatures:
    def test_of_a_cnn(self, cnn: Model) -> None:
        batch = make_batch(cnn, 3)
        masked = gradient_masks.masked_features(
            batch.context, batch.targets, cnn.target_layer, percentiles=80.0
        )
        assert masked.layout == Layout("body", False, 6, (8, 8), (32, 32))
        kept = slow_scan.mask(batch.gradients()[1].double().numpy(), 80.0)
        assert np.array_equal(
            masked.values[1].numpy(), batch.activations()[1].numpy() * kept.astype(np.float32)
        )

    def test_of_a_transformer_all_tokens_count(self, vit: Model) -> None:
        batch = make_batch(vit, 2)
        name = gradient_masks.analysed_layer(vit)
        masked = gradient_masks.masked_features(batch.context, batch.targets, name, percentiles=90.0)
        assert masked.values.shape == (2, 65, 64) and masked.layout.tokens and masked.layout.grid == (8, 8)
        outputs, gradients = batch.context.outputs(name), batch.context.output_gradients(batch.targets, name)
        assert torch.equal(vit.features(outputs, name), batch.activations(name))
        kept = slow_scan.mask(gradients[0].double().numpy(), 90.0)
        assert np.array_equal(masked.values[0].numpy(), outputs[0].numpy() * kept.astype(np.float32))
        assert kept[0].any()  # the class token's gradient is among the largest

    def test_one_forward_and_one_backward(self, model: Model, batch: Batch) -> None:
        fresh = batch.select(range(4))
        with model.counting() as meter:
            gradient_masks.masked_features(fresh.context, batch.targets, gradient_masks.analysed_layer(model))
        assert (meter.forwards, meter.backwards) == (4, 4)
        with model.counting() as meter:
            gradient_masks.layout_of(model)
        assert (meter.forwards, meter.backwards) == (0, 0)

    def test_no_mask_takes_no_gradient(self, cnn: Model) -> None:
        batch = make_batch(cnn, 3).select(range(3))
        with cnn.counting() as meter:
            masked = gradient_masks.masked_features(
                batch.context, batch.targets, cnn.target_layer, mask="none"
            )
        assert meter.backwards == 0
        assert torch.equal(masked.values, batch.activations())

    def test_the_gradient_of_a_probability(self, cnn: Model) -> None:
        batch = make_batch(cnn, 3)
        features = batch.activations().clone().requires_grad_()
        logits = cnn.module.head(features.mean((2, 3)))
        chosen = logits.softmax(1).gather(1, batch.targets[:, None]).sum()
        (expected,) = torch.autograd.grad(chosen, features)
        assert torch.allclose(batch.gradients(score="probability"), expected, atol=1e-8)
        assert not torch.allclose(batch.gradients(), expected, atol=1e-4)
        with pytest.raises(RequestError, match="unknown score 'logits'; did you mean 'logit'"):
            batch.gradients(score="logits")

    def test_wrong_requests_are_named(self, cnn: Model) -> None:
        batch = make_batch(cnn, 1)
        with pytest.raises(RequestError, match="unknown mask 'gradients'; did you mean 'gradient'"):
            gradient_masks.masked_features(batch.context, batch.targets, cnn.target_layer, mask="gradients")
        with pytest.raises(RequestError, match="the random mask takes noise"):
            gradient_masks.masked_features(batch.context, batch.targets, cnn.target_layer, mask="random")

    def test_the_layer_is_the_block_halfway_up(self) -> None:
        import timm
        import torchvision

        with torch.device("meta"):
            networks = {
                "blocks.5": timm.create_model("vit_tiny_patch16_224"),
                "blocks.11": timm.create_model("vit_large_patch16_224"),
                "encoder.layers.encoder_layer_5": torchvision.models.vit_b_16(),
            }
            assert middle_block(timm.create_model("test_resnet")) is None
        for name, network in networks.items():
            assert middle_block(network) == name
        cnn = make_cnn()
        assert gradient_masks.analysed_layer(cnn) == cnn.target_layer
        assert gradient_masks.analysed_layer(cnn, "stem") == "stem"


class TestStretchingSine:
    def test_values_by_hand(self) -> None:
        peak = 2 / (1 - 0.15 / 4)
        assert peak == pytest.approx(2.0779, abs=1e-4)
        found = reconstruction.stretching_sine(torch.tensor([0.0, peak, -peak, 0.0]).double())
        assert found.tolist() == pytest.approx([0.5, 1.0, 0.0, 0.5])
        assert float(reconstruction.stretching_sine(torch.tensor(3.2).double(), 1.5)) == pytest.approx(1.0)

    @pytest.mark.parametrize("stretch", [0.0, 0.15, 1.5])
    def test_equals_the_printed_form(self, stretch: float) -> None:
        x = torch.linspace(-40, 40, 1001).double()
        expected = [slow_scan.stretching_sine(float(value), stretch) for value in x]
        assert reconstruction.stretching_sine(x, stretch).numpy() == pytest.approx(expected, abs=1e-12)

    def test_slope_at_zero_and_ends(self) -> None:
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        reconstruction.stretching_sine(x).backward()
        assert x.grad is not None and float(x.grad) == pytest.approx(math.pi / 8)
        ends = reconstruction.stretching_sine(torch.tensor([1e9, -1e9]).double())
        assert ends.tolist() == pytest.approx([0.0670, 0.9330], abs=1e-3)

    def test_its_ablation_and_wrong_names(self) -> None:
        x = draw(5)
        assert torch.equal(reconstruction.confidence_of(x, "sigmoid"), x.sigmoid())
        with pytest.raises(RequestError, match="unknown squash 'sin'; did you mean 'sine'"):
            reconstruction.confidence_of(x, "sin")
        with pytest.raises(RequestError, match="stretch: got -1"):
            reconstruction.confidence_of(x, stretch=-1.0)


class TestTarget:
    @pytest.mark.parametrize(("cells", "taps"), [(7, 65), (14, 33), (28, 17), (56, 9)])
    def test_the_published_kernels(self, cells: int, taps: int) -> None:
        row = reconstruction.blur_matrix(224, cells, 1.0)[112]
        assert int((row > 0).sum()) == taps
        expected = slow_scan.kernel(224, cells, 1.0)
        assert row[row > 0].numpy() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("factor", [0.5, 1.0])
    def test_equals_the_slow_blur(self, factor: float) -> None:
        images = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0))
        found = reconstruction.blurred_target(images, (4, 3), factor)
        for one, image in zip(found.numpy(), images.double().numpy(), strict=True):
            assert one == pytest.approx(slow_scan.blurred(image, (4, 3), factor), abs=1e-5)

    def test_no_blur_and_plain_images(self) -> None:
        images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        assert torch.equal(reconstruction.blurred_target(images, (4, 4), 0.0), 2 * images - 1)
        plain = torch.full((1, 3, 32, 32), 0.25)
        assert reconstruction.blurred_target(plain, (2, 2)).numpy() == pytest.approx(-0.5, abs=1e-5)
        with pytest.raises(RequestError, match="blur: got -1"):
            reconstruction.blurred_target(images, (4, 4), -1.0)


def parts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A confidence, a reconstruction and a target of two images."""
    return (
        draw(2, 5, 4, seed=seed).sigmoid(),
        draw(2, 3, 5, 4, seed=seed + 1),
        draw(2, 3, 5, 4, seed=seed + 2).tanh(),
    )


class TestLosses:
    def test_areas_and_their_deviation(self) -> None:
        assert [reconstruction.target_area(a) for a in (1, 2, 4, 8, 16)] == pytest.approx(
            [1 / 2, 1 / 3, 1 / 5, 1 / 9, 1 / 17]
        )
        deviation = reconstruction.area_deviation(torch.tensor([0.5, 0.2, 0.0, 1.0]).double(), 0.2)
        assert deviation[:2].tolist() == pytest.approx([0.36, 0.0])
        assert bool((deviation[2:] > 1e6).all()) and bool(torch.isfinite(deviation).all())

    @pytest.mark.parametrize("weighting", reconstruction.WEIGHTINGS)
    @pytest.mark.parametrize(("alpha", "flexibility"), [(4.0, 0.1), (1.0, 0.0), (8.0, 0.5)])
    def test_equal_the_slow_ones(self, weighting: str, alpha: float, flexibility: float) -> None:
        confidence, colours, target = parts()
        found = reconstruction.losses(
            confidence, colours, target, alpha=alpha, flexibility=flexibility, weighting=weighting
        )
        weight = alpha if weighting == "amplified" else 1 / alpha
        for i in range(2):
            arrays = (tensor[i].numpy() for tensor in (confidence, colours, target))
            confident, weighted = slow_scan.losses(*arrays, alpha, flexibility, weight)
            assert float(found.confidence[i]) == pytest.approx(confident)
            assert float(found.reconstruction[i]) == pytest.approx(weighted)
            assert float(found.total[i]) == pytest.approx(confident + weighted)

    def test_twice_the_error_at_alpha_one_and_half_the_area(self) -> None:
        _, colours, target = parts()
        found = reconstruction.losses(torch.full((2, 5, 4), 0.5).double(), colours, target, alpha=1.0)
        assert torch.allclose(found.total, 2 * found.error)

    @pytest.mark.parametrize(("weighting", "weight"), [("amplified", 4.0), ("discounted", 0.25)])
    def test_who_gains_by_confidence(self, weighting: str, weight: float) -> None:
        """dL / dC_i = (omega'(m) (MSE + lambda) + (w - 1) e_i) / pixels: 9a pays for a small e, 9b not."""
        confidence, colours, target = parts()
        confidence.requires_grad_()
        found = reconstruction.losses(confidence, colours, target, weighting=weighting)
        (gradient,) = torch.autograd.grad(found.total.sum(), confidence)
        mean = confidence.detach().mean((1, 2)).requires_grad_()
        (slope,) = torch.autograd.grad(reconstruction.area_deviation(mean, 0.2).sum(), mean)
        errors = (target - colours).square().mean(1)
        expected = ((slope * (found.error + 0.1))[:, None, None] + (weight - 1) * errors) / 20
        assert torch.allclose(gradient, expected.detach())

    def test_wrong_requests_are_named(self) -> None:
        with pytest.raises(RequestError, match="unknown weighting 'amplify'; did you mean 'amplified'"):
            reconstruction.losses(*parts(), weighting="amplify")
        with pytest.raises(RequestError, match="alpha: got 0, expected a positive number"):
            reconstruction.losses(*parts(), alpha=0.0)
        with pytest.raises(RequestError, match="flexibility: got -1"):
            reconstruction.losses(*parts(), flexibility=-1.0)


class TestToldApart:
    def test_is_the_mean_correlation_over_cells(self) -> None:
        confidence, colours, target = torch.rand(3, 8, 12), torch.rand(3, 3, 8, 12), torch.rand(3, 3, 8, 12)
        found = reconstruction.told_apart(confidence, colours, target, (4, 3))
        slow = []
        for c, r, t in zip(confidence.numpy(), colours.numpy(), target.numpy(), strict=True):
            error = ((t - r) ** 2).mean(0)
            cells = [
                [each[2 * y : 2 * y + 2, 4 * x : 4 * x + 4].mean() for y in range(4) for x in range(3)]
                for each in (c, error)
            ]
            slow.append(np.corrcoef(cells)[0, 1])
        assert float(found) == pytest.approx(np.mean(slow), abs=1e-5)

    def test_an_even_confidence_tells_nothing_and_patterns_within_a_cell_do_not_count(self) -> None:
        colours, target = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
        assert float(
            reconstruction.told_apart(torch.full((2, 8, 8), 0.3), colours, target, (4, 4))
        ) == pytest.approx(0, abs=1e-5)
        checks = torch.tensor([[0.1, 0.5], [0.5, 0.1]]).repeat(4, 4).expand(2, 8, 8)
        assert float(reconstruction.told_apart(checks, colours, target, (4, 4))) == pytest.approx(0, abs=1e-5)
        squared = (target - colours).square().mean(1)
        assert float(reconstruction.told_apart(-squared, colours, target, (4, 4))) == pytest.approx(
            -1, abs=1e-4
        )
