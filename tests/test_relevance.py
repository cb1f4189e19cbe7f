"""Relevance propagation: every rule against loops by hand, and conservation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_batch, make_cnn, make_vit
from relevance_nets import (
    HIGH,
    LOW,
    Block,
    TwoLayers,
    images_of,
    logits_of,
    one_block,
    residual,
    weights_of,
    wrap,
)
from torch import Tensor, nn
from torch.nn import functional as F

import slow_relevance
from faithmap import relevance
from faithmap._relevance_tracer import Tracer
from faithmap.models import Model
from faithmap.relevance import Rule, Rules, chefer_rules, image_relevance, layer_relevance, why_not

EXACT = Rule("epsilon", epsilon=0.0)
TAYLOR = Rules(Rule("gamma", gamma=0.05), Rule("gamma"), attention=EXACT, softmax="taylor")

RULES = [
    Rule("epsilon", epsilon=0.0), Rule("epsilon", epsilon=0.3), Rule("alpha-beta", alpha=1.0),
    Rule("alpha-beta", alpha=2.0), Rule("gamma", gamma=0.25, epsilon=0.0),
]  # fmt: skip


class TestRulesByHand:
    @pytest.mark.parametrize("rule", RULES, ids=str)
    @pytest.mark.parametrize("first", ["same", "box", "flat"])
    def test_two_layers(self, rule: Rule, first: str) -> None:
        torch.manual_seed(0)
        model = wrap(TwoLayers()).double()
        images = images_of(model)
        reads = rule if first == "same" else Rule(first)
        got = image_relevance(model, images, torch.tensor([2, 0]), Rules(rule, rule, reads))
        w = weights_of(model)
        matrix = slow_relevance.unrolled(w["conv.weight"], 8, 2, 1)
        reach = slow_relevance.unrolled(w["conv.weight"], 8, 2, 1, blank=np.nan)
        bias = np.repeat(w["conv.bias"], 16)
        for i, target in enumerate((2, 0)):
            x = model.normalise(images[i])[0].numpy().ravel()
            hidden = np.maximum(matrix @ x + bias, 0)
            top = np.zeros(3)
            top[target] = (w["head.weight"] @ hidden + w["head.bias"])[target]
            facts = {"epsilon": rule.epsilon, "alpha": rule.alpha, "gamma": rule.gamma}
            middle = slow_relevance.dense(rule.kind, hidden, w["head.weight"], w["head.bias"], top, **facts)
            expected = slow_relevance.dense(
                reads.kind, x, reach if first == "flat" else matrix, bias, middle, **facts,
                low=np.full_like(x, LOW), high=np.full_like(x, HIGH),
            )  # fmt: skip
            assert np.abs(got[i].numpy().ravel() - expected).max() <= 1e-9 * np.abs(expected).max()

    @pytest.mark.parametrize("first", ["same", "box", "flat"])
    def test_signed_inputs_of_a_linear_layer(self, first: str) -> None:
        torch.manual_seed(1)
        for rule in RULES:
            network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
            model = wrap(network, side=2).double()
            images = images_of(model, 1)
            reads = rule if first == "same" else Rule(first)
            rules = Rules(rule, rule, reads)
            got = image_relevance(model, images, torch.tensor([1]), rules).numpy().ravel()
            x = model.normalise(images).numpy().ravel()
            weight, bias = (p.detach().numpy() for p in network.parameters())
            assert (x < 0).any() and (x > 0).any()
            top = np.zeros(3)
            top[1] = (weight @ x + bias)[1]
            expected = slow_relevance.dense(
                reads.kind, x, weight, bias, top, epsilon=rule.epsilon, alpha=rule.alpha, gamma=rule.gamma,
                low=np.full_like(x, LOW), high=np.full_like(x, HIGH),
            )  # fmt: skip
            assert np.abs(got - expected).max() <= 1e-9 * np.abs(expected).max()

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize(
        ("method", "rules"),
        [
            ("chefer", chefer_rules()), ("rescaled", chefer_rules(rescale=True)),
            ("attnlrp", Rules(
                Rule("gamma", gamma=0.05, epsilon=0), Rule("gamma", epsilon=0), attention=EXACT,
                softmax="taylor",
            )),
        ],
    )  # fmt: skip
    def test_a_block_of_a_transformer(
        self, method: str, rules: Rules, fused: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Block, "fused", fused)
        model = one_block()
        images, targets = images_of(model), torch.tensor([1, 2])
        logits = logits_of(model, images, targets)
        got = image_relevance(model, images, targets, rules)
        (attention,) = relevance.attention_relevance(model, images, targets, rules, seed="logit")
        for i in range(2):
            weights, image = slow_relevance.one_block(
                weights_of(model), model.normalise(images[i])[0].numpy(), int(targets[i]), 2,
                method="attnlrp" if method == "attnlrp" else "chefer", rescale=method == "rescaled",
                seed=float(logits[i]), low=LOW, high=HIGH,
            )  # fmt: skip
            assert np.abs(attention[i].numpy() - weights).max() <= 1e-7 * np.abs(weights).max()
            assert np.abs(got[i].numpy() - image).max() <= 1e-7 * np.abs(image).max()

    def test_softmax_by_taylor(self) -> None:
        class Soft(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return images.flatten(1).softmax(1)

        model = wrap(Soft(), side=2).double()
        images = images_of(model, 1)
        x = model.normalise(images).numpy().ravel()
        s = np.exp(x) / np.exp(x).sum()
        got = image_relevance(model, images, torch.tensor([4]), Rules(EXACT, EXACT, softmax="taylor"))
        # R_i = x_i (R_i - s_i sum_j R_j), with R = s_4 at entry 4 and zero elsewhere.
        expected = x * ((np.arange(12) == 4) * s[4] - s * s[4])
        assert np.abs(got.numpy().ravel() - expected).max() <= 1e-12

    def test_a_product_of_matrices_gives_half_to_each(self) -> None:
        class Square(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return torch.matmul(images[:, 0], images[:, 1]).flatten(1)

        model = wrap(Square(), side=2).double()
        images = images_of(model, 1)
        first, second, _ = model.normalise(images)[0].numpy()
        for epsilon in (0.0, 0.2):
            rules = Rules(EXACT, EXACT, softmax="taylor", epsilon=epsilon)
            got = image_relevance(model, images, torch.tensor([1]), rules)[0].numpy()
            top = np.zeros((2, 2))
            top[0, 1] = (first @ second)[0, 1]
            left, right = slow_relevance.product(first, second, top, epsilon)
            assert np.allclose(got, np.stack([left, right, np.zeros((2, 2))]), atol=1e-12)

    def test_the_rescaled_sum_conserves_where_shares_explode(self) -> None:
        rules = chefer_rules(rescale=True)

        class Sum(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return (images[:, 0] + images[:, 1]).flatten(1).sum(1, keepdim=True)

        model = Model(Sum(), mean=0.5, std=1.0, input_size=2).double()
        images = torch.tensor([[[[0.9, 0.1]] * 2, [[0.1 + 1e-9, 0.8]] * 2, [[0.5, 0.5]] * 2]]).double()
        a, b = model.normalise(images)[0, :2].numpy()
        left, right = slow_relevance.summands(a, b, a + b, rescale=True)
        got = image_relevance(
            model, images, torch.tensor([0]), Rules(rules.linear, rules.conv, rescale=True)
        )[0].numpy()
        assert np.allclose(got[0], left) and np.allclose(got[1], right)
        assert got.sum() == pytest.approx((a + b).sum(), rel=1e-9)


class TestConservation:
    """No biases, epsilon zero: the sum of relevance is the logit."""

    @pytest.mark.parametrize("kind", ["epsilon", "alpha-beta", "gamma"])
    @pytest.mark.parametrize("first", [None, "box", "flat"])
    def test_a_residual_net(self, kind: str, first: str | None) -> None:
        model = residual()
        images, targets = images_of(model), torch.tensor([0, 3])
        rule = Rule(kind, epsilon=0.0)
        maps = image_relevance(model, images, targets, Rules(rule, rule, first and Rule(first)))
        assert torch.allclose(maps.sum((1, 2, 3)), logits_of(model, images, targets), rtol=1e-4)

    def test_every_layer_of_a_residual_net(self) -> None:
        model = residual()
        images, targets = images_of(model), torch.tensor([1, 2])
        rules = Rules(EXACT, Rule("alpha-beta"), Rule("box"))
        found = layer_relevance(model, images, targets, rules, ["bn", "head"])
        expected = logits_of(model, images, targets)
        for name, values in found.items():
            assert torch.allclose(values.flatten(1).sum(1), expected, rtol=1e-4), name

    def test_a_resnet_of_timm(self) -> None:
        import timm

        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=5)
        nn.init.zeros_(network.fc.bias)
        model = wrap(network, side=32)
        images, targets = images_of(model), torch.tensor([0, 1])
        rules = Rules(EXACT, Rule("alpha-beta"), Rule("box"))
        expected = logits_of(model, images, targets)
        maps = image_relevance(model, images, targets, rules)
        assert torch.allclose(maps.sum((1, 2, 3)), expected, rtol=1e-4)
        layers = ["maxpool", "layer1", "layer2.0", "layer3", "layer4"]
        for name, values in layer_relevance(model, images, targets, rules, layers).items():
            assert torch.allclose(values.flatten(1).sum(1), expected, rtol=1e-4), name

    @pytest.mark.parametrize("rescale", [False, True])
    def test_a_transformer_block_by_block(self, rescale: bool) -> None:
        """Biases get nothing under these rules, and there is no token or position to get any."""
        import timm

        torch.manual_seed(0)
        network = timm.create_model(
            "test_vit", num_classes=5, img_size=32, patch_size=4, class_token=False, global_pool="avg",
            pos_embed="none",
        )  # fmt: skip
        nn.init.normal_(network.head.weight, std=0.5)
        model = wrap(network, side=32)
        images, targets = images_of(model), torch.tensor([0, 1])
        expected = logits_of(model, images, targets)
        rules = chefer_rules(rescale=rescale)
        maps = image_relevance(model, images, targets, rules)
        assert torch.allclose(maps.sum((1, 2, 3)), expected, rtol=1e-4)
        names = ["patch_embed", *(f"blocks.{i}" for i in range(6)), "blocks.2.norm1", "blocks.2.attn"]
        found = layer_relevance(model, images, targets, rules, names)
        for name in names[:-2]:
            assert torch.allclose(found[name].flatten(1).sum(1), expected, rtol=1e-4), name
        # Attention hands all that it gets to its norm, half of it through the attention weights.
        arrived = found["blocks.2.attn"].flatten(1).sum(1)
        assert torch.allclose(found["blocks.2.norm1"].flatten(1).sum(1), arrived, rtol=1e-4)
        weights = relevance.attention_relevance(model, images, targets, rules, seed="logit")[2]
        assert torch.allclose(2 * weights.flatten(1).sum(1).float(), arrived, rtol=1e-4)

    def test_windows_but_for_their_positions(self) -> None:
        """Relative positions are no function of the image: what they add to the attention keeps a share."""
        from timm.models.swin_transformer import SwinTransformer

        torch.manual_seed(0)
        network = SwinTransformer(
            img_size=32, patch_size=4, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(2, 2),
            num_classes=5,
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("relative_position_bias_table"):
                    parameter.normal_()
        model = wrap(network, side=32)
        images, targets = images_of(model), torch.tensor([0, 1])
        rules = chefer_rules()
        expected = logits_of(model, images, targets)
        maps = image_relevance(model, images, targets, rules)
        assert not torch.allclose(maps.sum((1, 2, 3)), expected, rtol=0.01)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("relative_position_bias_table"):
                    parameter.zero_()
        expected = logits_of(model, images, targets)
        maps = image_relevance(model, images, targets, rules)
        assert torch.allclose(maps.sum((1, 2, 3)), expected, rtol=1e-4)

    def test_attnlrp_but_for_the_softmax(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the constant term of the softmax keeps is accounted for; no biases elsewhere."""
        model = one_block()
        with torch.no_grad():
            for name, parameter in model.module.named_parameters():
                if name.endswith("bias") or name in ("token", "position"):
                    parameter.zero_()
        read: list[Tensor] = []
        original = Tracer._softmax

        def reading(self: Tracer, func: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            read.append(inputs)
            return original(self, func, inputs, *args, **kwargs)

        monkeypatch.setattr(Tracer, "_softmax", reading)
        images, targets = images_of(model, 1), torch.tensor([1])
        rules = Rules(
            Rule("gamma", gamma=0.05, epsilon=0), Rule("gamma", epsilon=0), attention=EXACT, softmax="taylor"
        )
        traced = relevance._trace(model, images, rules)
        tensors = [traced.leaves.image, traced.attention[0], read[0]]
        image, after, before = (
            float((t.detach() * s).sum())
            for t, s in zip(tensors, traced.ratios(targets, tensors, "logit"), strict=True)
        )
        assert abs(after - before) > 1e-3
        assert image + after - before == pytest.approx(float(traced.logits[0, 1].detach()), rel=1e-6)

    def test_biases_keep_their_share(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        model = wrap(network, side=2)
        images, targets = images_of(model, 1), torch.tensor([2])
        maps = image_relevance(model, images, targets, Rules(EXACT, EXACT))
        linear: Any = network[1]
        assert float(maps.sum()) == pytest.approx(
            float(logits_of(model, images, targets) - linear.bias[2].detach())
        )


class TestTracing:
    @pytest.mark.parametrize("make", [make_cnn, make_vit, residual, one_block])
    def test_the_logits_stay_what_they_are(self, make: Callable[[], Model]) -> None:
        model = make()
        images = images_of(model)
        rules = Rules(EXACT, Rule("gamma")) if model.family == "cnn" else TAYLOR
        with torch.no_grad():
            expected = model(images).to(images.dtype)
        assert torch.allclose(relevance._trace(model, images, rules).logits, expected, rtol=1e-4, atol=1e-5)

    def test_batch_norm_is_folded(self) -> None:
        from torch.nn.utils.fusion import fuse_conv_bn_eval

        torch.manual_seed(0)
        conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(values, 0.2, 2)
        tail = [nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)]
        apart = wrap(nn.Sequential(conv, norm, *tail)).double()
        fused = wrap(nn.Sequential(fuse_conv_bn_eval(conv.eval(), norm.eval()), *tail)).double()
        images, targets = images_of(apart), torch.tensor([0, 1])
        for first in (None, Rule("box")):
            rules = Rules(Rule("gamma"), Rule("gamma"), first)
            one, two = (image_relevance(model, images, targets, rules) for model in (apart, fused))
            assert torch.allclose(one, two, rtol=1e-6, atol=1e-9)

    def test_work_in_place_changes_nothing(self) -> None:
        one, two = residual(in_place=True), residual(in_place=False)
        images, targets = images_of(one), torch.tensor([0, 1])
        rules = Rules(EXACT, Rule("gamma"), Rule("box"))
        assert torch.equal(
            image_relevance(one, images, targets, rules), image_relevance(two, images, targets, rules)
        )

    def test_companions_follow_padding(self) -> None:
        class Padded(nn.Module):
            def __init__(self, inside: bool) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.inside = inside
                self.conv = nn.Conv2d(3, 4, 3, padding=0 if inside else 1)
                self.head = nn.Linear(4, 2)

            def forward(self, images: Tensor) -> Tensor:
                images = F.pad(images, (1, 1, 1, 1)) if self.inside else images
                logits: Tensor = self.head(F.relu(self.conv(images)).mean((2, 3)))
                return logits

        one, two = (wrap(Padded(inside)).double() for inside in (True, False))
        images, targets = images_of(one), torch.tensor([0, 1])
        rules = Rules(EXACT, Rule("alpha-beta"), Rule("box"))
        assert torch.allclose(
            image_relevance(one, images, targets, rules), image_relevance(two, images, targets, rules)
        )

    def test_passes_are_counted_and_probes_are_not(self) -> None:
        model = make_vit()
        batch = make_batch(model, 3)
        with model.counting() as meter:
            assert why_not(model, TAYLOR) == relevance.why_no_attention(model, TAYLOR) == ""
            assert (meter.forwards, meter.backwards) == (0, 0)
            image_relevance(model, batch.images, batch.targets, TAYLOR)
            assert (meter.forwards, meter.backwards) == (3, 3)

    def test_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = residual()
        images, targets = images_of(model, 3), torch.tensor([0, 1, 2])
        rules = Rules(EXACT, Rule("gamma"), Rule("flat"))
        whole = image_relevance(model, images, targets, rules)
        monkeypatch.setattr(relevance, "chunk_size", lambda *_: 8)
        assert torch.allclose(image_relevance(model, images, targets, rules), whole)

    def test_seed_one_is_a_share_of_the_logit(self) -> None:
        model = residual()
        images, targets = images_of(model), torch.tensor([0, 1])
        rules = Rules(EXACT, EXACT)
        logits = logits_of(model, images, targets).view(-1, 1, 1, 1)
        one = image_relevance(model, images, targets, rules, seed="one")
        assert torch.allclose(one * logits, image_relevance(model, images, targets, rules))

    def test_gradients_of_attention(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = one_block()
        images, targets = images_of(model), torch.tensor([0, 2])
        (got,) = relevance.attention_gradients(model, images, targets)
        held: list[Tensor] = []
        original = torch.Tensor.softmax

        def softmax(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            held.append(original(self, *args, **kwargs))
            return held[-1]

        monkeypatch.setattr(Block, "fused", False)
        monkeypatch.setattr(torch.Tensor, "softmax", softmax)
        chosen = model(images).gather(1, targets.view(-1, 1)).sum()
        (expected,) = torch.autograd.grad(chosen, held)
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-8)


class TestCaptum:
    def test_epsilon_equals_captum_on_a_plain_net(self) -> None:
        """Captum's LRP is exact where no sum and no norm stands in the way."""
        from captum.attr import LRP

        torch.manual_seed(0)

        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
                self.conv2, self.relu2 = nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()
                self.maximum, self.mean = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2)
                self.fc1, self.relu3, self.fc2 = nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 4)

            def forward(self, images: Tensor) -> Tensor:
                x = self.maximum(self.relu1(self.conv1(images)))
                x = self.mean(self.relu2(self.conv2(x))).flatten(1)
                logits: Tensor = self.fc2(self.relu3(self.fc1(x)))
                return logits

        network = Plain()
        model = wrap(network)
        images, targets = images_of(model), torch.tensor([0, 3])
        rule = Rule("epsilon", epsilon=1e-9)
        got = image_relevance(model, images, targets, Rules(rule, rule))
        expected = LRP(network).attribute(model.normalise(images).requires_grad_(), target=targets).detach()
        assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
