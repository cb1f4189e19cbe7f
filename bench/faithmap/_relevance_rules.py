"""The rules of layer-wise relevance propagation, each as the backward pass of one operation.

Relevance R travels as the ratio s = R / x of relevance to activation, which autograd carries as if it
were a gradient: "modified gradient times input". An operation that is linear in its inputs needs no
rule at all, since R_i = x_i ds/dx_i is what its gradient gives; this is why sums of a residual net, slices
and pooling are right without any rewriting of the network. What needs a rule is here: weighted layers,
gates (an operation's output divided by its input, held fixed) and sums that are rescaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from faithmap.errors import RequestError, nearest

#: Rules for weighted layers. "flat" and "box" are for the layer that reads the image.
KINDS = ("epsilon", "alpha-beta", "gamma", "flat", "box")
#: Rules that need the image's own companions (a tensor of ones, the bounds of the pixels' range).
INPUT_KINDS = ("flat", "box")


@dataclass(frozen=True)
class Rule:
    """How a linear or convolutional layer z_j = sum_i x_i w_ij + b_j hands its relevance R_j down.

    "epsilon": R_i = sum_j x_i w_ij / (z_j + epsilon sign z_j) R_j; the bias keeps its share
        (Bach et al. 2015, eq. 58).
    "alpha-beta": positive contributions get alpha R_j and negative ones -beta R_j, beta = alpha - 1,
        each in proportion (Bach et al. 2015, eq. 60); the bias gets nothing. alpha = 1 is the z-plus
        rule, read by the sign of contributions, so that it holds for signed inputs too
        (Chefer et al. 2021, sec. 3.1).
    "gamma": contributions of the sign of z_j are raised by the factor 1 + gamma; the bias takes part
        (Montavon et al. 2019, extended to negative z_j).
    "flat": every input of a neuron gets the same share.
    "box": for inputs known to lie in [l, h]: shares x_i w_ij - l_i w_ij^+ - h_i w_ij^-
        (Montavon et al. 2017, z^B rule).

    Args:
        kind: one of `KINDS`.
        epsilon: stabiliser of "epsilon", in the unit of activations, not negative.
        alpha: weight of the positive part of "alpha-beta", 1 or more.
        gamma: how far "gamma" prefers one sign, not negative.

    Raises:
        RequestError: the kind is unknown, or a number is out of range.
    """

    kind: str
    epsilon: float = 1e-6
    alpha: float = 1.0
    gamma: float = 0.25

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"unknown relevance rule '{self.kind}'; {nearest(self.kind, KINDS)}")
        for name, value, least in (
            ("epsilon", self.epsilon, 0), ("alpha", self.alpha, 1), ("gamma", self.gamma, 0)
        ):  # fmt: skip
            if not value >= least:
                raise RequestError(f"relevance rule, {name}: got {value}, expected {least} or more")


@dataclass(frozen=True)
class Layer:
    """A weighted layer without its bias: forwards, and transposed."""

    forward: Callable[[Tensor, Tensor], Tensor]
    #: (gradient of the output, weight, shape of the input) -> gradient of the input.
    transposed: Callable[[Tensor, Tensor, torch.Size], Tensor]


@dataclass(frozen=True)
class Sources:
    """The image as the network takes it, and what the rules of the first layer need beside it."""

    image: Tensor
    #: The least and the largest value that each pixel can take.
    low: Tensor
    high: Tensor
    ones: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Sources:
        """The same operation on all four."""
        return Sources(*(change(tensor) for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four, the image first."""
        return self.image, self.low, self.high, self.ones


@dataclass(frozen=True)
class _Term:
    """One addend of a rule's backward pass: transposed(s * share, weight), where the input has a sign."""

    share: Tensor
    weight: Tensor
    #: Which entries of the weight take part: 0: all; 1 or -1: the positive or the negative ones.
    part: int = 0
    #: Which of the inputs it belongs to.
    source: int = 0
    #: The entries of the input that it is for: 0: all; 1 or -1: those that are positive, or not.
    sign: int = 0

    def weights(self) -> Tensor:
        """Taken when needed, so that no second copy of a network's weights is kept meanwhile."""
        return _part(self.weight, self.part)


