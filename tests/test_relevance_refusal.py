"""What relevance propagation has no rule for is refused by name, never explained wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_cnn
from relevance_nets import images_of, one_block, residual, wrap
from torch import Tensor, nn
from torch.nn import functional as F

from faithmap import relevance
from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.relevance import Rule, Rules, chefer_rules, image_relevance, layer_relevance, why_not

EXACT = Rule("epsilon", epsilon=0.0)


def network_of(operation: Callable[[Tensor], Tensor]) -> Model:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head(operation(self.conv(images)).mean((2, 3)))
            return logits

    return wrap(Net(), target_layer="conv", family="cnn")


def overwrite(x: Tensor) -> Tensor:
    buffer = torch.zeros(x.shape)
    buffer[:, :2] = x[:, :2]
    return buffer


class TestRefusal:
    @pytest.mark.parametrize(
        ("operation", "reason"),
        [
            (lambda x: x * torch.sigmoid(x), "'sigmoid'"), (lambda x: x * F.relu(x), "gating"),
            (lambda x: x / (1 + F.relu(x)), "division by an activation"), (lambda x: x.exp(), "'exp'"),
            (lambda x: x + x.detach(), "'detach'"), (overwrite, "'__setitem__'"),
            (lambda x: F.softmax(x, 1), "no transformer"), (lambda x: x @ torch.ones(6, 6), "matrices"),
            (lambda x: F.conv2d(x, x[:1]), "weights depend"), (lambda x: F.softplus(x), "'softplus'"),
            (lambda x: F.instance_norm(x), "'instance_norm'"),
            (lambda x: F.batch_norm(x, None, None, training=True), "without running statistics"),
            (lambda x: F.hardtanh(x, 0.5, 1.0), "value at zero"),
            (lambda x: F.conv2d(x, torch.ones(4, 4, 3, 3), padding="same"), "padding 'same'"),
            (lambda x: torch.zeros(len(x), 4, 1, 1), "do not depend on the image"),
        ],
    )  # fmt: skip
    def test_operations_without_a_rule(self, operation: Callable[[Tensor], Tensor], reason: str) -> None:
        model = network_of(operation)
        rules = Rules(EXACT, Rule("alpha-beta"), Rule("box"))
        assert reason in why_not(model, rules)
        with pytest.raises(RequestError, match=r"no relevance rule|do not depend"):
            image_relevance(model, images_of(model), torch.tensor([0, 1]), rules)

    def test_nothing_is_left_behind_by_a_refusal(self) -> None:
        model = network_of(torch.sigmoid)
        assert why_not(model, Rules(EXACT, EXACT))
        assert not model.module._forward_pre_hooks and model.meter.forwards == 0

    @pytest.mark.parametrize(
        ("keywords", "reason"),
        [({"attn_mask": torch.zeros(5, 5)}, "masked"), ({"is_causal": True}, "masked")],
    )
    def test_attention_with_a_mask(
        self, keywords: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: original(*args, **keywords))
        assert reason in why_not(one_block(), chefer_rules())

    def test_a_first_rule_that_finds_no_layer(self) -> None:
        class Late(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(3, 2)

            def forward(self, images: Tensor) -> Tensor:
                logits: Tensor = self.head(images.mean((2, 3)))
                return logits

        model = wrap(Late())
        assert "reads the image itself" in why_not(model, Rules(EXACT, EXACT, Rule("box")))
        assert why_not(model, Rules(EXACT, EXACT)) == ""

    def test_an_image_that_was_changed_is_no_image(self) -> None:
        """Else the box would hold bounds of something else."""

        class Normalising(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 2, 8)

            def forward(self, images: Tensor) -> Tensor:
                images.sub_(0.5)
                logits: Tensor = self.conv(images).flatten(1)
                return logits

        assert "reads the image itself" in why_not(wrap(Normalising()), Rules(EXACT, EXACT, Rule("box")))

    def test_wrong_requests(self) -> None:
        with pytest.raises(RequestError, match="unknown relevance rule 'gama'"):
            Rule("gama")
        with pytest.raises(RequestError, match=r"alpha: got 0\.5, expected 1 or more"):
            Rule("alpha-beta", alpha=0.5)
        with pytest.raises(RequestError, match="for the layer that reads the image; got it for conv"):
            Rules(EXACT, Rule("box"))
        model = residual()
        with pytest.raises(RequestError, match="unknown seed 'two'"):
            image_relevance(model, images_of(model), torch.tensor([0, 0]), Rules(EXACT, EXACT), seed="two")
        with pytest.raises(RequestError, match="no layer 'sten'"):
            layer_relevance(model, images_of(model), torch.tensor([0, 0]), Rules(EXACT, EXACT), ["sten"])

    def test_attention_where_it_cannot_be_read(self) -> None:
        model = one_block()
        assert relevance.why_no_attention(model, chefer_rules()) == ""
        network: Any = model.module
        network.blocks.append(nn.Identity())
        assert "attend to all tokens" in relevance.why_no_attention(model, chefer_rules())
        network.global_pool = "map"
        assert "pools by 'map'" in relevance.why_no_attention(model, chefer_rules())
        assert "timm" in relevance.why_no_attention(make_cnn(), chefer_rules())
