"""What several explainers need of one batch, computed once: logits, activations, gradients.

The forward pass runs without a graph up to the layer asked for and records one from there on, so
that a CAM costs one forward and the backward of the layers behind its own. All gradient CAMs of a
batch share these two passes. Attention maps are read in a pass of their own, which all explainers of
attention share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from faithmap.attention import Attention
from faithmap.cam import READINGS, read_scores
from faithmap.errors import RequestError, nearest
from faithmap.models import Model


class Context:
    """Lazy passes over one batch of images of one model.

    Args:
        model: the model.
        images: (B, 3, H, W) in [0, 1], on the model's device.
    """

    def __init__(self, model: Model, images: Tensor) -> None:
        self.model = model
        self.images = images
        self._size = (int(images.shape[2]), int(images.shape[3]))
        self._logits: Tensor | None = None
        self._activations: dict[str, Tensor] = {}
        self._graphs: dict[str, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[tuple[str, str, str], Tensor] = {}
        self._attention: Attention | None = None

    @property
    def logits(self) -> Tensor:
        """Logits (B, classes) of the clean images, without a graph."""
        if self._logits is None:
            try:
                layer = self.model.target_layer
            except RequestError:  # no spatial features: nothing to share but the logits
                with torch.no_grad():
                    self._logits = self.model(self.images)
                return self._logits
            self._capture(layer)
        assert self._logits is not None
        return self._logits

    def activations(self, layer: str | None = None) -> Tensor:
        """Features (B, C, h, w) of a layer, the target layer by default, without a graph."""
        return self.model.features(self.outputs(layer), layer, self._size)

    def gradients(self, targets: Tensor, layer: str | None = None, score: str = "logit") -> Tensor:
        """Gradients (B, C, h, w) of the targets' scores with respect to a layer's features.

        Args:
            targets: (B,) classes.
            layer: dotted name of the layer; the model's target layer by default.
            score: "logit", or "probability" (softmax over the classes).
        """
        return self.model.features(self.output_gradients(targets, layer, score), layer, self._size)

    def outputs(self, layer: str | None = None) -> Tensor:
        """What a layer returns, as it is: of a transformer tokens (B, N, D), those of its prefix too."""
        name = layer or self.model.target_layer
        if name not in self._activations:
            self._capture(name)
        return self._activations[name]

    def output_gradients(self, targets: Tensor, layer: str | None = None, score: str = "logit") -> Tensor:
        """Gradients of the targets' scores with respect to `outputs`; arguments as for `gradients`."""
        if score not in READINGS:
            raise RequestError(f"unknown score '{score}'; {nearest(score, READINGS)}")
        name = layer or self.model.target_layer
        key = (name, score, ",".join(str(int(target)) for target in targets))
        if key not in self._gradients:
            if name not in self._graphs:
                self._capture(name)
            leaf, logits = self._graphs.pop(name)
            with torch.enable_grad():  # whoever asks may have switched gradients off
                chosen = read_scores(logits, targets, score).sum()
            (gradient,) = torch.autograd.grad(chosen, leaf, allow_unused=True)
            self._gradients[key] = torch.zeros_like(leaf) if gradient is None else gradient
        return self._gradients[key]

    @property
    def attention(self) -> Attention:
        """Attention maps of every block, and their gradients on demand; vision transformers of timm only."""
        # Its logits are not kept: unfused, they differ from those of the other passes by a rounding.
        if self._attention is None:
            self._attention = Attention(self.model, self.images)
        return self._attention

    def release(self) -> None:
        """Drop every tensor and graph that is held."""
        self._logits = None
        self._attention = None
        self._activations.clear()
        self._graphs.clear()
        self._gradients.clear()

    def _capture(self, name: str) -> None:
        """One forward pass that keeps the output of a layer, and the graph from there to the logits."""
        held: list[Tensor] = []
        handle = self.model.layer(name).register_forward_hook(_cut(held, name))
        grad_before = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(False)
            logits = self.model(self.images)
        finally:
            torch.set_grad_enabled(grad_before)
            handle.remove()
        if not held:
            raise RequestError(
                f"layer '{name}' takes no part in the forward pass of model '{self.model.name}'"
            )
        if self._logits is None:
            self._logits = logits.detach()
        self._activations[name] = held[-1].detach()
        self._graphs[name] = (held[-1], logits)


def _cut(held: list[Tensor], name: str) -> Callable[..., Any]:
    """A forward hook that starts the graph at a layer's output."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(first, Tensor):
            raise RequestError(
                f"layer '{name}' returns a {type(output).__name__}; name one that returns a tensor"
            )
        torch.set_grad_enabled(True)
        leaf = first.detach().requires_grad_()
        held.append(leaf)
        # A copy goes on: the next module may work in place, which a leaf does not allow.
        onward = leaf.clone()
        return onward if first is output else type(output)((onward, *output[1:]))

    return hook