def _part(weight: Tensor, sign: int) -> Tensor:
    """A weight's positive (1) or negative (-1) part, or all of it (0)."""
    return weight if sign == 0 else weight.clamp_min(0) if sign > 0 else weight.clamp_max(0)


@dataclass
class _Plan:
    layer: Layer
    terms: list[_Term]
    output: Tensor | None = None
    shapes: list[torch.Size] = field(default_factory=list)
    positive: Tensor | None = None


class _Propagate(Function):
    """The identity forwards (the output is known); the terms of a rule backwards."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *sources: Tensor) -> Tensor:
        output, plan.output = plan.output, None
        assert output is not None
        plan.shapes = [source.shape for source in sources]
        if any(term.sign for term in plan.terms):
            plan.positive = sources[0] > 0
        ctx.plan = plan
        return output

    @staticmethod
    def backward(ctx: Any, *ratios: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        sums: list[Tensor | None] = [None] * len(plan.shapes)
        for term in plan.terms:
            part = plan.layer.transposed(ratios[0] * term.share, term.weights(), plan.shapes[term.source])
            if term.sign:
                assert plan.positive is not None
                part = part * (plan.positive if term.sign > 0 else ~plan.positive)
            known = sums[term.source]
            sums[term.source] = part if known is None else known + part
        return None, *sums


class _Gate(Function):
    """Forwards a known output; backwards the ratio times a fixed gate."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, known: list[Tensor], gate: Tensor) -> Tensor:
        ctx.gate = gate
        return known.pop()

    @staticmethod
    def backward(ctx: Any, *ratios: Tensor) -> tuple[Tensor | None, ...]:
        return ratios[0] * ctx.gate, None, None


