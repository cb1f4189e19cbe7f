"""LRP, partial LRP, transformer explainability and AttnLRP by hand, and where they are defined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_batch, make_cnn, make_vit
from relevance_nets import HIGH, LOW, images_of, one_block, weights_of
from torch import Tensor, nn

import slow_relevance
from faithmap import registry
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.explaining import bind, undefined
from faithmap.models import Model


def explain(name: str, model: Model, batch: Batch, **params: Any) -> Tensor:
    plugin = registry.get("explainer", name)
    return bind(plugin, plugin.check(params))(model, batch)


def reason(name: str, model: Model) -> str:
    return undefined(registry.get("explainer", name), model, set())


def batch_of(model: Model, targets: list[int]) -> Batch:
    images = images_of(model, len(targets))
    ids = tuple(str(i) for i in range(len(targets)))
    return Batch(images, torch.tensor(targets), ids, Context(model, images))


def by_hand(model: Model, batch: Batch, i: int, **facts: Any) -> tuple[np.ndarray, np.ndarray]:
    image = model.normalise(batch.images[i])[0].numpy()
    return slow_relevance.one_block(
        weights_of(model), image, int(batch.targets[i]), 2, low=LOW, high=HIGH, **facts
    )


def close(got: Tensor, expected: np.ndarray) -> bool:
    return bool(np.abs(got.numpy() - expected).max() <= 2e-6 * np.abs(expected).max())


class TestLRP:
    def test_on_a_transformer_by_hand(self) -> None:
        model = one_block()
        batch = batch_of(model, [0, 2])
        maps = explain("lrp", model, batch)
        logits = batch.logits.gather(1, batch.targets.view(-1, 1))
        for i in range(2):
            _, image = by_hand(model, batch, i, method="chefer", seed=float(logits[i]))
            assert close(maps[i], image.sum(0))

    def test_on_a_cnn_adds_up_to_the_logit_but_for_biases(self, cnn: Model) -> None:
        batch = make_batch(cnn, 3)
        head: Any = cnn.module.head
        logits = batch.logits.gather(1, batch.targets.view(-1, 1))[:, 0]
        expected = logits - head.bias.detach()[batch.targets]
        assert torch.allclose(explain("lrp", cnn, batch).sum((1, 2)), expected, rtol=1e-4, atol=1e-5)
        whole = explain("lrp", cnn, batch, linear="alpha-beta")
        assert torch.allclose(whole.sum((1, 2)), logits, rtol=1e-4, atol=1e-5)

    def test_rules_are_the_parameters(self, cnn: Model) -> None:
        batch = make_batch(cnn, 2)
        settings: list[dict[str, Any]] = [
            {}, {"linear": "gamma"}, {"conv": "gamma"}, {"conv": "epsilon"}, {"first": "flat"},
            {"first": "epsilon"}, {"alpha": 2.0}, {"epsilon": 0.5}, {"conv": "gamma", "gamma": 1.0},
        ]  # fmt: skip
        maps = [explain("lrp", cnn, batch, **params) for params in settings]
        for i, one in enumerate(maps):
            assert not any(torch.allclose(one, other) for other in maps[:i])

    def test_wrong_requests(self, cnn: Model) -> None:
        batch = make_batch(cnn, 1)
        with pytest.raises(RequestError, match="unknown relevance rule 'zplus'"):
            explain("lrp", cnn, batch, conv="zplus")
        with pytest.raises(RequestError, match="for the layer that reads the image"):
            explain("lrp", cnn, batch, conv="flat")

    def test_defined_by_operations(self) -> None:
        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

            def forward(self, images: Tensor) -> Tensor:
                x = self.conv(images)
                logits: Tensor = self.head((x * torch.sigmoid(x)).mean((2, 3)))
                return logits

        assert "'sigmoid'" in reason("lrp", Model(Gated(), mean=0.5, std=0.5, input_size=16))
        assert reason("lrp", make_cnn()) == reason("lrp", make_vit()) == ""


class TestPartialLRP:
    def test_by_hand(self) -> None:
        model = one_block()
        batch = batch_of(model, [1, 2])
        maps = explain("partial-lrp", model, batch)
        for i in range(2):
            weights, _ = by_hand(model, batch, i, method="chefer")
            assert close(maps[i], np.maximum(weights, 0).mean(0)[0, 1:].reshape(2, 2))


class TestExplainability:
    def slow(self, model: Model, batch: Batch, i: int, rows: list[int]) -> np.ndarray:
        """Chefer et al. 2021, sec. 3.3, with the gradient by autograd on unfused attention."""
        relevance, _ = by_hand(model, batch, i, method="chefer", rescale=True)
        network: Any = model.module
        held: list[Tensor] = []

        def keep(inputs: Tensor, dim: int) -> Tensor:
            held.append(torch.exp(inputs) / torch.exp(inputs).sum(dim, keepdim=True))
            return held[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(network.blocks[0]), "fused", False)
            patch.setattr(Tensor, "softmax", keep)
            chosen = model(batch.images[i : i + 1])[0, batch.targets[i]]
        (gradient,) = torch.autograd.grad(chosen, held)
        rolled = np.eye(5) + np.maximum(gradient[0].numpy() * relevance, 0).mean(0)
        patches: np.ndarray = rolled[rows].mean(0)[1:].reshape(2, 2)
        return patches

    def test_by_hand(self) -> None:
        model = one_block()
        batch = batch_of(model, [1, 2])
        maps = explain("explainability", model, batch)
        for i in range(2):
            assert close(maps[i], self.slow(model, batch, i, [0]))

    def test_rows_of_the_tokens_that_the_head_reads(self) -> None:
        model = one_block()
        batch = batch_of(model, [1, 2])
        network: Any = model.module
        network.global_pool = "avg"
        maps = explain("explainability", model, batch)
        for i in range(2):
            assert close(maps[i], self.slow(model, batch, i, [1, 2, 3, 4]))

    def test_blocks_are_multiplied_from_the_last_to_the_first(self, vit: Model) -> None:
        from faithmap.relevance import attention_gradients, attention_relevance, chefer_rules

        batch = make_batch(vit, 1)
        rules = chefer_rules(rescale=True)
        relevances = attention_relevance(vit, batch.images, batch.targets, rules)
        gradients = attention_gradients(vit, batch.images, batch.targets)
        assert len(relevances) == len(gradients) == 6
        for start in (0, 4):
            whole = np.eye(relevances[0].shape[-1])
            for r, g in list(zip(relevances, gradients, strict=True))[start:]:
                whole = (np.eye(len(whole)) + (g * r).clamp_min(0).mean(1)[0].numpy()) @ whole
            maps = explain("explainability", vit, batch, start_layer=start)
            assert close(maps[0], whole[0, 1:].reshape(8, 8))

    def test_a_block_that_does_not_exist(self, vit: Model) -> None:
        with pytest.raises(RequestError, match="start_layer: got 6, expected 0 to 5"):
            explain("explainability", vit, make_batch(vit, 1), start_layer=6)

    def test_the_distillation_token_counts_as_much_as_the_class_token(self) -> None:
        import timm

        from faithmap.relevance import token_map

        network = timm.create_model(
            "deit_tiny_distilled_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=2, num_classes=3
        )
        model = Model(network, mean=0.5, std=0.5, input_size=32)
        assert reason("explainability", model) == reason("partial-lrp", model) == ""
        matrices = torch.arange(36.0).view(1, 6, 6)
        assert torch.equal(token_map(model, matrices, (32, 32)), matrices[:, :2].mean(1)[:, 2:].view(1, 2, 2))
        maps = explain("explainability", model, make_batch(model, 1))
        assert maps.shape == (1, 2, 2) and float(maps.min()) >= 0


class TestAttnLRP:
    def test_by_hand(self) -> None:
        model = one_block()
        batch = batch_of(model, [0, 1])
        maps = explain("attnlrp", model, batch, epsilon=0.0)
        logits = batch.logits.gather(1, batch.targets.view(-1, 1))
        for i in range(2):
            _, image = by_hand(model, batch, i, method="attnlrp", seed=float(logits[i]))
            assert close(maps[i], image.sum(0))
        assert torch.allclose(explain("attnlrp", model, batch), maps, rtol=1e-2, atol=1e-4)

    def test_gamma_zero_is_epsilon(self) -> None:
        model = one_block()
        batch = batch_of(model, [0, 1])
        maps = explain("attnlrp", model, batch, linear_gamma=0.0, conv_gamma=0.0, epsilon=0.0)
        facts = {"method": "attnlrp", "linear_gamma": 0.0, "conv_gamma": 0.0}
        logits = batch.logits.gather(1, batch.targets.view(-1, 1))
        for i in range(2):
            assert close(maps[i], by_hand(model, batch, i, seed=float(logits[i]), **facts)[1].sum(0))


class TestDefinedFor:
    @pytest.mark.parametrize("name", ["partial-lrp", "explainability", "attnlrp"])
    def test_transformers_alone(self, name: str) -> None:
        assert "not for cnn" in reason(name, make_cnn())
        assert reason(name, make_vit()) == ""

    @pytest.mark.parametrize("name", ["lrp", "partial-lrp", "explainability", "attnlrp"])
    def test_attention_of_torch_itself_is_refused_by_name(self, name: str) -> None:
        from torchvision.models import VisionTransformer

        network = VisionTransformer(16, 8, 1, 2, 12, 24, num_classes=3)
        model = Model(network, mean=0.5, std=0.5, input_size=16)
        assert "multi_head_attention_forward" in reason(name, model) or "timm" in reason(name, model)
