"""SCAN's analysis networks: their size and shape, against slow rewrites and torch's layers."""

from __future__ import annotations

import pytest
import torch
from conftest import draw, make_batch, make_cnn, make_vit
from torch import nn

from faithmap import decoders, gradient_masks, registry
from faithmap.context import Context
from faithmap.decoders import Block, Residual, build_decoder, seeded_decoder
from faithmap.errors import RequestError
from faithmap.explaining import EVERYTHING, undefined
from faithmap.gradient_masks import Layout
from faithmap.models import Model


def count(layout: Layout, width: float = 1.0) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_decoder(layout, width).parameters())


def maps(channels: int, grid: tuple[int, int], size: tuple[int, int]) -> Layout:
    return Layout("layer", False, channels, grid, size)


def tokens(channels: int, grid: tuple[int, int], size: tuple[int, int]) -> Layout:
    return Layout("layer", True, channels, grid, size)


class TestDecoders:
    def test_the_published_counts_of_parameters(self) -> None:
        assert count(maps(2048, (7, 7), (224, 224))) == 8_257_668
        assert count(maps(1024, (14, 14), (224, 224))) == 3_978_116
        assert count(tokens(768, (14, 14), (224, 224))) == 31_080_164

    def test_narrow_ones_are_small_files(self) -> None:
        for width in (0.125, 0.25, 0.5):
            for layout in (maps(64, (12, 12), (96, 96)), tokens(64, (12, 12), (96, 96))):
                assert 2 * count(layout, width) < 1_000_000

    @pytest.mark.parametrize("kind", [maps, tokens])
    @pytest.mark.parametrize(
        ("grid", "size"),
        [((2, 2), (2, 2)), ((4, 4), (8, 8)), ((3, 2), (24, 16)), ((2, 3), (64, 96)), ((1, 2), (64, 128))],
    )
    def test_any_power_of_two_and_any_proportions(
        self, kind: type, grid: tuple[int, int], size: tuple[int, int]
    ) -> None:
        decoder = seeded_decoder(kind(10, grid, size), 0.1, 0, torch.device("cpu")).eval()
        shape = (2, 3 + grid[0] * grid[1], 10) if kind is tokens else (2, 10, *grid)
        with torch.no_grad():
            assert decoder(draw(*shape).float(), grid).shape == (2, 4, *size)

    @pytest.mark.parametrize(
        ("grid", "size"), [((7, 7), (96, 96)), ((8, 8), (32, 64)), ((16, 16), (8, 8)), ((3, 3), (13, 13))]
    )
    def test_other_sizes_are_refused(self, grid: tuple[int, int], size: tuple[int, int]) -> None:
        with pytest.raises(RequestError, match="expected a power of two times the features along both axes"):
            build_decoder(maps(4, grid, size))

    @pytest.mark.parametrize("kind", [maps, tokens])
    @pytest.mark.parametrize(("side", "width"), [(64, 0.25), (96, 0.25), (128, 1.0), (224, 1.0)])
    def test_small_images_get_a_narrow_decoder_unless_a_width_is_given(
        self, kind: type, side: int, width: float
    ) -> None:
        layout = kind(48, (side // 8, side // 8), (side, side))
        shapes = [[p.shape for p in build_decoder(layout, w).parameters()] for w in (None, width, 0.5)]
        assert shapes[0] == shapes[1] != shapes[2]

    def test_skips_around_the_pairs_can_be_left_out(self) -> None:
        layout, features = maps(6, (4, 4), (8, 8)), draw(2, 6, 4, 4).float()
        decoders = [
            seeded_decoder(layout, 0.1, 0, torch.device("cpu"), skips=s).eval() for s in (True, False)
        ]
        for skips, decoder in zip((1, 0), decoders, strict=True):
            first, second = decoder.rungs
            with torch.no_grad():
                x = decoder.first(decoder.enter(features))
                x = decoder.doublings[0](skips * x + first.pair(x))
                x = skips * x + second.pair(x)
                expected = decoder.leave(decoder.last(x))
                torch.testing.assert_close(decoder(features, (4, 4)), expected)
        weights, others = (decoder.state_dict() for decoder in decoders)
        assert all(torch.equal(weights[name], others[name]) for name in weights)

    def test_a_width_must_be_positive(self) -> None:
        with pytest.raises(RequestError, match="width: got 0, expected above 0"):
            build_decoder(maps(4, (4, 4), (8, 8)), 0.0)

    def test_prefix_tokens_are_read_and_dropped(self) -> None:
        layout = tokens(16, (2, 3), (8, 12))
        decoder = seeded_decoder(layout, 0.25, 0, torch.device("cpu")).eval()
        given = draw(1, 7, 16).float()
        with torch.no_grad():
            whole = decoder(given, (2, 3))
            assert not torch.allclose(whole, decoder(given[:, 1:], (2, 3)), atol=1e-4)
            given[:, [1, 2]] = given[:, [2, 1]]  # without positions, patches may change places
            swapped = decoder(given, (2, 3))
        assert not torch.allclose(swapped, whole, atol=1e-4)

    def test_a_residual_module_by_hand(self) -> None:
        module = Residual(6).eval()
        x = draw(2, 6, 5, 5).float()
        y = x
        for norm, conv in (
            (module.norm0, module.conv0),
            (module.norm1, module.conv1),
            (module.norm2, module.conv2),
        ):
            y = conv(
                (y - norm.running_mean[:, None, None])
                / (norm.running_var[:, None, None] + norm.eps).sqrt()
                * (y > 0)
            )
        assert torch.allclose(module(x), x + y, atol=1e-5)
        assert (module.conv0.out_channels, module.conv1.kernel_size, module.conv2.out_channels) == (
            3,
            (3, 3),
            6,
        )

    @pytest.mark.parametrize("kind", [maps, tokens])
    def test_folded_norms_change_nothing(self, kind: type) -> None:
        decoder = seeded_decoder(kind(12, (4, 4), (16, 16)), 0.25, 0, torch.device("cpu"))
        given = draw(6, 17, 12).float() if kind is tokens else draw(6, 12, 4, 4).float()
        with torch.no_grad():
            for module in decoder.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(-2, 2, generator=torch.Generator().manual_seed(1))
                    module.bias.normal_(generator=torch.Generator().manual_seed(2))
            for _ in range(5):
                decoder(given, (4, 4))  # running statistics that are not the first ones
            expected = decoder.eval()(given, (4, 4))
            decoders.fold_norms(decoder)
            assert torch.allclose(decoder(given, (4, 4)), expected, atol=1e-4 * float(expected.abs().max()))
            decoders.fold_norms(decoder)  # a second time does nothing
            assert torch.allclose(decoder(given, (4, 4)), expected, atol=1e-4 * float(expected.abs().max()))
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in decoder.modules())
        assert norms == sum(isinstance(module, Residual) for module in decoder.modules())

    def test_an_attention_block_equals_torchs_layer(self) -> None:
        torch.manual_seed(0)
        block = Block(128, 128)
        layer = nn.TransformerEncoderLayer(128, 2, 512, dropout=0.0, activation="gelu", batch_first=True)
        for mine, theirs in (
            (block.project, layer.self_attn.out_proj), (block.norm0, layer.norm1), (block.norm1, layer.norm2),
            (block.widen, layer.linear1), (block.narrow, layer.linear2),
        ):  # fmt: skip
            theirs.load_state_dict(mine.state_dict())
        layer.self_attn.in_proj_weight.data.copy_(block.mix.weight)
        layer.self_attn.in_proj_bias.data.copy_(block.mix.bias)
        assert block.heads == 2
        x = draw(2, 9, 128).float()
        assert torch.allclose(block(x), layer(x), atol=1e-5)

    def test_seeded_without_touching_the_global_state(self) -> None:
        layout = maps(6, (4, 4), (16, 16))
        torch.manual_seed(5)
        before = torch.get_rng_state()
        one, two, other = (seeded_decoder(layout, 0.25, seed, torch.device("cpu")) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        states = [decoder.state_dict() for decoder in (one, two, other)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])

    def test_the_initialisation_is_torchs(self) -> None:
        """The same spread as a layer that torch makes, and norms that change nothing."""
        decoder = seeded_decoder(maps(64, (4, 4), (8, 8)), 1.0, 0, torch.device("cpu"))
        for module in decoder.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.numel() > 1000:
                torch.manual_seed(0)
                fresh = type(module)(module.in_channels, module.out_channels, module.kernel_size)
                for mine, theirs in ((module.weight, fresh.weight), (module.bias, fresh.bias)):
                    largest, expected = (float(one.detach().abs().max()) for one in (mine, theirs))
                    assert largest == pytest.approx(expected, rel=0.2)
            if isinstance(module, nn.BatchNorm2d):
                assert module.weight.eq(1).all() and module.bias.eq(0).all()
                assert module.running_mean.eq(0).all() and module.running_var.eq(1).all()

    @pytest.mark.parametrize("make", [make_cnn, make_vit])
    def test_in_bf16(self, make: object) -> None:
        model = make()  # type: ignore[operator]
        layout = gradient_masks.layout_of(model)
        decoder = seeded_decoder(layout, 0.25, 0, torch.device("cpu")).eval()
        batch = make_batch(model, 3)
        masked = gradient_masks.masked_features(batch.context, batch.targets, layout.layer)
        single = decoders.decode_batch(decoder, model, masked)
        model.precision = "bf16"
        half = decoders.decode_batch(decoder, model, masked)
        assert half.dtype == torch.float32 and bool(torch.isfinite(half).all())
        assert 0 < float((half - single).abs().max()) < 0.1 * float(single.max() - single.min())

    def test_images_of_another_size_are_refused(self, cnn: Model) -> None:
        layout = gradient_masks.layout_of(cnn)
        decoder = seeded_decoder(layout, 0.25, 0, torch.device("cpu")).eval()
        small = Context(cnn, torch.rand(1, 3, 48, 32, generator=torch.Generator().manual_seed(0)))
        masked = gradient_masks.masked_features(small, torch.zeros(1).long(), layout.layer)
        assert decoders.decode_batch(decoder, cnn, masked).shape == (1, 4, 48, 32)
        early = gradient_masks.masked_features(small, torch.zeros(1).long(), "stem")
        with pytest.raises(RequestError, match="the decoder enlarges features 4 times"):
            decoders.decode_batch(decoder, cnn, early)

    def test_why_none_fits(self, cnn: Model) -> None:
        assert decoders.misfit(cnn) is None
        odd = Model(cnn.module, mean=0.5, std=0.5, input_size=30)
        assert "power of two" in str(decoders.misfit(odd))

    @pytest.mark.parametrize("name", ["scan", "scan-untrained"])
    def test_another_layer_may_fit_where_the_last_does_not(self, name: str) -> None:
        """30 pixels: 15 cells after the first convolution, 8 after the second."""
        plugin = registry.get("explainer", name)
        odd, even = (
            Model(make_cnn().module, mean=0.5, std=0.5, input_size=size, target_layer="body")
            for size in (30, 32)
        )
        for layer, fits in ((None, False), ("body", False), ("stem", True)):
            reason = undefined(plugin, odd, EVERYTHING, plugin.check({"layer": layer}))
            assert (reason == "") == fits and ("power of two" in reason) != fits
        assert "no layer 'nowhere'" in undefined(plugin, even, EVERYTHING, plugin.check({"layer": "nowhere"}))
