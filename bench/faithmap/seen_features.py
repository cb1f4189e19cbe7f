"""Features and gradients of training images, taken once and kept while a decoder learns.

The network is frozen, so they are the same in every epoch, and on a CPU the network takes as long as the
decoder. Each image passes by itself: what is kept does not depend on the batch that it first came in, and a
fit that goes on after a kill sees the very same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from faithmap.context import Context
from faithmap.gradient_masks import Layout, unmasked_features
from faithmap.models import Model

#: Bytes that may be kept.
MOST = 2 * 2**30
Pair = tuple[Tensor, Tensor | None]


class SeenFeatures:
    """Features F and gradients G of a layer, by the pixels of an image and its label.

    Args:
        model: the model, whose weights stay as they are.
        layout: of the layer.
        score: what the gradient is of, "logit" or "probability".
        classes: the classes explained (B,), from logits and labels.
        gradients: whether G is wanted.
    """

    def __init__(
        self,
        model: Model,
        layout: Layout,
        score: str,
        classes: Callable[[Tensor, Tensor], Tensor],
        gradients: bool,
    ) -> None:
        self._model, self._layout, self._score = model, layout, score
        self._classes, self._gradients = classes, gradients
        self._kept: dict[bytes, Pair] = {}

    @staticmethod
    def pays(model: Model, layout: Layout, images: int, epochs: int) -> bool:
        """Whether keeping them saves time: on a CPU, over several epochs, where they fit."""
        entries = layout.channels * layout.grid[0] * layout.grid[1] * (1.1 if layout.tokens else 1.0)
        return model.device.type == "cpu" and epochs > 1 and 2 * 4 * entries * images <= MOST

    def get(self, images: Tensor, labels: Tensor) -> Pair:
        """F and G of images (B, 3, H, W) with labels (B,)."""
        pairs = [self._one(images[i : i + 1], labels[i : i + 1]) for i in range(len(images))]
        gradients = [gradient for _, gradient in pairs if gradient is not None]
        return torch.cat([value for value, _ in pairs]), torch.cat(gradients) if gradients else None

    def _one(self, image: Tensor, label: Tensor) -> Pair:
        key = hashlib.blake2b(image.contiguous().numpy().tobytes() + label.numpy().tobytes()).digest()
        if key not in self._kept:
            context = Context(self._model, image)
            context.outputs(self._layout.layer)  # before the logits, so that one pass gives both
            values, gradients, _ = unmasked_features(
                context, self._classes(context.logits, label), self._layout.layer, self._score,
                gradients=self._gradients,
            )  # fmt: skip
            self._kept[key] = (values.clone(), None if gradients is None else gradients.clone())
            context.release()
        return self._kept[key]
