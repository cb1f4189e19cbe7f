"""Attention read from timm's transformers: maps, scores and gradients, and what the reading leaves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_batch, make_vit
from torch import Tensor, nn

import slow_attention
from faithmap import attention as core
from faithmap.attention import Attention, unreadable
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.explaining import HOOK_KINDS
from faithmap.models import Model, load_model

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 4}


def vit(**kwargs: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**SMALL, **kwargs})


def distilled() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**SMALL)


def post_norm() -> nn.Module:
    from timm.models.vision_transformer import ResPostBlock

    return vit(block_fn=ResPostBlock, init_values=0.1)


def relative() -> nn.Module:
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    return VisionTransformerRelPos(**SMALL)


def beit() -> nn.Module:
    from timm.models.beit import Beit

    network = Beit(**SMALL, use_rel_pos_bias=True, use_abs_pos_emb=False)
    for block in network.blocks:
        nn.init.normal_(block.attn.relative_position_bias_table)
    return network


def eva() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(**SMALL, use_rot_pos_emb=True, swiglu_mlp=True, global_pool="token")


#: Small relatives of the networks that timm's names stand for, with the tokens before the patches.
BUILDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (vit, 1),
    "mean pooling": (lambda: vit(global_pool="avg"), 1),
    "mean pooling of all tokens": (lambda: vit(global_pool="avg", pool_include_prefix=True), 1),
    "attention pooling": (lambda: vit(global_pool="map", class_token=False), 0),
    "registers": (lambda: vit(reg_tokens=4), 5),
    "norms of queries and keys": (lambda: vit(qk_norm=True), 1),
    "post-norm": (post_norm, 1),
    "distilled": (distilled, 2),
    "relative positions": (relative, 0),
    "beit": (beit, 1),
    "eva": (eva, 1),
}


def wrap(network: nn.Module, **kwargs: Any) -> Model:
    """A model of the network with heads large enough that classes differ."""
    for name in ("head", "head_dist"):
        if isinstance(getattr(network, name, None), nn.Linear):
            nn.init.normal_(getattr(network, name).weight, std=0.5)
    return Model(network, mean=0.5, std=0.5, **{"input_size": 16, **kwargs})


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> tuple[Model, int]:
    torch.manual_seed(0)
    make, prefix = BUILDS[request.param]
    return wrap(make()), prefix


def some_images(model: Model, count: int = 2) -> Tensor:
    return torch.rand(count, 3, *model.input_size, generator=torch.Generator().manual_seed(2))


TARGETS = torch.tensor([1, 3])


def disturb(block: nn.Module, at: tuple[int, ...], step: float) -> Any:
    """Add a step to one cell of a block's attention, from now on."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[at] += step
        return changed

    return block.attn.attn_drop.register_forward_hook(hook)  # type: ignore[union-attr,operator]


def slope(model: Model, images: Tensor, block: int, at: tuple[int, ...], held: list[Tensor] | None) -> float:
    """Change of the first image's target logit with a cell of a block's attention, by differences.

    With `held`, later blocks' attention takes in the tokens given, whatever happened before.
    """
    blocks = model.module.blocks
    logits = []
    for step in (1e-4, -1e-4):
        handles = [disturb(blocks[block], at, step)]
        for later in range(block + 1, len(blocks)) if held is not None else ():
            fixed = held[later]  # type: ignore[index]
            handles.append(blocks[later].attn.register_forward_pre_hook(lambda _m, _i, fixed=fixed: (fixed,)))
        for attention in (one.attn for one in blocks):
            attention.fused_attn = False
        with torch.no_grad():
            logits.append(model.module(model.normalise(images))[0, TARGETS[0]])
        for handle in handles:
            handle.remove()
    return float((logits[0] - logits[1]) / 2e-4)


