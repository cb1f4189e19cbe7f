"""Cuts of networks: which layers are, how features lie in them, and tails that skip what lies before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_batch, make_cnn, make_vit
from planted_channels import planted, planted_batch
from torch import nn

from faithmap import bottleneck
from faithmap.cuts import NetworkTail, PooledTail, cut_at, tail_of
from faithmap.errors import RequestError
from faithmap.explaining import HOOK_KINDS
from faithmap.models import Model


def small(network: nn.Module, layer: str, side: int = 16) -> Model:
    return Model(network.eval(), mean=0.5, std=0.5, input_size=side, target_layer=layer)


class Residual(nn.Module):
    """Two blocks with a way round each, and something to read them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.blocks = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(2)])
        self.join = nn.ModuleList([nn.Identity() for _ in range(2)])
        self.act = nn.GELU()
        self.head = nn.Linear(6, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        for block, join in zip(self.blocks, self.join, strict=True):
            x = join(x + self.act(block(x)))
        logits: torch.Tensor = self.head(self.act(x).mean((2, 3)))
        return logits


class TestWhere:
    def test_a_cnn_is_cut_at_its_target_layer(self, cnn: Model) -> None:
        cut = cut_at(cnn)
        assert (cut.layer, cut.head, cut.signed) == ("body", "head", False)
        assert (cut.layout.order, cut.layout.grid, cut.layout.prefix) == ("first", (8, 8), ())

    def test_a_transformer_is_cut_before_its_last_block(self, vit: Model) -> None:
        last = int(vit.target_layer.split(".")[1])
        cut = cut_at(vit)
        assert (cut.layer, cut.head, cut.signed) == (f"blocks.{last - 1}", None, True)
        assert (cut.layout.order, cut.layout.prefix, cut.layout.patches[:2]) == ("tokens", (0,), (1, 2))

    def test_what_is_no_cut_is_refused_and_cuts_are_named(self, vit: Model) -> None:
        with pytest.raises(RequestError, match=r"no cut .* these layers are cuts: blocks\.1, blocks\.\d"):
            cut_at(vit, "blocks.1.norm1")
        with pytest.raises(RequestError, match=r"no cut .* these layers are cuts: blocks\.1"):
            cut_at(vit, "blocks.1.attn.proj")

    @pytest.mark.parametrize("layer", ["blocks.1", "blocks.0", "join.0", "join.1", "stem"])
    def test_a_way_round(self, layer: str) -> None:
        model = small(Residual(), "join.1")
        if layer.startswith("blocks"):
            with pytest.raises(RequestError, match=r"no cut of model .* cuts: join\.1"):
                cut_at(model, layer)
        else:
            assert cut_at(model, layer).layer == layer

    def test_asked_once_for_each_model_layer_and_size(
        self, cnn: Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut = cut_at(cnn)
        monkeypatch.setattr(cnn.module, "forward", None)
        assert cut_at(cnn) is cut
        with pytest.raises(TypeError):
            cut_at(cnn, "stem")

    def test_nothing_is_counted_or_left_behind(self, model: Model) -> None:
        before = model.digest()
        with model.counting() as meter:
            tail_of(model, cut_at(model))
        assert (meter.forwards, meter.backwards) == (0, 0)
        assert not any(getattr(module, kind) for module in model.modules() for kind in HOOK_KINDS)
        model._digest = ""
        assert model.digest() == before

    def test_a_layer_that_runs_twice_never_or_is_not_there(self) -> None:
        network = Residual()
        network.idle = nn.Conv2d(3, 3, 1)
        model = small(network, "join.1")
        for layer, message in (("act", "more than once"), ("idle", "in no pass"), ("jion.1", "join.1")):
            with pytest.raises(RequestError, match=message):
                cut_at(model, layer)

    def test_features_that_are_computed_are_refused(self, vit: Model) -> None:
        def doubled(tokens: torch.Tensor) -> torch.Tensor:
            return 2 * tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, 8, 8)

        model = Model(vit.module, mean=0.5, std=0.5, input_size=32, reshape=doubled)
        with pytest.raises(RequestError, match="only moves values"):
            cut_at(model)


class TestLayout:
    @pytest.mark.parametrize("make", [make_cnn, make_vit])
    def test_units_there_and_back(self, make: Callable[[], Model]) -> None:
        model = make()
        batch, layout = make_batch(model, 2), cut_at(model).layout
        output = batch.context.outputs(cut_at(model).layer)
        units = layout.units(output)
        assert torch.equal(layout.output(units), output)
        patches = units[:, :, list(layout.patches)].unflatten(2, layout.grid)
        assert torch.equal(patches, batch.activations(cut_at(model).layer))

    def test_maps_that_hold_their_channels_last(self) -> None:
        class Last(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.stem = nn.Conv2d(3, 5, 4, stride=4)
                self.turn = nn.Identity()
                self.head = nn.Linear(5, 3)

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                maps: torch.Tensor = self.turn(self.stem(images).permute(0, 2, 3, 1))
                logits: torch.Tensor = self.head(maps.mean((1, 2)))
                return logits

        model = Model(Last(), mean=0.5, std=0.5, input_size=(32, 48), target_layer="turn")
        cut = cut_at(model)
        assert (cut.layout.order, cut.layout.grid, cut.head) == ("last", (8, 12), "head")
        images = torch.rand(2, 3, 32, 48)
        units = cut.layout.units(
            model.module.turn(model.module.stem(model.normalise(images)).permute(0, 2, 3, 1))
        )
        assert torch.allclose(NetworkTail(model, cut).logits(units), model(images), atol=1e-6)

    def test_patches_before_other_tokens(self, vit: Model) -> None:
        model = Model(
            vit.module, mean=0.5, std=0.5, input_size=32,
            reshape=lambda tokens: tokens[:, :64].transpose(1, 2).reshape(len(tokens), -1, 8, 8),
        )  # fmt: skip
        layout = cut_at(model).layout
        assert layout.patches == tuple(range(64)) and layout.prefix == (64,)


def network(name: str) -> Model:
    import timm

    torch.manual_seed(0)
    return Model(timm.create_model(name, num_classes=7), mean=0.5, std=0.5, input_size=64, name=name)


class TestTails:
    @pytest.mark.parametrize(
        "name", ["test_resnet", "test_convnext", "test_efficientnet", "cnn", "vit", "residual"]
    )
    @pytest.mark.parametrize("early", [False, True])
    def test_equals_the_whole_network_without_what_lies_before(self, name: str, early: bool) -> None:
        makers = {"cnn": make_cnn, "vit": make_vit, "residual": lambda: small(Residual(), "join.1")}
        model = makers[name]() if name in makers else network(name)
        layers = {"test_resnet": "layer2", "test_convnext": "stages.1", "test_efficientnet": "blocks.1",
                  "cnn": "body", "vit": "blocks.0", "residual": "join.0"}  # fmt: skip
        cut = cut_at(model, layers[name] if early else None)
        assert cut.blanks  # something need not run
        batch = make_batch(model, 3)
        units = cut.layout.units(batch.context.outputs(cut.layer))
        ran: list[str] = []
        handles = [
            model.layer(part).register_forward_hook(lambda *_, part=part: ran.append(part))
            for part, _ in cut.blanks
        ]
        with model.counting() as meter:
            found = NetworkTail(model, cut).logits(units)
        for handle in handles:
            handle.remove()
        assert torch.allclose(found, batch.logits, atol=1e-5) and not ran
        assert meter.forwards == 3
        other = bottleneck.logits_with(model, batch.images, batch.activations(cut.layer).flip(0), cut.layer)
        if not cut.layout.prefix:
            assert torch.allclose(NetworkTail(model, cut).logits(units.flip(0)), other, atol=1e-5)

    def test_gradients_and_their_count(self, model: Model) -> None:
        cut, batch = cut_at(model), make_batch(model, 2)
        leaf = cut.layout.units(batch.context.outputs(cut.layer)).clone().requires_grad_()
        with model.counting() as meter:
            logits = NetworkTail(model, cut).logits(leaf)
            (gradient,) = torch.autograd.grad(logits.gather(1, batch.targets.view(-1, 1)).sum(), leaf)
        assert (meter.forwards, meter.backwards) == (2, 2)
        expected = batch.gradients(cut.layer).flatten(2)
        assert torch.allclose(gradient[:, :, list(cut.layout.patches)], expected, atol=1e-5)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.is_grad_enabled()

    def test_a_network_that_looks_at_what_it_computed_runs_whole(self) -> None:
        class Looking(nn.Module):
            def __init__(self, strict: bool) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.strict = strict
                self.stem, self.body = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(4, 4, 1)
                self.head = nn.Linear(4, 3)

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                x = self.stem(images)
                if not bool(x.any()):
                    if self.strict:
                        raise ValueError("nothing to see")
                    return torch.zeros(len(images), 3)
                logits: torch.Tensor = self.head(self.body(x).relu().mean((2, 3)))
                return logits

        for strict in (True, False):
            model = small(Looking(strict), "body")
            cut, batch = cut_at(model), make_batch(model, 2)
            assert cut.blanks == () and cut.head is None
            units = cut.layout.units(batch.context.outputs())
            assert torch.allclose(NetworkTail(model, cut).logits(units), batch.logits, atol=1e-6)

    def test_an_error_of_the_network_is_passed_on(self, vit: Model) -> None:
        tail = NetworkTail(vit, cut_at(vit))
        with pytest.raises(RuntimeError):
            tail.logits(torch.zeros(1, 3, 65))
        assert torch.is_grad_enabled()

    def test_weights_are_read_when_asked(self, cnn: Model) -> None:
        cut, batch = cut_at(cnn), make_batch(cnn, 2)
        tails = [PooledTail(cnn, cut), NetworkTail(cnn, cut)]
        nn.init.normal_(cnn.module.head.weight)
        units = cut.layout.units(batch.context.outputs())
        expected = cnn(batch.images)
        assert torch.allclose(tails[1].logits(units), expected, atol=1e-5)
        assert torch.allclose(tails[0].logits(units.mean(2)), expected, atol=1e-5)

    def test_reduced_precision(self, model: Model) -> None:
        cut, batch = cut_at(model), make_batch(model, 2)
        model.precision = "bf16"
        units = cut.layout.units(batch.context.outputs(cut.layer)).float()
        logits = NetworkTail(model, cut).logits(units)
        assert logits.dtype == torch.float32
        assert torch.allclose(logits, model(batch.images), atol=0.05 * float(logits.abs().max()))

    def test_double_precision(self, model: Model) -> None:
        model.double()
        cut = cut_at(model)
        images = torch.rand(2, 3, *model.input_size, dtype=torch.float64)
        units = cut.layout.units(_output(model, images, cut.layer))
        assert torch.allclose(NetworkTail(model, cut).logits(units), model(images), atol=1e-6)


def _output(model: Model, images: torch.Tensor, layer: str) -> torch.Tensor:
    from faithmap.context import Context

    return Context(model, images).outputs(layer)


class TestPooled:
    def test_found_only_where_it_is_all_of_the_tail(self) -> None:
        class Tail(nn.Module):
            def __init__(self, inner: Callable[[torch.Tensor], torch.Tensor]) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, maps: torch.Tensor) -> torch.Tensor:
                return self.inner(maps)

        harmless: list[Any] = [lambda x: x, lambda x: x.contiguous()]
        others: list[Any] = [
            torch.relu, torch.tanh, lambda x: x * 2, lambda x: x.square(), lambda x: x[:, :, 1:],
            lambda x: x.clamp_max(2.0), lambda x: x + 0.3, lambda x: x.roll(1, 1),
        ]  # fmt: skip
        assert all(cut_at(planted(tail=Tail(inner))).head == "fc" for inner in harmless)
        assert all(cut_at(planted(tail=Tail(inner))).head is None for inner in others)

    def test_max_pooling_is_not_mean_pooling(self) -> None:
        class Peak(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = self.head(self.body(images).amax((2, 3)))
                return logits

        assert cut_at(small(Peak(), "body")).head is None

    def test_noise_of_the_mean_is_that_of_the_features(self) -> None:
        model = planted()
        cut, batch = cut_at(model), planted_batch(model, 1)
        units = cut.layout.units(batch.context.outputs())
        spread = torch.rand(units.shape, generator=torch.Generator().manual_seed(0))
        pooled, whole = PooledTail(model, cut), NetworkTail(model, cut)
        centre, std = pooled.summarise(units, spread)
        assert torch.allclose(pooled.logits(centre), whole.logits(units), atol=1e-5)
        noise = torch.randn(2000, *units.shape[1:], generator=torch.Generator().manual_seed(1))
        drawn = whole.logits(units + spread * noise)
        weight = model.module.fc.weight.detach()
        exact = (weight.square() * std.square()).sum(1).sqrt()
        assert torch.allclose(drawn.std(0), exact, rtol=0.05)
        assert torch.allclose(
            drawn.mean(0), pooled.logits(centre)[0], atol=4 * float(exact.max()) / 2000**0.5
        )

    def test_no_spread_gives_no_nan(self) -> None:
        model = planted()
        leaf = torch.zeros(1, 75, 64, requires_grad=True)
        _, std = PooledTail(model, cut_at(model)).summarise(leaf, leaf)
        (gradient,) = torch.autograd.grad(std.sum(), leaf)
        assert float(std.detach().max()) <= 1e-9 and not gradient.any()
