"""Two streams of noisy features at a cut of a network: what tells the class, and what does not.

The dual-stream bottleneck behind InfoCAM (reconstruction). A gate lambda in (0, 1) divides each
feature A, beside noise eps ~ N(mu, sigma^2), into

    z_d = lambda A + (1 - lambda) eps_d    the discriminative stream, and
    z_n = (1 - lambda) A + lambda eps_n    the noise stream,

whose means add up to A + mu. Gates are found such that z_d keeps the class (its cross-entropy), holds
little else (KL of z_d given A from the noise, which bounds I(Z_d; A)), and z_n tells nothing of the
class (KL of p(Y | z_n) from a fixed prior, which bounds I(Z_n; Y)). Y says whether the class is the
explained one or any other, so that z_n may keep what speaks for other classes.

Gates are all that is optimised, and their information is all that a weight is made of: it is found by
derivatives of the losses with respect to gates, at noisy features, and no gradient of a score with respect
to the image's features is a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from faithmap.bottleneck import OWN_STATISTICS, Statistics, load_statistics, reference
from faithmap.cuts import Cut, Tail
from faithmap.errors import RequestError
from faithmap.models import Model

#: Which features share a gate: a channel's, those of a channel above or below the noise's mean, none.
KINDS = ("channel", "half", "element")
#: Gates are kept between sigmoid(-LIMIT) and sigmoid(LIMIT).
LIMIT = 8.0


def divergence(alpha: Tensor, normed: Tensor) -> Tensor:
    """Nats that a gate sigmoid(alpha) passes: KL( N(lambda r, (1 - lambda)^2) || N(0, 1) ).

    That of the noise stream is `divergence(-alpha, normed)`. Equal to `bottleneck.information`, written
    so that neither end loses its digits: near lambda = 0 it is lambda^2 (1 + r^2 / 2), near 1 it is alpha.

    Args:
        alpha: any real numbers.
        normed: r, the features less the noise's mean, divided by its standard deviation.
    """
    passed = alpha.sigmoid()
    return F.softplus(alpha) - passed + 0.5 * passed.square() * (1 + normed.square())


def log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """The target's logit less the log-sum-exp of all others (N,): the logit of "it is this class"."""
    index = targets.view(-1, 1)
    others = logits.scatter(1, index, -torch.inf).logsumexp(1)
    return logits.gather(1, index).squeeze(1) - others


def told(score: Tensor, prior: Tensor) -> Tensor:
    """What a noise stream of some log-odds tells for the class: KL( pi || p ) in nats, zero up to the prior.

    p and pi are the sigmoids of the log-odds and of the prior's. The bound has KL(p || pi); this way
    round it has the same zero, and a gradient p - pi that does not vanish where the head is sure.
    Evidence against the class is let pass: below the prior the term and its gradient are zero.
    """
    pi = prior.sigmoid()
    value = pi * (F.logsigmoid(prior) - F.logsigmoid(score))
    value = value + (1 - pi) * (F.logsigmoid(-prior) - F.logsigmoid(-score))
    return torch.where(score > prior, value, torch.zeros_like(value))


@dataclass(frozen=True)
class Features:
    """The features of n images at a cut, and the noise they give way to; K channels at N places."""

    #: (n, K, N).
    values: Tensor
    #: (n, K, N) each, the noise's mean and standard deviation.
    mean: Tensor
    std: Tensor
    #: Bool (n, K, 1): channels that take part; the others stay closed.
    alive: Tensor
    #: (n,).
    targets: Tensor

    @property
    def normed(self) -> Tensor:
        """The features in the noise's unit."""
        return (self.values - self.mean) / self.std

    @property
    def above(self) -> Tensor:
        """Bool (n, K, N): where a channel is present, rather than absent."""
        return self.values > self.mean

    def select(self, part: Tensor) -> Features:
        """Some of the images."""
        return Features(
            self.values[part], self.mean[part], self.std[part], self.alive[part], self.targets[part]
        )