class TestReading:
    def test_maps_are_the_softmax_of_the_scores(self, build: tuple[Model, int]) -> None:
        model, prefix = build
        attention = Attention(model, some_images(model))
        assert len(attention.maps) == len(attention.scores) == 3
        rows = attention.read.nonzero().flatten()
        for found, scores in zip(attention.maps, attention.scores, strict=True):
            assert found.shape == (2, 3, 16 + prefix, 16 + prefix) and not found.requires_grad
            assert torch.allclose(found.sum(3), torch.ones(()), atol=1e-5)
            assert torch.allclose(scores.softmax(3), found[:, :, rows], atol=1e-6)

    def test_unfused_logits_are_the_models(self, build: tuple[Model, int]) -> None:
        model, _ = build
        images = some_images(model)
        attention = Attention(model, images)
        assert torch.allclose(attention._trace.logits, model(images), atol=1e-5)

    def test_the_rows_read_are_those_that_reach_the_logits(self, build: tuple[Model, int]) -> None:
        model, prefix = build
        attention = Attention(model, some_images(model))
        held: list[Tensor] = []
        handle = model.module.blocks[-1].register_forward_hook(lambda _m, _i, output: held.append(output))
        logits = model(some_images(model))
        handle.remove()
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), held[0])
        reached = gradient.abs().sum((0, 2)) > 0
        assert torch.equal(reached, attention.read > 0)
        assert float(attention.read.sum()) == pytest.approx(1)
        assert attention.fold(attention.start()).shape == (2, 4, 4) and len(attention.read) == 16 + prefix

    def test_equals_a_transformer_written_out(self) -> None:
        model = make_vit().double()
        images = some_images(model).double()
        attention = Attention(model, images)
        weights = {key: value.requires_grad_() for key, value in model.module.state_dict().items()}
        for i, image in enumerate(model.normalise(images)):
            for hold in (False, True):
                slow = slow_attention.transformer(weights, image, heads=2, hold=hold)
                found = attention.skip_gradients(TARGETS) if hold else attention.gradients(TARGETS)
                for block, expected in enumerate(slow.gradients(int(TARGETS[i]))):
                    expected = torch.from_numpy(expected)[:, :1] if hold else torch.from_numpy(expected)
                    scale = float(expected.abs().max())
                    assert float((found[block][i] - expected).abs().max()) < 1e-6 * scale
                    assert torch.allclose(attention.maps[block][i], slow.maps[block], atol=1e-9)
                    assert torch.allclose(attention.scores[block][i], slow.scores[block][:, :1], atol=1e-9)

    def test_images_of_another_size(self) -> None:
        torch.manual_seed(0)
        model = wrap(vit(dynamic_img_size=True))
        attention = Attention(model, torch.rand(2, 3, 24, 8))
        assert attention.fold(attention.start()).shape == (2, 6, 2)
        tokens = torch.arange(13.0).expand(2, -1)
        assert torch.equal(attention.fold(tokens)[1], torch.arange(1.0, 13.0).view(6, 2))


class TestGradients:
    @pytest.mark.parametrize("name", ["plain", "mean pooling", "post-norm", "distilled", "eva"])
    @pytest.mark.parametrize("along_skips", [False, True])
    def test_are_those_of_finite_differences(self, name: str, along_skips: bool) -> None:
        torch.manual_seed(0)
        model = wrap(BUILDS[name][0]()).double()
        images = some_images(model).double()
        attention = Attention(model, images)
        found = attention.skip_gradients(TARGETS) if along_skips else attention.gradients(TARGETS)
        held: list[Tensor] = []
        handles = [
            block.attn.register_forward_pre_hook(lambda _m, inputs: held.append(inputs[0]))
            for block in model.module.blocks
        ]
        with torch.no_grad():
            model(images)
        for handle in handles:
            handle.remove()
        rows = attention.read.nonzero().flatten()
        for block in range(3):
            gradient = found[block][0, 1]
            i, j = divmod(int(gradient.abs().argmax()), gradient.shape[1])
            row = int(rows[i]) if along_skips else i
            expected = slope(model, images, block, (0, 1, row, j), held if along_skips else None)
            assert float(gradient[i, j]) == pytest.approx(expected, rel=1e-3)

    def test_along_skips_differ_from_the_whole_but_in_the_last_block(self) -> None:
        model = make_vit()
        attention = Attention(model, some_images(model))
        whole, skips = attention.gradients(TARGETS), attention.skip_gradients(TARGETS)
        assert torch.allclose(whole[-1][:, :, :1], skips[-1], atol=1e-7)
        assert not torch.allclose(whole[0][:, :, :1], skips[0], rtol=0.1)
        # The gate is open again.
        assert torch.equal(Attention(model, some_images(model)).gradients(TARGETS)[0], whole[0])
        assert not torch.equal(attention.gradients(TARGETS.flip(0))[0], whole[0])

    def test_one_forward_and_a_backward_for_each_class_and_kind(self) -> None:
        model = make_vit()
        context = Context(model, some_images(model))
        with model.counting() as meter:
            for _ in range(2):
                _ = context.attention.maps, context.attention.scores
            assert (meter.forwards, meter.backwards) == (2, 0)
            for _ in range(2):
                context.attention.gradients(TARGETS)
            assert (meter.forwards, meter.backwards) == (2, 2)
            for _ in range(2):
                context.attention.skip_gradients(TARGETS)
                context.attention.gradients(TARGETS.flip(0))
        assert (meter.forwards, meter.backwards) == (2, 6)

    def test_frozen_weights_and_disabled_gradients_change_nothing(self, build: tuple[Model, int]) -> None:
        model, _ = build
        images = some_images(model)
        expected = Attention(model, images).gradients(TARGETS)
        model.requires_grad_(False)
        with torch.no_grad():
            found = Attention(model, images).gradients(TARGETS)
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        for one, two in zip(found, expected, strict=True):
            assert float((one - two).abs().max()) <= 1e-5 * float(two.abs().max())

    def test_reduced_precision(self) -> None:
        model = make_vit()
        expected = Attention(model, some_images(model)).gradients(TARGETS)
        model.precision = "bf16"
        found = Attention(model, some_images(model)).gradients(TARGETS)
        for one, two in zip(found, expected, strict=True):
            assert one.dtype == torch.float32
            assert float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]) > 0.99


