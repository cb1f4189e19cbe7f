"""A bottleneck at one layer of a network: features give way to noise, and what still passes is measured.

Schulz et al. 2020, "Restricting the Flow: Information Bottlenecks for Attribution" (arXiv:2001.00396),
section 3: Z = lambda R + (1 - lambda) eps with eps ~ N(mu, sigma^2) for every feature R of a layer.
Here are its parts: the statistics mu and sigma, the gates lambda, the information in nats, and the
forward pass in which a layer's features are exchanged for others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from faithmap.context import Context
from faithmap.cuts import feature_places, find_layout
from faithmap.errors import RequestError, nearest
from faithmap.models import Model
from faithmap.records import canonical_json

if TYPE_CHECKING:
    from faithmap.training import Session, TrainingData

#: References that need no data: noise around zero with each channel's root mean square over the
#: image, or around each channel's mean over the image with its standard deviation.
OWN_STATISTICS = ("zero", "image")


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each feature of a layer over many images: what noise looks like."""

    #: (C, h, w) float32.
    mean: Tensor
    #: (C, h, w) float32, not negative.
    std: Tensor
    #: How many images they were taken from.
    count: int
    #: Dotted name of the layer.
    layer: str
    #: `Model.digest()` of the network: another network's features are not distributed like these.
    model: str
    #: (C,) share of images and cells at which a channel is not zero; None in files of older versions.
    active: Tensor | None = None
    #: (2, C, n) mean and standard deviation of a transformer's n prefix tokens, the class token among
    #: them; None where there are none.
    prefix: Tensor | None = None

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file that `load_statistics` reads; return its path."""
        from safetensors.torch import save_file

        # One entry: safetensors writes several in an order that differs from call to call.
        about = canonical_json({"layer": self.layer, "model": self.model, "count": self.count})
        held = {"mean": self.mean, "std": self.std, "active": self.active, "prefix": self.prefix}
        tensors = {name: value.contiguous() for name, value in held.items() if value is not None}
        save_file(tensors, path, metadata={"statistics": about})
        Path(path).chmod(0o644)  # safetensors leaves files that only their owner may read
        return Path(path)

    def tensors(self) -> dict[str, Tensor]:
        """What a fit keeps of them."""
        held = {"mean": self.mean, "std": self.std, "active": self.active, "prefix": self.prefix}
        tensors = {name: value.contiguous() for name, value in held.items() if value is not None}
        return {**tensors, "count": torch.tensor(float(self.count))}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], layer: str, model: str) -> Statistics:
        """The statistics of a layer that a fit has kept."""
        return cls(
            tensors["mean"], tensors["std"], int(tensors["count"]), layer, model,
            tensors.get("active"), tensors.get("prefix"),
        )  # fmt: skip


class Welford:
    """Running mean and variance of tensors, batch by batch, in float64.

    Batches are joined by the pairwise form of Welford's rule, so that nothing is lost where the mean
    is large beside the spread, in whatever portions the images come.
    """

    def __init__(self) -> None:
        """Start without any sample."""
        self.count = 0
        self._mean = torch.zeros(())
        self._squares = torch.zeros(())

    def state(self) -> dict[str, Any]:
        """All that was taken in, for a checkpoint."""
        return {"count": self.count, "mean": self._mean, "squares": self._squares}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.count, self._mean, self._squares = int(state["count"]), state["mean"], state["squares"]

    def update(self, samples: Tensor) -> None:
        """Take in samples (n, ...) of one shape."""
        samples = samples.detach().double().cpu()
        number, mean = len(samples), samples.mean(0)
        squares = (samples - mean).square().sum(0)
        if self.count and mean.shape != self._mean.shape:
            raise RequestError(
                f"features of shape {tuple(mean.shape)} came after features of shape "
                f"{tuple(self._mean.shape)}; give images of one size"
            )
        total = self.count + number
        step = mean - self._mean
        self._squares = self._squares + squares + step.square() * (self.count * number / total)
        self._mean = self._mean + step * (number / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """The mean of all samples, float64."""
        return self._mean

    @property
    def std(self) -> Tensor:
        """Their standard deviation, float64, with n - 1 in the denominator."""
        return (self._squares / max(1, self.count - 1)).sqrt()


def fit_statistics(model: Model, images: Iterable[Tensor], layer: str | None = None) -> Statistics:
    """Mean and standard deviation of every feature of a layer over a sample of images.

    The paper takes the whole training set, its authors' library 10,000 images.

    Args:
        model: the model.
        images: batches (B, 3, H, W) in [0, 1], at the model's input size; at least two images in all.
        layer: dotted name of the layer; the model's target layer by default.

    Raises:
        RequestError: there are fewer than two images, or their sizes differ.
    """
    gathering = _Gathering(model, layer)
    for batch in images:
        gathering.update(batch)
    return gathering.statistics()


def gather_statistics(
    model: Model, data: TrainingData, session: Session, layer: str | None = None, batch_size: int = 32
) -> Statistics:
    """The same in a session of `faithmap train`, which may be killed and go on.

    Args:
        model: the model.
        data: the images.
        session: what reports and keeps checkpoints.
        layer: dotted name of the layer; the model's target layer by default.
        batch_size: images in a pass.

    Raises:
        RequestError: there are fewer than two images, or batches of fewer than one.
    """
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}; expected 1 or more")
    gathering, done = _Gathering(model, layer), 0
    if (state := session.resume()) is not None:
        with session.restoring():
            gathering.restore(state)
            done = int(state["done"])
    steps = data.steps(batch_size)
    for images, _ in data.batches(batch_size, 0, shuffle=False, start=done):
        done += 1
        if not len(images):  # none of them could be read
            continue
        gathering.update(images)
        session.report(done, steps, {"images": gathering.count})
        kept = {**gathering.state(), "done": done}
        session.checkpoint(kept.copy)
    return gathering.statistics()


class _Gathering:
    """Running statistics of a layer: features, how often they are not zero, prefix tokens."""

    def __init__(self, model: Model, layer: str | None) -> None:
        self._model, self._layer = model, layer
        self._parts = {"features": Welford(), "prefix": Welford(), "active": Welford()}

    @property
    def count(self) -> int:
        """Images so far."""
        return self._parts["features"].count

    def update(self, images: Tensor) -> None:
        """Take in images (B, 3, H, W)."""
        context = Context(self._model, images.to(self._model.device))
        features, output = context.activations(self._layer), context.outputs(self._layer)
        self._parts["features"].update(features)
        self._parts["active"].update((features != 0).double().mean((2, 3)))
        if output.ndim == 3 and output[0].numel() > features[0].numel():
            size = (int(images.shape[2]), int(images.shape[3]))
            layout = find_layout(self._model, output, self._layer or self._model.target_layer, size)
            self._parts["prefix"].update(layout.units(output)[:, :, list(layout.prefix)])
        context.release()

    def state(self) -> dict[str, Any]:
        """All that was taken in."""
        return {name: part.state() for name, part in self._parts.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, part in self._parts.items():
            part.restore(state[name])

    def statistics(self) -> Statistics:
        """What they come to.

        Raises:
            RequestError: there were fewer than two images.
        """
        features, prefix = self._parts["features"], self._parts["prefix"]
        if features.count < 2:
            raise RequestError(
                f"statistics were asked for from {features.count} images; a spread takes two, "
                "and a useful one a thousand"
            )
        name = self._layer or self._model.target_layer
        tokens = torch.stack([prefix.mean, prefix.std]).float() if prefix.count else None
        return Statistics(
            features.mean.float(), features.std.float(), features.count, name, self._model.digest(),
            self._parts["active"].mean.float(), tokens,
        )  # fmt: skip


def load_statistics(
    path: str | Path, model: Model, layer: str | None = None, *, words: Iterable[str] = OWN_STATISTICS
) -> Statistics:
    """Read what `Statistics.save` wrote, for the model and layer that it was taken from.

    Args:
        path: the file.
        model: the model.
        layer: dotted name of the layer; the model's target layer by default.
        words: what might have been meant where there is no such file.

    Raises:
        RequestError: there is no such file, it holds something else, or it was made for another
            model or layer.
    """
    from safetensors import SafetensorError, safe_open

    file, name = Path(path).expanduser(), layer or model.target_layer
    if not file.is_file():
        raise RequestError(
            f"statistics '{path}': no such word ({nearest(str(path), words)}) and no such file; "
            "faithmap.bottleneck.fit_statistics makes what such a file holds"
        )
    try:
        with safe_open(file, framework="pt") as held:
            about = json.loads((held.metadata() or {})["statistics"])
            mean, std = held.get_tensor("mean").float(), held.get_tensor("std").float()
            extra = {key: held.get_tensor(key).float() for key in {"active", "prefix"} & set(held.keys())}
            found = Statistics(mean, std, int(about["count"]), about["layer"], about["model"], **extra)
    except (SafetensorError, KeyError, ValueError) as error:
        raise RequestError(
            f"{path} holds no statistics ({error}); write it with faithmap.bottleneck.fit_statistics"
        ) from error
    if found.layer != name:
        raise RequestError(f"{path} holds statistics of layer '{found.layer}', asked for '{name}'")
    if found.model != model.digest():
        raise RequestError(
            f"{path} was made for weights {found.model}, the model '{model.name}' has {model.digest()}; "
            "make statistics for this model"
        )
    return found


def reference(
    statistics: str | Path, features: Tensor, model: Model, layer: str | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the noise, of a shape that broadcasts to the features.

    Args:
        statistics: one of `OWN_STATISTICS`, or the path of a file of `Statistics`.
        features: (B, C, h, w), the features that give way to the noise.
        model: the model.
        layer: dotted name of the layer; the model's target layer by default.

    Raises:
        RequestError: the word is unknown, or the file does not fit the model, the layer or the
            features.
    """
    if str(statistics) == "zero":
        spread = features.square().mean((2, 3), keepdim=True).sqrt()
        return torch.zeros_like(spread), spread
    if str(statistics) == "image":
        # One cell has no spread; dividing by n rather than n - 1 gives it zero instead of NaN.
        return features.mean((2, 3), keepdim=True), features.std((2, 3), correction=0, keepdim=True)
    found = load_statistics(statistics, model, layer)
    if found.mean.shape != features.shape[1:]:
        raise RequestError(
            f"{statistics} holds statistics of features {tuple(found.mean.shape)}, the images have "
            f"{tuple(features.shape[1:])}; use images of the size that they were taken from"
        )
    return found.mean.to(features.device)[None], found.std.to(features.device)[None]


