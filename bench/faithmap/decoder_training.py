"""How SCAN's decoder learns: a step on images masked at random percentiles, and how to resume."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from faithmap.batch import seed_of
from faithmap.context import Context
from faithmap.decoders import decode, seeded_decoder
from faithmap.errors import FaithmapError, RequestError
from faithmap.gradient_masks import Layout, Masked, apply_mask, layout_of, unmasked_features
from faithmap.reconstruction import blurred_target, losses, target_area, told_apart
from faithmap.seen_features import SeenFeatures

if TYPE_CHECKING:
    from faithmap.models import Model

#: Where the learning rate ends by the cosine.
LAST_RATE = 1e-6
#: So many labelled images are compared with the predictions, of which this share must be right at least.
JUDGED, LEAST_AGREEING = 64, 0.05


class Recipe(Protocol):
    """What a decoder is trained for: SCAN's parameters, as the explainer names them."""

    layer: str | None
    width: float | None
    skips: bool
    mask: str
    scalar: str
    training_class: str
    lowest_percentile: float
    alpha: float
    flexibility: float
    weighting: str
    blur: float

    def confidence(self, decoded: Tensor) -> Tensor:
        """The confidence map (B, H, W) in [0, 1] of what the decoder gave, (B, 4, H, W)."""
        ...


class DecoderTraining:
    """A decoder on its way: its optimiser, its step, and how to go on from a checkpoint.

    All that is random in a step is drawn from a generator seeded by the run, the epoch and the step, so that
    nothing but the weights, the optimiser and the step has to be kept.
    """

    def __init__(self, method: Recipe, model: Model, seed: int, precision: str) -> None:
        self.method, self.model, self.seed, self.precision = method, model, seed, precision
        self.layout: Layout = layout_of(model, method.layer)
        first = seed_of(seed, "scan", "weights")
        self.decoder = seeded_decoder(
            self.layout, method.width, first, model.device, skips=method.skips
        ).train()
        self.adam = torch.optim.Adam(self.decoder.parameters())
        self.step = 0
        self.seen: SeenFeatures | None = None
        #: Labelled images of the first steps, and of how many the label is what the model predicts.
        self.labelled = self.agreeing = 0

    def keep_features(self, images: int, epochs: int) -> None:
        """Keep features and gradients from the first epoch on where that saves time."""
        if SeenFeatures.pays(self.model, self.layout, images, epochs):
            method = self.method
            self.seen = SeenFeatures(
                self.model, self.layout, method.scalar, self._classes, gradients=method.mask != "none"
            )

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, in copies that training does not go on to change."""
        weights = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in self.decoder.state_dict().items()
        }
        return {"step": self.step, "decoder": weights, "adam": copy.deepcopy(self.adam.state_dict())}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a state; from the beginning where there is none."""
        if state is not None:
            self.step = int(state["step"])
            self.decoder.load_state_dict(state["decoder"])
            self.adam.load_state_dict(state["adam"])

    def advance(self, images: Tensor, labels: Tensor, epoch: int, rate: float) -> dict[str, float]:
        """One step of Adam.

        Returns the losses, the mean confidence and its target, how many images fell back, and whether the
        confidence tells cells apart by their error.
        """
        method = self.method
        generator = torch.Generator().manual_seed(seed_of(self.seed, "scan", str(epoch), str(self.step)))
        masked = self._masked(images, labels, generator)
        decoded = decode(self.decoder, masked.values, masked.layout.grid, self.precision)
        confidence, target = (
            method.confidence(decoded), blurred_target(images, masked.layout.grid, method.blur)
        )  # fmt: skip
        found = losses(
            confidence, decoded[:, 1:], target,
            alpha=method.alpha, flexibility=method.flexibility, weighting=method.weighting,
        )  # fmt: skip
        loss = found.total.mean()
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.step += 1
        parts = [found.total, found.confidence, found.reconstruction, found.error, found.area]
        # One wait for the device.
        means = torch.stack(
            [
                *(part.detach().mean() for part in parts),
                masked.unmasked.float().sum(),
                told_apart(confidence.detach(), decoded[:, 1:].detach(), target, masked.layout.grid),
            ]
        ).tolist()
        if not math.isfinite(means[0]):
            raise FaithmapError(f"scan: the loss is {means[0]} at step {self.step}; try a lower rate")
        names = (
            "loss", "confidence_loss", "reconstruction_loss", "error", "confidence", "unmasked", "told_apart",
        )  # fmt: skip
        return {**dict(zip(names, means, strict=True)), "area": target_area(method.alpha), "rate": rate}

    def _masked(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Masked:
        """Features of training images, masked at random percentiles."""
        method = self.method
        values, gradients = self.seen.get(images, labels) if self.seen else self._features(images, labels)
        lowest = method.lowest_percentile
        drawn = torch.rand(len(images), generator=generator, dtype=torch.float64)
        noise = torch.rand(values.shape, generator=generator) if method.mask == "random" else None
        return apply_mask(
            values, gradients, self.layout, mask=method.mask,
            percentiles=lowest + (100 - lowest) * drawn, noise=noise,
        )  # fmt: skip

    def _features(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and gradients of images that are not kept."""
        context = Context(self.model, images)
        context.outputs(self.layout.layer)  # before the logits, so that one pass gives both
        classes = self._classes(context.logits, labels)
        values, gradients, _ = unmasked_features(
            context, classes, self.layout.layer, self.method.scalar, gradients=self.method.mask != "none"
        )
        context.release()
        return values, gradients

    def _classes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The classes (B,) whose gradients mask."""
        predicted = logits.argmax(1)
        if self.method.training_class == "predicted" or self.method.mask == "none":
            return predicted
        highest = int(labels.max())
        if highest >= logits.shape[1]:
            raise RequestError(
                f"scan: an image has label {highest}, and model '{self.model.name}' knows {logits.shape[1]} "
                'classes; give images with its labels, or training_class="predicted"'
            )
        self._compare(predicted, labels)
        return torch.where(labels < 0, predicted, labels)

    def _compare(self, predicted: Tensor, labels: Tensor) -> None:
        """Refuse labels of other classes than the model's, which would choose the masks unseen."""
        if self.labelled >= JUDGED:
            return
        self.labelled += int((labels >= 0).sum())
        self.agreeing += int((labels == predicted).sum())
        if self.labelled >= JUDGED and self.agreeing < LEAST_AGREEING * self.labelled:
            raise RequestError(
                f"scan: of the first {self.labelled} labelled images the model predicts the label of "
                f"{self.agreeing}; are these labels classes of '{self.model.name}'? Map them to its "
                'classes, or fit with training_class="predicted"'
            )


def learning_rate(rate: float, share: float) -> float:
    """The learning rate when a share of the steps is done: half a cosine down to `LAST_RATE`."""
    last = min(rate, LAST_RATE)
    return last + (rate - last) * (1 + math.cos(math.pi * share)) / 2