def with_noise(
    model: Model,
    cut: Cut,
    output: Tensor,
    targets: Tensor,
    statistics: str | Path | Statistics,
    *,
    min_std: float,
    min_active: float,
) -> Features:
    """A cut's features with the noise that statistics describe: for each channel, over images and places.

    A transformer's prefix tokens have statistics of their own. Without a file there is one image to
    take them from: their noise then lies around zero, as large as the token itself.

    Args:
        model: the model.
        cut: the layer.
        output: what the layer returned for the images.
        targets: (n,) explained classes.
        statistics: "zero", "image", a file or what it holds; see `bottleneck.reference`.
        min_std: floor under the standard deviation, in the unit of the features.
        min_active: channels that are nonzero at a smaller share of images and places stay closed; with
            statistics of the image itself, those that are zero everywhere.
    """
    layout = cut.layout
    values = layout.units(output)
    values = values if values.dtype == torch.float64 else values.float()
    own = isinstance(statistics, str) and statistics in OWN_STATISTICS
    found = None if own else _found(statistics, model, cut.layer)
    if found is None:
        maps = values[:, :, list(layout.patches)].unflatten(2, layout.grid)
        mean, std = (value.flatten(2) for value in reference(str(statistics), maps, model, cut.layer))
    else:
        # Over images and places: the variance is the mean one, and that of the means.
        variance = found.std.square().mean((1, 2)) + found.mean.var((1, 2), correction=0)
        mean, std = found.mean.mean((1, 2)).view(1, -1, 1), variance.sqrt().view(1, -1, 1)
    means, stds = mean.to(values).expand_as(values).clone(), std.to(values).expand_as(values).clone()
    if layout.prefix:
        rows = list(layout.prefix)
        if found is None:
            means[:, :, rows], stds[:, :, rows] = 0.0, values[:, :, rows].abs()
        elif found.prefix is None:
            raise RequestError(
                f"the statistics of layer '{cut.layer}' know nothing of its prefix tokens; "
                "make them anew with faithmap.bottleneck.fit_statistics"
            )
        else:
            means[:, :, rows], stds[:, :, rows] = found.prefix.to(values)
    if found is not None and found.active is not None:
        alive = (found.active.to(values.device) >= min_active).view(1, -1, 1).expand(len(values), -1, 1)
    else:
        alive = (values != 0).any(2, keepdim=True)
    return Features(values, means, stds.clamp_min(min_std), alive, targets)


def _found(statistics: str | Path | Statistics, model: Model, layer: str) -> Statistics:
    if isinstance(statistics, Statistics):
        return statistics
    return load_statistics(statistics, model, layer, words=(*OWN_STATISTICS, "fitted"))


@dataclass(frozen=True)
class Gates:
    """Parameters of the gates of n images, by their kind."""

    kind: str
    #: (n, K) for "channel", (n, 2, K) for "half" (above the mean, elsewhere), (n, K, N) for "element".
    alpha: Tensor

    @staticmethod
    def start(kind: str, features: Features, alpha: float) -> Gates:
        """All gates at one value."""
        n, channels, places = features.values.shape
        shape = {"channel": (n, channels), "half": (n, 2, channels), "element": (n, channels, places)}[kind]
        return Gates(kind, features.values.new_full(shape, alpha))

    def spread(self, features: Features) -> Tensor:
        """Each feature's parameter, (n, K, N)."""
        if self.kind == "element":
            return self.alpha
        if self.kind == "channel":
            return self.alpha.unsqueeze(2).expand_as(features.values)
        upper, lower = self.alpha.unsqueeze(3).unbind(1)
        return torch.where(features.above, upper, lower)

    def passed(self, features: Features) -> Tensor:
        """The share lambda of each feature that passes, (n, K, N)."""
        return self.spread(features).sigmoid() * features.alive

    def nats(self, features: Features) -> Tensor:
        """The information that passes each feature, (n, K, N)."""
        return divergence(self.spread(features), features.normed) * features.alive

    def streams(self, features: Features) -> tuple[Tensor, Tensor]:
        """Centre and standard deviation of both streams, (n, 2, K, N): the discriminative one, then noise."""
        alpha = self.spread(features)
        passed = alpha.sigmoid() * features.alive
        damped = torch.where(features.alive, (-alpha).sigmoid(), torch.ones_like(alpha))
        share, rest = torch.stack([passed, damped], 1), torch.stack([damped, passed], 1)
        centre = share * features.values.unsqueeze(1) + rest * features.mean.unsqueeze(1)
        return centre, rest * features.std.unsqueeze(1)


