"""Layer-wise relevance propagation: how much of a logit each pixel, layer or attention weight accounts for.

Works through any network that consists of known operations; see `_relevance_tracer` for how, and
`_relevance_rules` for the rules. A network with an operation that has no rule is refused with its name
(`why_not` says so beforehand).

The passes run in single precision also where the model runs in bf16, because rules divide. Rules that let
relevance pass norms entry by entry divide by activations of any size: they run in double precision where
the device has it, or else rounding would show, and a batch and its images would get different maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faithmap._relevance_rules import Rule, Sources, ratio
from faithmap._relevance_tracer import Rules, Tracer, Unsupported
from faithmap.errors import RequestError, nearest
from faithmap.models import Model
from faithmap.perturb import chunk_size

__all__ = [
    "SEEDS", "Rule", "Rules", "Unsupported", "attention_gradients", "attention_relevance", "chefer_rules",
    "chunks", "image_relevance", "layer_relevance", "token_map", "why_no_attention", "why_not",
]  # fmt: skip

#: Where propagation starts: with the target's logit, or with one.
SEEDS = ("logit", "one")


def chefer_rules(
    *, linear: Rule | None = None, conv: Rule | None = None, first: Rule | None = None, rescale: bool = False
) -> Rules:
    """The rules of Chefer et al. 2021 (arXiv:2012.09838) for transformers, alpha = 1 where none is given.

    Weighted layers hand relevance to positive contributions (sec. 3.1), the layer that reads the image by
    its box. Norms, activations and the softmax pass relevance entry by entry. Each of two matrices that
    are multiplied gets half of it, to which the normalisation of sec. 3.2 comes down for operands that
    would both get all of it.

    Args:
        linear: another rule for fully connected layers.
        conv: another rule for convolutions.
        first: another rule for the layer that reads the image.
        rescale: whether that normalisation is applied to sums of two activations as well.
    """
    plus = Rule("alpha-beta", alpha=1.0)
    return Rules(
        linear or plus, conv or plus, first or Rule("box"),
        norm="identity", softmax="identity", rescale=rescale,
    )  # fmt: skip


def image_relevance(
    model: Model, images: Tensor, targets: Tensor, rules: Rules, *, seed: str = "logit"
) -> Tensor:
    """The share (B, 3, H, W) of each channel of each pixel in the seed; one forward and one backward.

    Args:
        model: the model.
        images: (B, 3, H, W) in [0, 1].
        targets: (B,) explained classes.
        rules: which rule each kind of operation follows.
        seed: one of `SEEDS`.

    Raises:
        Unsupported: the network holds an operation without a rule.
    """
    parts = []
    for some, classes in chunks(model, images, targets):
        traced = _trace(model, some, rules)
        ratios = traced.ratios(classes, traced.leaves.tensors(), seed)
        products = [leaf.detach() * s for leaf, s in zip(traced.leaves.tensors(), ratios, strict=True)]
        parts.append(torch.stack(products).sum(0).to(images.dtype))
    return torch.cat(parts)


def layer_relevance(
    model: Model, images: Tensor, targets: Tensor, rules: Rules, layers: Sequence[str], *, seed: str = "logit"
) -> dict[str, Tensor]:
    """The relevance of the outputs of named layers, in their shapes; one forward and one backward.

    Args: see `image_relevance`; `layers` are dotted names of modules that return one tensor. The output of
    a convolution whose batch norm was folded into it has no part in the propagation: it gets zeros.
    """
    parts: list[dict[str, Tensor]] = []
    for some, classes in chunks(model, images, targets):
        held: dict[str, Tensor] = {}
        handles = [model.layer(name).register_forward_hook(_keep(held, name)) for name in layers]
        try:
            traced = _trace(model, some, rules)
        finally:
            for handle in handles:
                handle.remove()
        ratios = traced.ratios(classes, list(held.values()), seed)
        parts.append({name: held[name].detach() * s for name, s in zip(held, ratios, strict=True)})
    return {name: torch.cat([part[name] for part in parts]).to(images.dtype) for name in parts[0]}


def attention_relevance(
    model: Model,
    images: Tensor,
    targets: Tensor,
    rules: Rules,
    *,
    seed: str = "one",
    blocks: slice = slice(None),
) -> list[Tensor]:
    """Relevance (B, heads, N, N) of the attention weights of some blocks; one forward and one backward.

    All images run at once: give as many as `chunks` does.
    """
    traced = _trace(model, images, rules)
    chosen = traced.attention[blocks]
    ratios = traced.ratios(targets, chosen, seed)
    return [weights.detach() * s for weights, s in zip(chosen, ratios, strict=True)]


def attention_gradients(
    model: Model, images: Tensor, targets: Tensor, *, blocks: slice = slice(None)
) -> list[Tensor]:
    """Gradients (B, heads, N, N) of the targets' logits by the attention weights; one pass each way.

    All images run at once: give as many as `chunks` does.
    """
    traced = _trace(model, images, None)
    return traced.ratios(targets, traced.attention[blocks], "logit")


def chunks(model: Model, images: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """As many images, with their targets, as a pass fits that keeps every activation and its shares."""
    count = max(1, chunk_size(model, (int(images.shape[2]), int(images.shape[3]))) // 8)
    yield from zip(images.split(count), targets.split(count), strict=True)


def token_map(model: Model, matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """What the pooled tokens draw from each patch: matrices (B, N, N), rows by column, to (B, h, w).

    The pooled tokens are the class token, with the distillation token where the head reads both, or all
    patches where the head averages them; of several rows the mean is taken.

    Args:
        model: a transformer for which `why_no_attention` has nothing to say.
        matrices: relevance of the token of a column for the token of a row.
        size: (H, W) of the images.
    """
    tokens = matrices[:, _pooled_rows(model.module)].mean(1)
    return model.features(tokens.unsqueeze(2), size=size)[:, 0]


def why_not(model: Model, rules: Rules) -> str:
    """Why rules do not cover a model; empty where they do. One uncounted pass of a blank image."""
    return _probe(model, rules)[0]


def why_no_attention(model: Model, rules: Rules) -> str:
    """Why the relevance of attention weights cannot be read of a model; empty where it can."""
    network = model.module
    blocks, prefix = getattr(network, "blocks", None), getattr(network, "num_prefix_tokens", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or prefix is None:
        return "attention is read of timm's vision transformers only"
    if getattr(network, "global_pool", None) not in ("token", "avg"):
        return f"attention is not read where the head pools by '{getattr(network, 'global_pool', None)}'"
    reason, attention = _probe(model, rules)
    if reason:
        return reason
    tokens = {tuple(weights.shape[2:]) for weights in attention}
    patches = model.grid[0] * model.grid[1]
    if len(attention) != len(blocks) or tokens != {(prefix + patches, prefix + patches)}:
        return "attention is read of transformers only whose blocks all attend to all tokens"
    return ""


@dataclass(frozen=True)
class _Traced:
    """One forward pass with its graph of ratios."""

    leaves: Sources
    logits: Tensor
    attention: list[Tensor]

    def ratios(self, targets: Tensor, tensors: Sequence[Tensor], seed: str) -> list[Tensor]:
        """Relevance divided by activation at some tensors; zeros where none arrives."""
        if seed not in SEEDS:
            raise RequestError(f"unknown seed '{seed}'; {nearest(seed, SEEDS)}")
        index = targets.view(-1, 1)
        start = torch.zeros_like(self.logits)
        chosen = self.logits.detach().gather(1, index)
        start.scatter_(1, index, torch.ones_like(chosen))
        if seed == "one":
            start = ratio(start, self.logits.detach())
        found = torch.autograd.grad(self.logits, list(tensors), start, allow_unused=True)
        return [torch.zeros_like(t) if s is None else s.detach() for t, s in zip(tensors, found, strict=True)]


def _trace(model: Model, images: Tensor, rules: Rules | None) -> _Traced:
    """Run the model once under a tracer; the pass is counted as any other."""
    leaves = _leaves(model, images, rules)
    # Copies go on: the network may work in place, which leaves do not allow.
    with torch.enable_grad():
        entering = leaves.map(torch.clone)
    tracer = Tracer(rules, entering, _attention_weights(model.module))
    handle = model.module.register_forward_pre_hook(lambda _module, inputs: (entering.image, *inputs[1:]))
    try:
        with torch.enable_grad(), tracer:
            logits = model(images)
    finally:
        handle.remove()
    if rules is not None and rules.first is not None and not tracer.read_image:
        raise Unsupported("no convolution or linear layer of the network reads the image itself")
    if not logits.requires_grad:
        raise Unsupported("the logits do not depend on the image")
    return _Traced(leaves, logits, tracer.attention)


def _leaves(model: Model, images: Tensor, rules: Rules | None) -> Sources:
    """The normalised images and the bounds of what they could be, as leaves of a graph."""
    wide = rules is not None and rules.norm == "identity" and images.device.type != "mps"
    precise = torch.float64 if wide else torch.promote_types(images.dtype, torch.float32)
    with torch.no_grad():
        image = model.normalise(images).to(precise)
        low = model.normalise(torch.zeros_like(images[:1])).to(precise).expand_as(image)
        high = model.normalise(torch.ones_like(images[:1])).to(precise).expand_as(image)
    sources = Sources(image, low, high, torch.ones_like(image))
    return sources.map(lambda tensor: tensor.detach().contiguous().requires_grad_())


def _attention_weights(network: nn.Module) -> list[Tensor]:
    """Weights of the linear layers within modules that have heads."""
    return [
        layer.weight
        for module in network.modules()
        if hasattr(module, "num_heads") and not hasattr(module, "blocks")
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    ]


def _keep(held: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise RequestError(
                f"layer '{name}' returns a {type(output).__name__}; name one that returns a tensor"
            )
        held[name] = output

    return hook


def _pooled_rows(network: nn.Module) -> list[int] | slice:
    """The tokens that the head of a timm transformer reads."""
    prefix = int(network.num_prefix_tokens)  # type: ignore[arg-type]
    if network.global_pool == "avg":
        return slice(0 if getattr(network, "pool_include_prefix", False) else prefix, None)
    return [0, 1] if hasattr(network, "head_dist") else [0]


def _probe(model: Model, rules: Rules) -> tuple[str, list[Tensor]]:
    """The reason why a blank image cannot be traced, or its attention weights; counts as no pass."""
    blank = torch.zeros(1, 3, *model.input_size, device=model.device, dtype=model.mean.dtype)
    forwards = model.meter.forwards
    try:
        return "", _trace(model, blank, rules).attention
    except Unsupported as error:
        return str(error), []
    finally:
        model.meter.forwards = forwards