def smoothing_matrix(length: int, sigma: float) -> Tensor:
    """(length, length): a Gaussian filter along one axis, cut off at two sigma, borders mirrored.

    The published kernel is the outer product of two of these: 5 x 5 for a sigma of 1. On an axis
    that is shorter than half the kernel it is cut off at what can be mirrored. Rows add up to one.
    """
    radius = min(round(2 * sigma), length - 1)
    matrix = torch.zeros(length, length)
    for offset in range(-radius, radius + 1):
        weight = torch.exp(torch.tensor(-0.5 * (offset / sigma) ** 2))
        for row in range(length):
            column = abs(row + offset)
            matrix[row, column if column < length else 2 * (length - 1) - column] += weight
    return matrix / matrix.sum(1, keepdim=True)


def gates(alpha: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The share lambda of each feature that passes, and 1 - lambda, from the parameters (..., h, w).

    lambda is the sigmoid of alpha, smoothed in space. 1 - lambda is computed as such: near one, a
    difference would leave few digits for its logarithm.

    Args:
        alpha: any real numbers.
        sigma: standard deviation of the smoothing in cells; 0 for none.
    """
    passed, damped = alpha.sigmoid(), (-alpha).sigmoid()
    if sigma == 0:
        return passed, damped
    rows = smoothing_matrix(alpha.shape[-2], sigma).to(alpha)
    columns = smoothing_matrix(alpha.shape[-1], sigma).to(alpha).T
    return rows @ passed @ columns, rows @ damped @ columns


def information(normed: Tensor, passed: Tensor, damped: Tensor) -> Tensor:
    """Nats that pass each feature: KL( N(lambda r, (1 - lambda)^2) || N(0, 1) ), the paper's eq. 5.

    Args:
        normed: r, the features less the noise's mean, divided by its standard deviation.
        passed: lambda in (0, 1).
        damped: 1 - lambda.
    """
    return 0.5 * ((passed * normed).square() + damped.square() - 1) - damped.log()


def logits_with(model: Model, images: Tensor, features: Tensor, layer: str | None = None) -> Tensor:
    """Logits of images (B, 3, H, W) on whose way a layer's features (B, C, h, w) are exchanged.

    What the layer returns beside them (a transformer's class token) passes as it is. The graph
    reaches from the features to the logits; what lies before the layer runs without one.

    Raises:
        RequestError: the layer runs more than once in a pass or not at all, or the model's `reshape`
            does more than to pick and move values, so that features cannot be put back.
    """
    name, size = layer or model.target_layer, (int(images.shape[2]), int(images.shape[3]))
    calls = 0

    def exchange(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RequestError(f"layer '{name}' runs more than once in a pass; name one that runs once")
        first = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(first, Tensor):
            raise RequestError(
                f"layer '{name}' returns a {type(output).__name__}; name one that returns a tensor"
            )
        torch.set_grad_enabled(True)
        onward = _put_back(model, first, features.to(first.dtype), name, size)
        return onward if first is output else type(output)((onward, *output[1:]))

    handle = model.layer(name).register_forward_hook(exchange)
    grad_before = torch.is_grad_enabled()
    try:
        torch.set_grad_enabled(False)
        logits: Tensor = model(images)
    finally:
        torch.set_grad_enabled(grad_before)
        handle.remove()
    if not calls:
        raise RequestError(f"layer '{name}' takes no part in the forward pass of model '{model.name}'")
    return logits


def _put_back(model: Model, output: Tensor, features: Tensor, name: str, size: tuple[int, int]) -> Tensor:
    """A layer's output with the values that `Model.features` reads from it replaced."""
    index = feature_places(model, output, name, size).flatten()
    flat = output.flatten(1)
    onward: Tensor = flat.scatter(1, index.expand(len(output), -1), features.flatten(1)).view(output.shape)
    return onward