def prior_odds(
    tail: Tail, features: Features, generators: Sequence[torch.Generator], samples: int, chunk: int
) -> Tensor:
    """Mean log-odds (n,) of passes of noise alone: what is believed of the class without any image."""
    centre, spread = tail.summarise(features.mean, features.std)
    noise = _normal(generators, (samples, *tail.shape), centre)
    with torch.no_grad():
        return noisy_odds(tail, centre, spread, noise, features.targets, chunk).mean(1)


def noisy_odds(
    tail: Tail, centre: Tensor, spread: Tensor, noise: Tensor, targets: Tensor, chunk: int
) -> Tensor:
    """Log-odds (n, samples) of the targets (n,) behind a stream, of which the tail reads noisy copies.

    Args:
        tail: gives logits.
        centre, spread: (n, ...) what `Tail.summarise` gives of the stream.
        noise: (n, samples, ...), standard normal.
        targets: the classes.
        chunk: copies in one pass.
    """
    samples, scores = noise.shape[1], []
    for copies in torch.arange(len(centre) * samples, device=centre.device).split(chunk):
        i, j = copies // samples, copies % samples
        scores.append(log_odds(tail.logits(centre[i] + spread[i] * noise[i, j]), targets[i]))
    return torch.cat(scores).view(-1, samples)


