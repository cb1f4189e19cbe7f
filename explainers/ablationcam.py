"""Ablation-CAM (Desai and Ramaswamy 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.models import Model

DENOMINATORS = ("score", "magnitude")


def _forwards(model: Model, params: Mapping[str, Any]) -> float:
    """At most: the features, one image a channel, and two of two to see whether channels share a pass."""
    from faithmap.cam import channel_count

    return 5.0 + channel_count(model, params.get("layer"))


@explainer(
    version=1, source="Desai and Ramaswamy 2020 (doi:10.1109/WACV45572.2020.9093360)",
    forwards=_forwards, backwards=0, exact_cost=False,
)  # fmt: skip
def ablationcam(model: Model, batch: Batch, *, layer: str | None = None, denominator: str = "score") -> Maps:
    """Channels weighted by the share of the score that is lost without them.

    w_k = (S - S_k) / S and L = ReLU(sum_k w_k A^k), with S the target's logit and S_k that logit when
    channel k of the layer's output is set to zero everywhere. Shape (B, h, w) of the features' grid;
    not negative; unit: that of the features. No gradient is taken.

    In a transformer a channel is one of the token's entries, set to zero in the patch tokens, which
    the features are made of; class and distillation tokens keep it. (pytorch-grad-cam takes it from
    those as well.) A channel that is zero everywhere changes nothing, has no weight and costs nothing.

    The paper divides by S as it stands. A negative logit therefore turns the sign of every weight
    round, and the map shows what speaks against the class. `denominator="magnitude"` divides by |S|,
    which is the same for positive logits and keeps the sense for negative ones. A logit near zero only
    scales the map; one below 1e-7 in size is taken as 1e-7.

    Args:
        model: the model.
        batch: images with targets.
        layer: dotted name of the layer; the model's target layer by default.
        denominator: "score" as published, or "magnitude".

    Raises:
        RequestError: the denominator is unknown, or the model's `reshape` does more than rearrange
            the layer's output, so that a channel cannot be found in it.
    """
    import torch

    from faithmap.errors import RequestError, nearest

    if denominator not in DENOMINATORS:
        raise RequestError(f"unknown denominator '{denominator}'; {nearest(denominator, DENOMINATORS)}")
    activations = batch.activations(layer).float()
    scores = batch.logits.float().gather(1, batch.targets.view(-1, 1))
    ablated = _ablated_scores(model, batch, scores, activations, layer)
    size = scores.abs().clamp_min(1e-7)
    divisor = torch.where(scores < 0, -size, size) if denominator == "score" else size
    weights = (scores - ablated) / divisor
    return (weights[:, :, None, None] * activations).sum(1).clamp_min(0)


def _ablated_scores(
    model: Model, batch: Batch, scores: Tensor, activations: Tensor, layer: str | None
) -> Tensor:
    """The targets' logits (B, C) without each channel; the clean ones for channels of zeros."""
    import torch

    from faithmap.perturb import chunk_size

    result = scores.expand(activations.shape[:2]).clone()
    alive = (activations != 0).flatten(2).any(2)
    chunk = chunk_size(model)
    # Behind the layer a row holds features in the place of an image.
    many = max(chunk, chunk * batch.images[0].numel() // activations[0].numel())
    ablation = _Ablation(model, layer, batch.size)
    shared = None
    for b in range(len(batch)):
        image, target = batch.images[b : b + 1], batch.targets[b]
        channels = alive[b].nonzero().squeeze(1)
        if shared is None and len(channels) > 1:
            shared = _shares_its_trunk(model, image, ablation, channels[[0, -1]])
        for part in channels.split(many if shared else chunk):
            rows = 1 if shared else len(part)
            with torch.no_grad(), ablation.of(part):
                logits = model(image.expand(rows, -1, -1, -1))
            result[b, part] = logits[:, target]
    return result


def _shares_its_trunk(model: Model, image: Tensor, ablation: _Ablation, channels: Tensor) -> bool:
    """Whether one pass up to the layer may serve many channels, by two passes of two channels.

    The rows then part ways behind the layer alone. That is right wherever later layers meet earlier
    ones by broadcasting sums at most, and is tried against whole passes rather than guessed.
    """
    import torch

    def logits(rows: int) -> Tensor:
        with torch.no_grad(), ablation.of(channels):
            output: Tensor = model(image.expand(rows, -1, -1, -1))
        return output

    whole = logits(len(channels))
    try:
        split = logits(1)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a concatenation, an addition in place: shapes do not agree
        return False
    return split.shape == whole.shape and torch.allclose(split, whole, rtol=1e-3, atol=1e-4)


class _Ablation:
    """Sets channels of a layer's output to zero, by a hook that stays for a block.

    Args:
        model: the model.
        layer: dotted name of the layer; the model's target layer where None.
        size: (H, W) of the images.
    """

    def __init__(self, model: Model, layer: str | None, size: tuple[int, int]) -> None:
        self.model, self.layer, self.size = model, layer, size
        self.places: Tensor | None = None

    @contextmanager
    def of(self, channels: Tensor) -> Iterator[None]:
        """A block in which the layer's output has a row for each of the channels, without that channel."""
        handle = self.model.layer(self.layer).register_forward_hook(partial(self._hook, channels))
        try:
            yield
        finally:
            handle.remove()

    def _hook(self, channels: Tensor, _module: Any, _inputs: Any, output: Any) -> Any:
        import torch

        first = output[0] if isinstance(output, tuple | list) else output
        if self.places is None:
            self.places = self._find(tuple(first.shape[1:])).to(first.device)
        rows = first.expand(len(channels), *first.shape[1:]).clone(memory_format=torch.contiguous_format)
        rows.view(len(rows), -1).scatter_(1, self.places[channels], 0.0)
        return rows if first is output else type(output)((rows, *output[1:]))

    def _find(self, shape: tuple[int, ...]) -> Tensor:
        """(C, cells): where in one row of the output, laid out flat, the features of a channel stand."""
        import torch

        from faithmap.errors import RequestError

        numbers = torch.arange(math.prod(shape)).view(1, *shape)
        # What rearranges the output rearranges its places: so is learned which belong to a channel.
        places = self.model.features(numbers, self.layer, self.size)[0].flatten(1)
        if places.is_floating_point() or len(places.unique()) < places.numel():
            raise RequestError(
                f"ablationcam: the reshape of model '{self.model.name}' does more than rearrange the "
                "layer's output, so that no channel can be taken out of it; give one that only picks and "
                "orders tokens"
            )
        return places
