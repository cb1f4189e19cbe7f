"""The dual-stream bottleneck of InfoCAM (reconstruction), rewritten: one image, float64, by loops.

Gradients are finite differences of the loss, and the equation of the mean-field mode is solved by
halving, so that neither a derivative nor a formula is taken for granted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from slow_bottleneck import divergence, slopes

Array = NDArray[np.float64]
Tail = Callable[[Array], Array]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_odds(logits: Array, target: int) -> float:
    """log of p(target) / p(any other class)."""
    powers = [math.exp(logit) for logit in logits]
    return math.log(powers[target] / (sum(powers) - powers[target]))


def cross_entropy(score: float) -> float:
    """-log p(Y = 1) of some log-odds."""
    return -math.log(sigmoid(score))


def told(score: float, prior: float) -> float:
    """KL of the prior from p, both of a binary variable; nothing where p is below the prior."""
    if score <= prior:
        return 0.0
    pi, p = sigmoid(prior), sigmoid(score)
    return pi * math.log(pi / p) + (1 - pi) * math.log((1 - pi) / (1 - p))


def belief_divergence(score: float, prior: float) -> float:
    """KL of p from pi, the sigmoids of two log-odds: the sum over both values of the binary variable."""
    p, pi = sigmoid(score), sigmoid(prior)
    return p * math.log(p / pi) + (1 - p) * math.log((1 - p) / (1 - pi))


def opened(kind: str, alpha: Array, features: Array, mean: Array) -> Array:
    """lambda (K, N) from the parameters (K,), (2, K) or (K, N)."""
    result = np.zeros_like(features)
    for k, u in np.ndindex(features.shape):
        if kind == "channel":
            a = alpha[k]
        elif kind == "half":
            a = alpha[0, k] if features[k, u] > mean[k, u] else alpha[1, k]
        else:
            a = alpha[k, u]
        result[k, u] = sigmoid(a)
    return result


def nats(features: Array, mean: Array, std: Array, share: Array) -> Array:
    values = np.zeros_like(features)
    for place in np.ndindex(features.shape):
        values[place] = divergence(features[place], mean[place], std[place], share[place])
    return values


def loss(
    tail: Tail, target: int, features: Array, mean: Array, std: Array, share: Array,
    draws: Array, noise_draws: Array, prior: float, beta: float, gamma: float,
) -> float:  # fmt: skip
    """Section 4.3's loss; draws (samples / 2, K, N) of each stream, which are used with both signs."""
    total = 0.0
    signed = [one * e for one in (1, -1) for e in draws]
    for e in signed:
        z = share * features + (1 - share) * (mean + std * e)
        total += cross_entropy(log_odds(tail(z), target)) / len(signed)
    signed = [one * e for one in (1, -1) for e in noise_draws]
    for e in signed:
        z = (1 - share) * features + share * (mean + std * e)
        total += gamma * told(log_odds(tail(z), target), prior) / len(signed)
    return total + beta * float(nats(features, mean, std, share).mean())


def report(
    tail: Tail, target: int, features: Array, mean: Array, std: Array, share: Array,
    draws: Array, noise_draws: Array,
) -> dict[str, float]:  # fmt: skip
    """Section 4.3's bounds a to c for one image, by draws that are used with both signs."""

    def scores(opened: Array, drawn: Array) -> list[float]:
        found = []
        for e in [one * draw for one in (1, -1) for draw in drawn]:
            found.append(log_odds(tail(opened * features + (1 - opened) * (mean + std * e)), target))
        return found

    kept, blind = scores(share, draws), scores(np.zeros_like(share), draws)
    left = scores(1 - share, noise_draws)
    prior = sum(blind) / len(blind)
    return {
        "kept": sum(cross_entropy(score) for score in kept) / len(kept),
        "clean": cross_entropy(log_odds(tail(features), target)),
        "noise": sum(cross_entropy(score) for score in blind) / len(blind),
        "information": float(nats(features, mean, std, share).sum()),
        "bound": sum(belief_divergence(score, prior) for score in left) / len(left),
        "leak": sum(belief_divergence(score, prior) for score in left if score > prior) / len(left),
    }


