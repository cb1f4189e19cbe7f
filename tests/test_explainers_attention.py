"""The explainers of attention against slow rewrites from their papers, and where closed forms are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_batch, make_vit
from torch import Tensor, nn

import slow_attention
from faithmap import load_model, registry
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.explaining import bind, undefined
from faithmap.models import Model

NAMES = ("raw-attention", "rollout", "generic-attention", "attention-guided-cam")
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 4}


def explain(name: str, model: Model, batch: Batch, **params: Any) -> Tensor:
    plugin = registry.get("explainer", name)
    return bind(plugin, plugin.check(params))(model, batch)


def some_batch(model: Model, count: int = 2) -> Batch:
    images = torch.rand(count, 3, *model.input_size, generator=torch.Generator().manual_seed(4))
    images = images.to(model.mean.dtype)
    return Batch(images, torch.arange(count) + 1, tuple("abcdef"[:count]), Context(model, images))


def distilled() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    network = VisionTransformerDistilled(**SMALL)
    nn.init.normal_(network.head_dist.weight)
    return network


def plain(**kwargs: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**SMALL, **kwargs})


#: Networks whose heads read other tokens, each with its prefix and what is read of each token.
HEADS: dict[str, tuple[Callable[[], nn.Module], int, list[float]]] = {
    "distilled": (distilled, 2, [0.5, 0.5] + 16 * [0.0]),
    "registers": (lambda: plain(reg_tokens=4), 5, [1.0] + 20 * [0.0]),
    "mean pooling": (lambda: plain(global_pool="avg"), 1, [0.0] + 16 * [1 / 16]),
}


def make_other(name: str) -> tuple[Model, int, np.ndarray]:
    torch.manual_seed(0)
    make, prefix, read = HEADS[name]
    network = make()
    nn.init.normal_(network.head.weight)
    return Model(network, mean=0.5, std=0.5, input_size=16).double(), prefix, np.array(read)


def slow_maps(name: str, model: Model, batch: Batch) -> np.ndarray:
    """The maps (B, h, w) of a plain transformer, from a forward pass written out."""
    weights = {key: value.detach().requires_grad_() for key, value in model.module.state_dict().items()}
    read = np.eye(1 + model.grid[0] * model.grid[1])[0]
    maps = []
    for image, target in zip(model.normalise(batch.images), batch.targets, strict=True):
        reading = slow_attention.transformer(weights, image, heads=2, hold=name == "attention-guided-cam")
        found = [one.detach().numpy() for one in reading.maps]
        scores = [one.detach().numpy() for one in reading.scores]
        gradients = reading.gradients(int(target))
        maps.append(by_formula(name, found, scores, gradients, read, 1))
    return np.stack(maps).reshape(-1, *model.grid)


def by_formula(
    name: str,
    maps: list[np.ndarray],
    scores: list[np.ndarray],
    gradients: list[np.ndarray],
    read: np.ndarray,
    prefix: int,
) -> np.ndarray:
    if name == "generic-attention":
        return slow_attention.generic_attention(maps, gradients, read, prefix)
    if name == "attention-guided-cam":
        return slow_attention.attention_guided_cam(scores, gradients, read, prefix)
    slow = getattr(slow_attention, name.replace("-", "_"))
    return np.asarray(slow(maps, read, prefix))


class TestFormulas:
    @pytest.mark.parametrize("name", NAMES)
    def test_equals_the_papers_on_a_transformer_written_out(self, name: str) -> None:
        model = make_vit(seed=3).double()
        batch = some_batch(model)
        maps = explain(name, model, batch).numpy()
        expected = slow_maps(name, model, batch)
        assert expected.min() >= 0 and expected.max() > 0
        assert np.abs(maps - expected).max() <= 1e-5 * expected.max()
        assert np.ptp(expected) > 1e-3 * expected.max()

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("head", HEADS)
    def test_equals_the_papers_on_the_tokens_that_the_head_reads(self, name: str, head: str) -> None:
        model, prefix, read = make_other(head)
        batch = some_batch(model)
        maps = explain(name, model, batch).numpy()
        attention = batch.attention
        found = [one.numpy() for one in attention.maps]
        for i in range(len(batch)):
            scores, gradients = [], []
            for block, of_block in enumerate(found):
                # All rows, of which the head reads some; the others must not matter.
                whole = np.zeros_like(of_block[i])
                whole[:, read > 0] = attention.scores[block][i].numpy()
                scores.append(whole)
                slopes = attention.gradients(batch.targets)[block][i].numpy()
                if name == "attention-guided-cam":
                    slopes = np.zeros_like(slopes)
                    slopes[:, read > 0] = attention.skip_gradients(batch.targets)[block][i].numpy()
                gradients.append(slopes)
            expected = by_formula(name, [one[i] for one in found], scores, gradients, read, prefix)
            assert np.abs(maps[i].ravel() - expected).max() <= 1e-5 * expected.max()

    @pytest.mark.parametrize("start", [1, 5])
    def test_rollout_from_a_later_block(self, start: int) -> None:
        model = make_vit()
        batch = some_batch(model)
        found = [one[0].double().numpy() for one in batch.attention.maps]
        expected = slow_attention.rollout(found, np.eye(65)[0], 1, start)
        maps = explain("rollout", model, batch, start_layer=start)
        assert maps[0].flatten().numpy() == pytest.approx(expected, rel=1e-4)
        if start == 5:  # one block alone: half of its attention, and half of itself
            assert torch.allclose(maps, explain("raw-attention", model, batch) / 2, rtol=1e-5)

    @pytest.mark.parametrize("start", [-1, 6])
    def test_rollout_from_no_block(self, start: int) -> None:
        model = make_vit()
        with pytest.raises(RequestError, match=f"start_layer: got {start}, expected 0 to 5.* has 6 blocks"):
            explain("rollout", model, some_batch(model), start_layer=start)


def blinded(score: float = 0.0) -> Model:
    """A transformer whose queries and keys are constants: every score is `score`, all attention is alike."""
    model = make_vit()
    with torch.no_grad():
        for block in model.module.blocks:
            size, wide = block.attn.head_dim, block.attn.head_dim * block.attn.num_heads
            block.attn.qkv.weight[: 2 * wide] = 0
            block.attn.qkv.bias[:wide] = 1.0
            block.attn.qkv.bias[wide : 2 * wide] = score / size**0.5
    return model


class TestClosedForms:
    def test_of_attention_that_is_alike_everywhere(self) -> None:
        model = blinded()
        batch = some_batch(model)
        tokens, depth = 65, 6
        assert torch.allclose(explain("raw-attention", model, batch), torch.tensor(1 / tokens))
        # All powers of 0.5 (I + U) are mixtures of I and U, U the matrix of 1/N.
        expected = (1 - 0.5**depth) / tokens
        assert torch.allclose(explain("rollout", model, batch), torch.tensor(expected), rtol=1e-5)

    def test_scores_pass_through_a_sigmoid_and_not_a_softmax(self) -> None:
        level = explain("attention-guided-cam", blinded(0.0), some_batch(blinded(0.0)))
        for score in (-2.0, 3.0):
            model = blinded(score)
            maps = explain("attention-guided-cam", model, some_batch(model))
            # The attention itself, and with it every gradient, is the same whatever the score is.
            factor = 2 / (1 + np.exp(-score))
            assert torch.allclose(maps, level * factor, rtol=1e-3)

    def test_generic_attention_of_one_block_is_its_positive_part(self) -> None:
        torch.manual_seed(0)
        network = plain(depth=1)
        nn.init.normal_(network.head.weight)
        model = Model(network, mean=0.5, std=0.5, input_size=16)
        batch = some_batch(model)
        (heads,), (gradients,) = batch.attention.maps, batch.attention.gradients(batch.targets)
        expected = (heads * gradients)[:, :, 0, 1:].clamp_min(0).mean(1).view(2, 4, 4)
        assert torch.allclose(explain("generic-attention", model, batch), expected, rtol=1e-5)

    def test_rows_of_the_rollout_are_shares(self) -> None:
        model = make_vit()
        for name in ("raw-attention", "rollout"):
            whole = explain(name, model, some_batch(model)).sum((1, 2))
            assert bool((whole > 0).all() and (whole < 1).all())

    def test_small_gradients_survive_beside_the_identity(self) -> None:
        model, _, _ = make_other("mean pooling")
        model.float()
        batch = some_batch(model)
        maps = explain("generic-attention", model, batch)
        with torch.no_grad():
            for parameter in model.module.head.parameters():
                parameter *= 1e-7
        small = explain("generic-attention", model, some_batch(model)) * 1e7
        # Powers beyond the first vanish, so the maps are near each other only; but none is rounded away.
        both = torch.stack([maps[0].flatten(), small[0].flatten()])
        assert float(torch.corrcoef(both)[0, 1]) > 0.95
        assert len(small[0].unique()) == 16


class TestCost:
    def test_one_forward_pass_serves_all(self) -> None:
        model = make_vit()
        batch = some_batch(model)
        with model.counting() as meter:
            for name in (*NAMES, *NAMES):
                explain(name, model, batch)
        # The gradient along the skip connections is another than the whole one.
        assert (meter.forwards, meter.backwards) == (2, 4)

    @pytest.mark.parametrize(
        ("names", "passes"),
        [(("raw-attention", "rollout"), (2, 0)), (("generic-attention", "rollout"), (2, 2))],
    )
    def test_none_pays_for_another(self, names: tuple[str, ...], passes: tuple[int, int]) -> None:
        model = make_vit()
        batch = some_batch(model)
        with model.counting() as meter:
            for name in names:
                explain(name, model, batch)
        assert (meter.forwards, meter.backwards) == passes


class TestModels:
    @pytest.mark.parametrize("name", NAMES)
    def test_reasons_come_from_the_build(self, name: str, cnn: Model) -> None:
        plugin = registry.get("explainer", name)
        assert undefined(plugin, cnn, set()) == "defined for vit, not for cnn"
        swin = load_model(
            "timm/swin_tiny_patch4_window7_224",
            pretrained=False,
            input_size=64,
            kwargs={"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24},
        )
        assert "stays within windows" in undefined(plugin, swin, set())
        assert undefined(plugin, make_vit(), set()) == ""

    @pytest.mark.parametrize("name", [*NAMES, "gradcam", "layercam"])
    @pytest.mark.parametrize("head", HEADS)
    def test_maps_lie_on_the_grid_of_patches(self, name: str, head: str) -> None:
        model = make_other(head)[0].float()
        maps = explain(name, model, some_batch(model))
        assert maps.shape == (2, 4, 4)
        assert bool(torch.isfinite(maps).all() and (maps >= 0).all() and (maps.amax((1, 2)) > 0).all())

    def test_images_that_are_not_square(self) -> None:
        torch.manual_seed(0)
        model = Model(plain(img_size=(16, 32)), mean=0.5, std=0.5, input_size=(16, 32))
        batch = some_batch(model)
        for name in NAMES:
            assert explain(name, model, batch).shape == (2, 4, 8)

    def test_the_object_is_found_on_the_embedded_transformer(self) -> None:
        from faithmap.config import parse_spec
        from faithmap.data import choose, load_dataset, read_shard, shards
        from faithmap.data import make_batch as batch_of
        from faithmap.resize import upsample

        model = load_model("shapes/vit")
        samples = choose(load_dataset(parse_spec("shapes")).samples, "dev", 16)
        read, _ = read_shard(shards(samples, 16)[0], model)
        batch = batch_of(read, model, "predicted", model.grid, 0)
        assert batch.masks is not None
        share = float(batch.masks.float().mean())
        for name in NAMES:
            maps = upsample(explain(name, model, batch), batch.size)
            inside = (maps * batch.masks).sum((1, 2)) / maps.sum((1, 2))
            assert float(inside.mean()) > 1.5 * share


def test_batches_of_many_and_of_one(vit: Model) -> None:
    batch = make_batch(vit, 3)
    for name in NAMES:
        together = explain(name, vit, batch)
        for i in range(3):
            alone = explain(name, vit, batch.select([i]))[0]
            assert float((together[i] - alone).abs().max()) <= 1e-5 * float(alone.max())