def optimised(
    tail: Tail,
    features: Features,
    gates: Gates,
    generators: Sequence[torch.Generator],
    *,
    beta: float,
    gamma: float,
    iterations: int,
    samples: int,
    learning_rate: float,
    prior: Tensor,
    chunk: int,
) -> Gates:
    """The gates after some steps of Adam; the images do not touch each other.

    The loss of an image is the mean cross-entropy of Y under the discriminative stream, plus beta
    times the mean information of a feature, plus gamma times what the noise stream tells for the class.

    Args:
        tail: gives logits.
        features: of n images.
        gates: the start.
        generators: one an image.
        beta, gamma: weights; with a gamma of 0 the noise stream is not run.
        iterations: steps.
        samples: draws of each stream and step, an even number: half of them are the others' negatives.
        learning_rate: Adam's rate.
        prior: (n,) log-odds of the class without an image, from `prior_odds`.
        chunk: copies in one pass.
    """
    alpha = gates.alpha.clone()
    optimizer = torch.optim.Adam([alpha], lr=learning_rate)
    count = 2 if gamma else 1
    for _ in range(iterations):
        noise = signed_pairs(generators, (count, samples // 2, *tail.shape), features.values)
        alpha.grad = _gradient(tail, features, replace(gates, alpha=alpha), noise, beta, gamma, prior, chunk)
        optimizer.step()
        alpha.clamp_(-LIMIT, LIMIT)
    return replace(gates, alpha=alpha)


def _gradient(
    tail: Tail,
    features: Features,
    gates: Gates,
    noise: Tensor,
    beta: float,
    gamma: float,
    prior: Tensor,
    chunk: int,
) -> Tensor:
    """Gradient of every image's loss with respect to its gates' parameters.

    Args:
        tail, features, gates, beta, gamma, prior, chunk: as in `optimised`.
        noise: (n, streams, samples, ...), standard normal, of the shape that the tail reads.
    """
    count, samples = noise.shape[1:3]
    with torch.enable_grad():
        leaf = gates.alpha.detach().requires_grad_()
        open_gates = replace(gates, alpha=leaf)
        (gradient,) = torch.autograd.grad(beta * open_gates.nats(features).mean((1, 2)).sum(), leaf)
    for copies in torch.arange(noise.shape[:3].numel(), device=leaf.device).split(chunk):
        i, stream, j = copies // (count * samples), copies // samples % count, copies % samples
        with torch.enable_grad():
            both = [value[:, :count].flatten(0, 1) for value in open_gates.streams(features)]
            centre, spread = (value.unflatten(0, (-1, count)) for value in tail.summarise(*both))
            mixed = centre[i, stream] + spread[i, stream] * noise[i, stream, j]
            score = log_odds(tail.logits(mixed), features.targets[i])
            loss = torch.where(stream == 0, F.softplus(-score), gamma * told(score, prior[i])).sum() / samples
            gradient = gradient + torch.autograd.grad(loss, leaf)[0]
    return gradient


def mean_field(
    tail: Tail,
    features: Features,
    gates: Gates,
    generators: Sequence[torch.Generator],
    *,
    beta: float,
    gamma: float,
    contexts: int,
    prior: Tensor,
    chunk: int,
) -> Gates:
    """Gates without any gradient: each weighs what it does in random company against its information.

    In a context every gate is open or shut by a coin. g is the loss with a gate shut less the loss with
    it open, averaged over contexts; the gate then solves, with the mean over its features,

        1 / (1 - lambda) - (1 - lambda) + lambda mean(r^2) = max(g, 0) K / beta,

    whose left side is the derivative of its information. The noise stream of a context is the
    discriminative one of the opposite coins, which are as likely: one pass serves both terms of the loss.

    Args:
        tail, features, generators, beta, gamma, prior, chunk: as in `optimised`.
        gates: of the kind "channel" or "half"; their values do not matter.
        contexts: how many.
    """
    flat = gates.alpha.flatten(1)
    images, number = flat.shape
    coins = torch.stack([_coins(one, (contexts, number)) for one in generators]).to(flat.device)
    noise = _normal(generators, (contexts, *features.values.shape[1:]), features.values)
    shape = (images, contexts, number, 2)
    change = flat.new_zeros(shape)
    with torch.no_grad():
        for copies in torch.arange(change.numel(), device=flat.device).split(chunk):
            i, context, which, shut = torch.unravel_index(copies, shape)
            coin = coins[i, context]
            coin.scatter_(1, which.unsqueeze(1), (shut == 0).unsqueeze(1))
            here = features.select(i)
            mask = replace(gates, alpha=coin.to(flat.dtype).view(-1, *gates.alpha.shape[1:])).spread(here)
            mixed = torch.where(
                (mask > 0) & here.alive, here.values, here.mean + here.std * noise[i, context]
            )
            centre, _ = tail.summarise(mixed, torch.zeros_like(mixed))
            score = log_odds(tail.logits(centre), here.targets)
            change[i, context, which, shut] = F.softplus(-score) - gamma * told(score, prior[i])
    gain = (change[..., 1] - change[..., 0]).mean(1).clamp_min(0)
    share = solved(gain, *_gate_moments(features, gates), beta)
    return replace(gates, alpha=torch.logit(share).to(flat).view_as(gates.alpha))


def _gate_moments(features: Features, gates: Gates) -> tuple[Tensor, Tensor]:
    """The share of all features that each gate holds, and their mean r^2; both (n, gates)."""
    squares = features.normed.square()
    halves = [features.above, ~features.above] if gates.kind == "half" else [torch.ones_like(features.above)]
    count = torch.stack([half.sum(2) for half in halves], 1).to(squares)
    sums = torch.stack([(squares * half).sum(2) for half in halves], 1)
    share = (count / features.values[0].numel() * features.alive.transpose(1, 2)).flatten(1)
    return share, (sums / count.clamp_min(1)).flatten(1)


def solved(gain: Tensor, share: Tensor, squares: Tensor, beta: float) -> Tensor:
    """lambda at which the information's derivative, times beta and the gate's share, is the gain; float64.

    With d = 1 - lambda and w = gain / (beta share), 1 / d - d + (1 - d) squares = w is the quadratic
    equation (1 + squares) d^2 + (w - squares) d - 1 = 0, of which one root is positive. A gate without
    gain, or without features, is shut.

    Args:
        gain: what a gate is worth in loss.
        share: of all features, those that hang on it.
        squares: their mean r^2.
        beta: the weight of the information.
    """
    gain, share, squares = gain.double(), share.double(), squares.double()
    wanted = torch.where(share > 0, gain / (beta * share.clamp_min(1e-300)), torch.zeros_like(gain))
    slope = wanted - squares
    root = (slope.square() + 4 * (1 + squares)).sqrt()
    # Two ways to write the root; each loses its digits where the other keeps them.
    damped = torch.where(slope > 0, 2 / (root + slope.clamp_min(0)), (root - slope) / (2 * (1 + squares)))
    return torch.where(wanted > 0, 1 - damped, torch.zeros_like(damped)).clamp_min(0)


def _normal(generators: Sequence[torch.Generator], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal numbers (n, *shape), those of an image from its own generator."""
    return torch.stack([torch.randn(shape, generator=one) for one in generators]).to(like)


def signed_pairs(generators: Sequence[torch.Generator], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal (streams, half, ...) for an image, and their negatives: (n, streams, 2 half, ...)."""
    drawn = _normal(generators, shape, like)
    return torch.cat([drawn, -drawn], 2)


def _coins(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=generator) < 0.5