class TestManners:
    def state(self, model: Model) -> list[Any]:
        hooks = [len(getattr(module, kind)) for module in model.modules() for kind in HOOK_KINDS]
        return [hooks, [block.attn.fused_attn for block in model.module.blocks], torch.is_grad_enabled()]

    def test_flags_hooks_and_switch_are_as_before(self) -> None:
        model = make_vit()
        model.module.blocks[2].attn.fused_attn = False
        before = self.state(model)
        assert any(before[1]) and not all(before[1])
        Attention(model, some_images(model)).gradients(TARGETS)
        assert self.state(model) == before

    @pytest.mark.parametrize("block", [0, 3])
    def test_even_after_an_exception(self, block: int) -> None:
        model = make_vit()
        before = self.state(model)

        def fail(*_: Any) -> None:
            raise RuntimeError("on purpose")

        handle = model.module.blocks[block].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            Attention(model, some_images(model))
        handle.remove()
        assert self.state(model) == before
        assert (
            type(torch.rand(2).softmax(0)) is Tensor
            and not torch.overrides._get_current_function_mode_stack()
        )

    def test_release_lets_go_of_maps_and_graph(self) -> None:
        model = make_vit()
        gc.collect()
        context = Context(model, some_images(model))
        context.attention.skip_gradients(TARGETS)
        held = [weakref.ref(found) for found in context.attention._trace.maps]
        gc.disable()  # a cycle would keep the graph until the collector runs
        try:
            context.release()
            assert not any(reference() is not None for reference in held)
        finally:
            gc.enable()
        with model.counting() as meter:
            _ = context.attention.maps
        assert meter.forwards == 2

    def test_batches_share_it_and_selections_do_not(self) -> None:
        model = make_vit()
        batch = make_batch(model)
        assert batch.attention is batch.with_seed_key("other").attention is batch.context.attention
        part = batch.select([2])
        assert torch.allclose(part.attention.maps[3], batch.attention.maps[3][[2]], atol=1e-6)

    def test_logits_do_not_depend_on_whether_attention_was_read_before(self) -> None:
        model = make_vit()
        first, second = (Context(model, some_images(model)) for _ in range(2))
        _ = first.attention
        assert torch.equal(first.logits, second.logits)