class _RescaledSum(Function):
    """a + b, whose summands' relevances are brought back to the sum of what arrived, image by image."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, second)
        return first + second

    @staticmethod
    def backward(ctx: Any, *ratios: Tensor) -> tuple[Tensor, Tensor]:
        summands = ctx.saved_tensors
        totals = [(summand * ratios[0]).flatten(1).sum(1) for summand in summands]
        arrived = totals[0] + totals[1]
        size = totals[0].abs() + totals[1].abs()
        factors = [ratio(total.abs() * arrived, size * total) for total in totals]
        shape = (-1, *[1] * (ratios[0].ndim - 1))
        return ratios[0] * factors[0].view(shape), ratios[0] * factors[1].view(shape)


# `apply` is untyped in torch.
_propagate: Any = _Propagate.apply
_gate: Any = _Gate.apply
_rescaled_sum: Any = _RescaledSum.apply


def propagate(
    rule: Rule,
    layer: Layer,
    output: Tensor,
    inputs: Tensor | Sources,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A layer's output, connected to its inputs by a rule.

    Args:
        rule: the rule.
        layer: the layer without bias.
        output: its output with bias, known already.
        inputs: what it read; `Sources` where that is the image itself.
        weight: its weight, without a graph.
        bias: of shape that broadcasts with the output, or None.
    """
    sources = inputs.tensors() if isinstance(inputs, Sources) else (inputs,)
    with torch.no_grad():
        terms = _TERMS[rule.kind](rule, layer, output, sources, weight, bias)
    connected: Tensor = _propagate(_Plan(layer, terms, output), *sources)
    return connected


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Elementwise quotient, zero where the denominator is."""
    return torch.where(denominator == 0, 0.0, numerator / torch.where(denominator == 0, 1.0, denominator))


def stabilised(values: Tensor, epsilon: float) -> Tensor:
    """The share z / (z + epsilon sign z) that a stabilised denominator leaves; zero where z is."""
    return ratio(values.abs(), values.abs() + epsilon)


def _epsilon(
    rule: Rule, layer: Layer, output: Tensor, sources: Any, weight: Tensor, bias: Tensor | None
) -> list[_Term]:
    return [_Term(stabilised(output, rule.epsilon), weight)]


def _sum_of_sign(layer: Layer, inputs: Tensor, weight: Tensor, sign: int, signed: bool) -> Tensor:
    """The sum of all contributions of one sign (1 or -1)."""
    total = layer.forward(inputs.clamp_min(0), _part(weight, sign))
    return total + layer.forward(inputs.clamp_max(0), _part(weight, -sign)) if signed else total


def _by_sign(share: Tensor, weight: Tensor, sign: int, signed: bool) -> list[_Term]:
    """The terms of the contributions of one sign (1 or -1)."""
    terms = [_Term(share, weight, part=sign, sign=1)]
    return [*terms, _Term(share, weight, part=-sign, sign=-1)] if signed else terms


def _alpha_beta(
    rule: Rule, layer: Layer, output: Tensor, sources: Any, weight: Tensor, bias: Tensor | None
) -> list[_Term]:
    inputs = sources[0]
    signed = bool((inputs < 0).any())
    terms = []
    for sign, factor in ((1, rule.alpha), (-1, 1 - rule.alpha)):
        if factor:
            total = _sum_of_sign(layer, inputs, weight, sign, signed)
            terms += _by_sign(factor * ratio(output, total), weight, sign, signed)
    return terms


def _gamma(
    rule: Rule, layer: Layer, output: Tensor, sources: Any, weight: Tensor, bias: Tensor | None
) -> list[_Term]:
    inputs = sources[0]
    signed = bool((inputs < 0).any())
    up, down = (_sum_of_sign(layer, inputs, weight, sign, signed) for sign in (1, -1))
    if bias is not None:
        up, down = up + bias.clamp_min(0), down + bias.clamp_max(0)
    whole = output + rule.gamma * torch.where(output > 0, up, down)
    share = stabilised(whole, rule.epsilon) * ratio(output, whole)
    raised = rule.gamma * share
    return [
        _Term(share, weight),
        *_by_sign(raised * (output > 0), weight, 1, signed),
        *_by_sign(raised * (output <= 0), weight, -1, signed),
    ]


def _flat(
    rule: Rule, layer: Layer, output: Tensor, sources: Any, weight: Tensor, bias: Tensor | None
) -> list[_Term]:
    equal = torch.ones_like(weight)
    return [_Term(ratio(output, layer.forward(sources[3], equal)), equal, source=3)]


def _box(
    rule: Rule, layer: Layer, output: Tensor, sources: Any, weight: Tensor, bias: Tensor | None
) -> list[_Term]:
    image, low, high, _ = sources
    bounds = layer.forward(low, _part(weight, 1)) + layer.forward(high, _part(weight, -1))
    share = ratio(output, layer.forward(image, weight) - bounds)
    return [
        _Term(share, weight),
        _Term(-share, weight, part=1, source=1),
        _Term(-share, weight, part=-1, source=2),
    ]


_TERMS: dict[str, Callable[..., list[_Term]]] = {
    "epsilon": _epsilon, "alpha-beta": _alpha_beta, "gamma": _gamma, "flat": _flat, "box": _box
}  # fmt: skip


def identity(inputs: Tensor, output: Tensor) -> Tensor:
    """An elementwise operation through which relevance passes unchanged: the gate is output / input.

    Where the input is zero no ratio exists, and none is passed on.
    """
    with torch.no_grad():
        gate = ratio(output, inputs)
    connected: Tensor = _gate(inputs, [output], gate)
    return connected


def rescaled_sum(first: Tensor, second: Tensor) -> Tensor:
    """A sum of two activations under the normalisation of Chefer et al. 2021, sec. 3.2.

    The summands' relevances R_u, R_v by share are multiplied with
    |sum R_u| / (|sum R_u| + |sum R_v|) * sum R / sum R_u, and likewise for v.
    """
    connected: Tensor = _rescaled_sum(first, second)
    return connected
