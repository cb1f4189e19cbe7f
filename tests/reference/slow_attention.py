"""A plain vision transformer written out, and the explainers of attention from their papers, in float64.

The transformer exists to check what hooks read from timm's: it shares nothing with it but the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """What a transformer computes of one image; of each block (heads, N, N)."""

    logits: Tensor
    maps: list[Tensor]
    scores: list[Tensor]

    def gradients(self, target: int) -> list[Array]:
        """Gradients of the target's logit with respect to every map."""
        found = torch.autograd.grad(self.logits[target], self.maps, retain_graph=True)
        return [gradient.numpy() for gradient in found]


def transformer(
    weights: Mapping[str, Tensor], image: Tensor, *, heads: int, hold: bool = False, eps: float = 1e-6
) -> Reading:
    """Logits, attention maps and scores of a normalised image (3, H, W), by a pre-norm ViT with class token.

    Args:
        weights: float64, under timm's names.
        image: float64.
        heads: attention heads of a block.
        hold: what attention takes in is a constant to derivatives.
        eps: of the norms.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        spread = (centred.square().mean(1, keepdim=True) + eps).sqrt()
        return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    kernel = weights["patch_embed.proj.weight"]
    side = kernel.shape[2]
    tokens = [weights["cls_token"][0, 0]]
    for top in range(0, image.shape[1], side):
        for left in range(0, image.shape[2], side):
            patch = image[:, top : top + side, left : left + side]
            tokens.append((kernel * patch).sum((1, 2, 3)) + weights["patch_embed.proj.bias"])
    x = torch.stack(tokens) + weights["pos_embed"][0]

    maps, scores = [], []
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for block in range(depth):
        inner = norm(x, f"blocks.{block}.norm1")
        joint = linear(inner.detach() if hold else inner, f"blocks.{block}.attn.qkv")
        q, k, v = joint.chunk(3, 1)
        size = q.shape[1] // heads
        parts = [slice(h * size, (h + 1) * size) for h in range(heads)]
        score = torch.stack([q[:, part] @ k[:, part].T / math.sqrt(size) for part in parts])
        exponentials = score.exp()
        attention = exponentials / exponentials.sum(2, keepdim=True)
        scores.append(score)
        maps.append(attention)
        gathered = torch.cat([attention[h] @ v[:, part] for h, part in enumerate(parts)], 1)
        x = x + linear(gathered, f"blocks.{block}.attn.proj")
        hidden = linear(norm(x, f"blocks.{block}.norm2"), f"blocks.{block}.mlp.fc1")
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"blocks.{block}.mlp.fc2")
    return Reading(linear(norm(x, "norm"), "head")[0], maps, scores)


def _head_mean(maps: Array) -> Array:
    heads, count, _ = maps.shape
    total = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            total[i, j] = sum(maps[h, i, j] for h in range(heads)) / heads
    return total


def raw_attention(maps: Sequence[Array], read: Array, prefix: int) -> Array:
    """Chefer et al. 2021, the baseline: the last block, mean over heads; the rows that the head reads."""
    return np.asarray((read @ _head_mean(maps[-1]))[prefix:])


def rollout(maps: Sequence[Array], read: Array, prefix: int, start: int = 0) -> Array:
    """Abnar and Zuidema 2020, eq. 1: whole matrices, the identity added and the rows normalised."""
    product = np.eye(maps[0].shape[1])
    for heads in maps[start:]:
        mixed = 0.5 * _head_mean(heads) + 0.5 * np.eye(heads.shape[1])
        mixed = mixed / mixed.sum(1, keepdims=True)
        product = mixed @ product
    return np.asarray((read @ product)[prefix:])


def generic_attention(maps: Sequence[Array], gradients: Sequence[Array], read: Array, prefix: int) -> Array:
    """Chefer et al. 2021b, eq. 5 and 6, cell by cell; less the identity that it begins with."""
    count = maps[0].shape[1]
    relevance = np.eye(count)
    for heads, slopes in zip(maps, gradients, strict=True):
        weighted = np.zeros((count, count))
        for i in range(count):
            for j in range(count):
                weighted[i, j] = np.mean(
                    [max(g * a, 0.0) for g, a in zip(slopes[:, i, j], heads[:, i, j], strict=True)]
                )
        relevance = relevance + weighted @ relevance
    return np.asarray((read @ (relevance - np.eye(count)))[prefix:])


def attention_guided_cam(
    scores: Sequence[Array], gradients: Sequence[Array], read: Array, prefix: int
) -> Array:
    """Leem and Seo 2024: sigmoid of the scores times positive gradients, summed over blocks and heads."""
    total = np.zeros(scores[0].shape[2])
    for score, slopes in zip(scores, gradients, strict=True):
        for h in range(len(score)):
            for i in np.flatnonzero(read):
                for j in range(len(total)):
                    total[j] += 1 / (1 + math.exp(-score[h, i, j])) * max(slopes[h, i, j], 0.0)
    return total[prefix:]