def optimised(
    tail: Tail, target: int, features: Array, mean: Array, std: Array, kind: str, start: Array,
    draws: Sequence[tuple[Array, Array]], prior: float, *, beta: float, gamma: float, rate: float,
) -> Array:  # fmt: skip
    """The gates' parameters after a step of Adam for each pair of draws, kept within -8 and 8."""
    point = start.copy()
    first, second = np.zeros_like(start), np.zeros_like(start)
    for t, (one, two) in enumerate(draws):

        def objective(at: Array, one: Array = one, two: Array = two) -> float:
            share = opened(kind, at, features, mean)
            return loss(tail, target, features, mean, std, share, one, two, prior, beta, gamma)

        g = slopes(objective, point)
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g * g
        step = (first / (1 - 0.9 ** (t + 1))) / (np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-8)
        point = np.clip(point - rate * step, -8, 8)
    return point


def halved(wanted: float, squares: float) -> float:
    """lambda at which 1 / (1 - lambda) - (1 - lambda) + lambda squares is what is wanted."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if 1 / (1 - middle) - (1 - middle) + middle * squares < wanted:
            low = middle
        else:
            high = middle
    return low


def mean_field(
    tail: Tail, target: int, features: Array, mean: Array, std: Array, coins: NDArray[np.bool_],
    noises: Array, prior: float, beta: float, gamma: float,
) -> Array:  # fmt: skip
    """lambda (K,) of channels, from contexts: coins (contexts, K), noises (contexts, K, N).

    A channel shut in the discriminative stream is open in the noise stream. Coins turned over are as
    likely, so the pass with the channel open also is one of a noise stream in which it is open.
    """
    result = np.zeros(len(features))
    for k in range(len(features)):
        gains = []
        for coin, noise in zip(coins, noises, strict=True):
            value = {}
            for state in (True, False):
                keep = coin.copy()
                keep[k] = state
                z = np.where(keep[:, None], features, mean + std * noise)
                score = log_odds(tail(z), target)
                value[state] = cross_entropy(score), gamma * told(score, prior)
            gains.append(value[False][0] + value[True][1] - value[True][0] - value[False][1])
        gain = max(sum(gains) / len(gains), 0.0)
        squares = float((((features[k] - mean[k]) / std[k]) ** 2).mean())
        result[k] = halved(gain * len(features) / beta, squares) if gain else 0.0
    return result


def channel_map(features: Array, mean: Array, carried: Array, *, excess: bool) -> Array:
    """ReLU of the channels' sum, weighted by what they carry where they are present; cells (N,)."""
    weights = np.zeros(len(features))
    for k in range(len(features)):
        if (features[k] - mean[k]).mean() > 0:
            weights[k] = carried[k].mean()
    total = np.zeros(features.shape[1])
    for k in range(len(features)):
        shown = np.maximum(features[k] - mean[k], 0) if excess else features[k]
        total += weights[k] / weights.sum() * shown
    return np.maximum(total, 0)


def half_map(features: Array, mean: Array, carried: Array) -> Array:
    """Half channels above and below the mean, each weighted by what it carries; cells (N,)."""
    cells = features.shape[1]
    above = features > mean
    upper = [sum(carried[k, u] for u in range(cells) if above[k, u]) / cells for k in range(len(features))]
    lower = [
        sum(carried[k, u] for u in range(cells) if not above[k, u]) / cells for k in range(len(features))
    ]
    total = np.zeros(cells)
    for k in range(len(features)):
        for u in range(cells):
            step = features[k, u] - mean[k, u]
            total[u] += (upper[k] * max(step, 0) + lower[k] * max(-step, 0)) / (sum(upper) + sum(lower))
    return total