class Windows(nn.Module):
    """A network with blocks and attention as timm names them, but over half of the tokens at a time."""

    def __init__(self) -> None:
        super().__init__()
        network = vit(class_token=False, global_pool="avg", depth=1)
        self.patch_embed, self.blocks, self.norm = network.patch_embed, network.blocks, network.norm
        self.num_prefix_tokens = 0
        self.head = nn.Linear(24, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(images).reshape(-1, 8, 24)
        logits: Tensor = self.head(self.blocks(tokens).reshape(len(images), 16, 24).mean(1))
        return logits


class Sigmoid(Windows):
    """Attention by sigmoids: no softmax comes before the dropout."""

    def __init__(self) -> None:
        super().__init__()
        attention = self.blocks[0].attn
        attention.forward = lambda x, **_: attention.attn_drop((x @ x.transpose(1, 2)).sigmoid()) @ x

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.patch_embed(images)).mean(1))
        return logits


class TalkingHeads(Sigmoid):
    """Heads are mixed behind the softmax: what the dropout sees is no softmax any more."""

    def __init__(self) -> None:
        super().__init__()
        attention = self.blocks[0].attn
        attention.num_heads = 1

        def forward(x: Tensor, **_: Any) -> Tensor:
            weights = (x @ x.transpose(1, 2)).softmax(2).unsqueeze(1)
            mixed: Tensor = attention.attn_drop(0.9 * weights)
            return mixed.squeeze(1) @ x

        attention.forward = forward


def swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(2, 2)
    )


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 4, 2, 2, 12, 24)


def hugging_face() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    network.config = SimpleNamespace(architectures=["ViTForImageClassification"])
    return network


def parallel() -> nn.Module:
    from timm.models.vision_transformer import ParallelThingsBlock

    return vit(block_fn=ParallelThingsBlock)


class TestReasons:
    @pytest.mark.parametrize(
        ("make", "side", "reason"),
        [
            (swin, 32, "stays within windows"),
            (torchvision_vit, 16, "MultiheadAttention does not hand out its attention maps; use timm's"),
            (hugging_face, 16, "not from Hugging Face's; use timm's"),
            (parallel, 16, "VisionTransformer is not a row of blocks with one attention"),
            (lambda: vit(attn_layer="diff", num_heads=2), 16, r"are \(4, 17, 17\); expected \(2, 17, 17\)"),
            (Windows, 16, r"are \(3, 8, 8\); expected \(3, 16, 16\)"),
            (Sigmoid, 16, "not a softmax of scores"),
            (TalkingHeads, 16, "not a softmax of scores"),
        ],
    )
    def test_is_given_for_what_cannot_be_read(
        self, make: Callable[[], nn.Module], side: int, reason: str
    ) -> None:
        model = Model(make(), mean=0.5, std=0.5, input_size=side)
        with model.counting() as meter:
            answer = unreadable(model)
        assert meter.forwards == 0
        assert answer is not None
        with pytest.raises(RequestError, match=reason):
            raise RequestError(answer)
        with pytest.raises(RequestError, match=reason):
            _ = Context(model, some_images(model)).attention

    def test_is_none_for_what_can(self, build: tuple[Model, int]) -> None:
        model, _ = build
        with model.counting() as meter:
            assert unreadable(model) is None
        assert meter.forwards == 0
        assert not any(getattr(module, kind) for module in model.modules() for kind in HOOK_KINDS)

    def test_is_found_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = make_vit()
        assert unreadable(model) is None
        monkeypatch.setattr(core, "_failed_trial", lambda _model: "asked again")
        assert unreadable(model) is None
        assert unreadable(make_vit()) == "asked again"

    def test_a_cnn_is_named_with_its_class(self, cnn: Model) -> None:
        with pytest.raises(RequestError, match="TinyCNN is not a row of blocks"):
            _ = make_batch(cnn).attention

    def test_a_network_without_a_head_has_no_classes(self) -> None:
        model = load_model(
            "timm/vit_small_patch14_reg4_dinov2",
            pretrained=False,
            input_size=28,
            kwargs={"img_size": 28, "depth": 1, "embed_dim": 12, "num_heads": 2},
        )
        with pytest.raises(RequestError, match=r"no classification head \(num_classes=0\).*give it one"):
            _ = model.family


def test_every_block_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is jumped over leaves a map too few."""
    model = make_vit()
    monkeypatch.setattr(model.module.blocks[4], "forward", lambda x, **_: x)
    with pytest.raises(RequestError, match="5 attention maps of 6 blocks"):
        Attention(model, some_images(model))
