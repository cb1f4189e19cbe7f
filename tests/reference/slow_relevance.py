"""Relevance propagation rewritten from the papers: relevances themselves, one z_ij at a time, in float64.

Nothing here divides relevance by activation on the way, as the library does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def dense(
    kind: str,
    x: Array,
    weight: Array,
    bias: Array | None,
    relevance: Array,
    *,
    epsilon: float = 0.0,
    alpha: float = 1.0,
    gamma: float = 0.25,
    low: Array | None = None,
    high: Array | None = None,
) -> Array:
    """Relevance of the inputs (I,) of z = weight (O, I) x + bias (O,), from that of z (O,)."""
    outputs, inputs = weight.shape
    handed = np.zeros(inputs)
    for j in range(outputs):
        z = [x[i] * weight[j, i] for i in range(inputs)]
        b = 0.0 if bias is None else float(bias[j])
        shares = [0.0] * inputs
        if kind == "epsilon":
            whole = sum(z) + b
            shares = [part / (whole + math.copysign(epsilon, whole)) for part in z]
        elif kind == "alpha-beta":
            up, down = sum(max(part, 0.0) for part in z), sum(min(part, 0.0) for part in z)
            for i, part in enumerate(z):
                if part > 0:
                    shares[i] = alpha * part / up
                elif part < 0:
                    shares[i] = -(alpha - 1) * part / down
        elif kind == "gamma":
            sign = 1.0 if sum(z) + b > 0 else -1.0
            z = [part * (1 + gamma) if part * sign > 0 else part for part in z]
            whole = sum(z) + (b * (1 + gamma) if b * sign > 0 else b)
            shares = [part / (whole + math.copysign(epsilon, whole)) for part in z]
        elif kind == "flat":
            # Only the inputs that the neuron is connected to: where an unrolled convolution has weights.
            reached = [i for i in range(inputs) if not np.isnan(weight[j, i])]
            shares = [1 / len(reached) if i in reached else 0.0 for i in range(inputs)]
        elif kind == "box":
            assert low is not None and high is not None
            z = [
                x[i] * weight[j, i] - low[i] * max(weight[j, i], 0.0) - high[i] * min(weight[j, i], 0.0)
                for i in range(inputs)
            ]
            shares = [part / sum(z) for part in z]
        for i in range(inputs):
            handed[i] += shares[i] * relevance[j]
    return handed


def unrolled(weight: Array, side: int, stride: int, padding: int, blank: float = 0.0) -> Array:
    """A convolution (O, C, k, k) of (C, side, side) as a matrix; `blank` where it does not reach."""
    outputs, channels, k, _ = weight.shape
    count = (side + 2 * padding - k) // stride + 1
    matrix = np.full((outputs, count, count, channels, side, side), blank)
    for o in range(outputs):
        for y in range(count):
            for x in range(count):
                for c in range(channels):
                    for i in range(k):
                        for j in range(k):
                            row, column = y * stride - padding + i, x * stride - padding + j
                            if 0 <= row < side and 0 <= column < side:
                                matrix[o, y, x, c, row, column] = weight[o, c, i, j]
    return matrix.reshape(outputs * count * count, channels * side * side)


def product(first: Array, second: Array, relevance: Array, epsilon: float = 0.0) -> tuple[Array, Array]:
    """Relevances of two matrices (N, K) and (K, M) from that of their product: half to each."""
    rows, inner = first.shape
    columns = second.shape[1]
    left, right = np.zeros_like(first), np.zeros_like(second)
    for n in range(rows):
        for m in range(columns):
            terms = [first[n, k] * second[k, m] for k in range(inner)]
            whole = sum(terms)
            whole += math.copysign(epsilon, whole)
            for k in range(inner):
                left[n, k] += 0.5 * terms[k] / whole * relevance[n, m]
                right[k, m] += 0.5 * terms[k] / whole * relevance[n, m]
    return left, right


def softmax_taylor(logits: Array, relevance: Array) -> Array:
    """Achtibat et al. 2024, proposition 3.1, for one row."""
    weights = np.exp(logits - logits.max())
    weights = weights / weights.sum()
    total = float(relevance.sum())
    return np.array([x * (r - s * total) for x, r, s in zip(logits, relevance, weights, strict=True)])


def summands(first: Array, second: Array, relevance: Array, rescale: bool) -> tuple[Array, Array]:
    """Relevances of two summands by share; rescaled as Chefer et al. 2021, sec. 3.2."""
    left = np.array(
        [a / (a + b) * r for a, b, r in zip(first.flat, second.flat, relevance.flat, strict=True)]
    )
    right = np.array(
        [b / (a + b) * r for a, b, r in zip(first.flat, second.flat, relevance.flat, strict=True)]
    )
    if rescale:
        whole = abs(left.sum()) + abs(right.sum())
        left, right = (
            left * (abs(left.sum()) / whole * relevance.sum() / left.sum()),
            right * (abs(right.sum()) / whole * relevance.sum() / right.sum()),
        )
    return left.reshape(first.shape), right.reshape(second.shape)


def norm_fixed(x: Array, weight: Array, bias: Array, eps: float, relevance: Array) -> Array:
    """Layer norm of one token whose deviation is a constant: y_j = sum_i M_ji x_i + bias_j."""
    n = len(x)
    deviation = math.sqrt(float(x.var()) + eps)
    matrix = np.array(
        [[weight[j] * ((1.0 if i == j else 0.0) - 1 / n) / deviation for i in range(n)] for j in range(n)]
    )
    return dense("epsilon", x, matrix, bias, relevance)


def _norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    return np.stack([(t - t.mean()) / math.sqrt(t.var() + eps) * weight + bias for t in x])


def _gelu(x: Array) -> Array:
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.flat]).reshape(x.shape)


def one_block(
    w: Mapping[str, Array],
    image: Array,
    target: int,
    heads: int,
    *,
    method: str,
    rescale: bool = False,
    seed: float = 1.0,
    low: float = -2.0,
    high: float = 2.0,
    linear_gamma: float = 0.05,
    conv_gamma: float = 0.25,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """A transformer of one block, forwards and then relevance backwards, by hand.

    Args:
        w: weights by the names of `OneBlock` in the tests.
        image: (3, side, side), normalised.
        target: explained class.
        heads: number of heads.
        method: "chefer" or "attnlrp".
        rescale: Chefer's normalisation of sums.
        seed: relevance of the logit.
        low, high: bounds of a normalised pixel.
        linear_gamma, conv_gamma: of "attnlrp".
        eps: of the norms.

    Returns:
        Relevance of the attention weights (heads, N, N) and of the image (3, side, side).
    """
    chefer = method == "chefer"
    patch = w["patch.weight"]
    side, stride = image.shape[1], patch.shape[2]
    matrix = unrolled(patch, side, stride, 0)
    count = (side // stride) ** 2
    dim = patch.shape[0]
    embedded = (matrix @ image.ravel()).reshape(dim, count).T + w["patch.bias"]
    tokens = np.concatenate([w["token"].reshape(1, dim), embedded])
    x0 = tokens + w["position"].reshape(count + 1, dim)
    n1 = _norm(x0, w["norm1.weight"], w["norm1.bias"], eps)
    qkv = n1 @ w["qkv.weight"].T + w["qkv.bias"]
    width = dim // heads
    q, k, v = (qkv[:, s * dim : (s + 1) * dim].reshape(-1, heads, width).swapaxes(0, 1) for s in range(3))
    q = q * width**-0.5
    dots = np.stack([q[h] @ k[h].T for h in range(heads)])
    weights = np.exp(dots) / np.exp(dots).sum(2, keepdims=True)
    mixed = np.concatenate([weights[h] @ v[h] for h in range(heads)], axis=1)
    a = mixed @ w["proj.weight"].T + w["proj.bias"]
    x1 = x0 + a
    n2 = _norm(x1, w["norm2.weight"], w["norm2.bias"], eps)
    hidden = n2 @ w["fc1.weight"].T + w["fc1.bias"]
    active = _gelu(hidden)
    m = active @ w["fc2.weight"].T + w["fc2.bias"]
    x2 = x1 + m
    n3 = _norm(x2, w["norm.weight"], w["norm.bias"], eps)

    def layer(name: str, inputs: Array, relevance: Array, inside: bool = False) -> Array:
        kind = "alpha-beta" if chefer else ("epsilon" if inside else "gamma")
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return np.stack(
            [
                dense(kind, t, weight, bias, r, gamma=linear_gamma)
                for t, r in zip(inputs, relevance, strict=True)
            ]
        )

    def norm(name: str, inputs: Array, relevance: Array) -> Array:
        if chefer:
            return relevance
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return np.stack([norm_fixed(t, weight, bias, eps, r) for t, r in zip(inputs, relevance, strict=True)])

    top = np.zeros(len(w["head.bias"]))
    top[target] = seed
    kind = "alpha-beta" if chefer else "gamma"
    r_n3 = np.zeros_like(n3)
    r_n3[0] = dense(kind, n3[0], w["head.weight"], w["head.bias"], top, gamma=linear_gamma)
    r_x2 = np.zeros_like(x2)
    r_x2[0] = norm("norm", x2[:1], r_n3[:1])[0]
    r_x1, r_m = summands(x1, m, r_x2, rescale)
    r_x1 = r_x1 + norm("norm2", x1, layer("fc1", n2, layer("fc2", active, r_m)))
    r_x0, r_a = summands(x0, a, r_x1, rescale)
    r_mixed = layer("proj", mixed, r_a, inside=True).reshape(-1, heads, width).swapaxes(0, 1)
    r_weights, r_dots = np.zeros_like(weights), np.zeros_like(dots)
    r_q, r_k, r_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for h in range(heads):
        r_weights[h], r_v[h] = product(weights[h], v[h], r_mixed[h])
        if chefer:
            r_dots[h] = r_weights[h]
        else:
            r_dots[h] = np.stack([softmax_taylor(x, r) for x, r in zip(dots[h], r_weights[h], strict=True)])
        r_q[h], transposed = product(q[h], k[h].T, r_dots[h])
        r_k[h] = transposed.T
    r_qkv = np.concatenate([part.swapaxes(0, 1).reshape(-1, dim) for part in (r_q, r_k, r_v)], axis=1)
    r_x0 = r_x0 + norm("norm1", x0, layer("qkv", n1, r_qkv, inside=True))
    r_embedded = (tokens / x0 * r_x0)[1:].T.ravel()
    biases = np.repeat(w["patch.bias"], count)
    flat = image.ravel()
    r_image = dense(
        "box" if chefer else "gamma", flat, matrix, biases, r_embedded, gamma=conv_gamma,
        low=np.full_like(flat, low), high=np.full_like(flat, high),
    )  # fmt: skip
    return r_weights, r_image.reshape(image.shape)
