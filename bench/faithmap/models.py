"""`Model`: any image classifier behind one face, and `load_model`: from a name to a `Model`.

A `Model` takes RGB images in [0, 1] and gives logits; normalisation lives inside it, so that
explainers and perturbations work in pixel space. It knows the family of the network, its target
layer, its feature grid and how its evaluation transform crops an image.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faithmap.errors import RequestError, nearest
from faithmap.layers import Anatomy, Reshape, as_features, find_anatomy, layer_at

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Passing(threading.local):
    """How deep the network is in passes that are accounted for."""

    depth = 0


PASSING = _Passing()


@contextmanager
def accounted_for() -> Iterator[None]:
    """Passes of the network within this block are counted, or no method's cost: they tell how it is made."""
    PASSING.depth += 1
    try:
        yield
    finally:
        PASSING.depth -= 1


class Meter:
    """Counts the images that pass through a model, forwards and backwards."""

    def __init__(self) -> None:
        self.forwards = 0
        self._backwards: int | Tensor = 0

    @property
    def backwards(self) -> int:
        """Images whose logits got a gradient."""
        return int(self._backwards)

    def count_backward(self, gradient: Tensor) -> None:
        """Count a gradient of logits (B, classes); an image without any takes no part.

        The count stays on the device until it is asked for: reading it here would make the device
        wait within what is being timed.
        """
        self._backwards = self._backwards + (gradient.detach().flatten(1) != 0).any(1).sum()

    def add(self, other: Meter) -> None:
        """Add what another meter has counted."""
        self.forwards += other.forwards
        self._backwards = self._backwards + other.backwards


#: How an image comes to a model's size.
CROP_MODES = ("center", "squash")


@dataclass(frozen=True)
class Transform:
    """A model's evaluation transform, as timm's: resize to `size / crop_pct`, then crop the centre."""

    size: tuple[int, int]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    #: "center": the shorter side is resized to that, in proportion; "squash": both sides are.
    mode: str = "center"


class Model(nn.Module):
    """An image classifier: float RGB images (B, 3, H, W) in [0, 1] to logits (B, classes).

    Args:
        module: the network; it takes normalised images and returns logits. It is used as it is:
            put into evaluation mode here, its weights are never changed.
        mean: per-channel mean that the network's normalisation subtracts.
        std: per-channel standard deviation that it divides by.
        input_size: side in pixels, or (height, width), of the images it was trained for.
        target_layer: dotted name of the layer that CAMs look at, its depth ("stage:-2"), or itself; found by
            itself for CNNs and the usual vision transformers.
        reshape: turns that layer's output into (B, C, h, w); found likewise.
        name: the name on boards.
        family: "cnn" or "vit", where the guess is wrong.
        crop_pct, interpolation, crop_mode: the evaluation transform, as timm names them.
        class_names: the classes in words, by index.

    Raises:
        RequestError: a size or a normalisation makes no sense, or (when first needed) no target
            layer can be found.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        input_size: int | Sequence[int],
        target_layer: str | nn.Module | None = None,
        reshape: Reshape | None = None,
        name: str = "",
        family: str | None = None,
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
        crop_mode: str = "center",
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.module = module.eval()
        self.name = name or type(module).__name__
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        if len(size) != 2 or min(size) < 1:
            raise RequestError(f"input_size is {input_size!r}; expected a side in pixels or (height, width)")
        if not 0 < crop_pct <= 1:
            raise RequestError(f"crop_pct is {crop_pct!r}; expected a share above 0, up to 1")
        if crop_mode not in CROP_MODES:
            raise RequestError(f"crop_mode is {crop_mode!r}; {nearest(str(crop_mode), CROP_MODES)}")
        self.transform = Transform((int(size[0]), int(size[1])), crop_pct, interpolation, crop_mode)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", _per_channel("mean", mean), persistent=False)
        self.register_buffer("std", _per_channel("std", std), persistent=False)
        if bool((self.std <= 0).any()):
            raise RequestError(f"std is {std!r}; expected positive numbers")
        self.class_names = list(class_names) if class_names is not None else None
        self.meter = Meter()
        self.precision = "fp32"
        self._layer = self._name_of(target_layer)
        self._reshape = reshape
        self._family = family
        self._anatomy: Anatomy | None = None
        self._places: dict[str, str] = {}
        self._digest = self._weights_digest = ""
        #: How it was fine-tuned, where faithmap did that.
        self.tuned: Mapping[str, Any] = {}
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes), float32, of images (B, 3, H, W) in [0, 1]."""
        normalised = self.normalise(images)
        with accounted_for():
            if self.precision == "fp32":
                logits = self.module(normalised)
            else:
                with torch.autocast(images.device.type, PRECISIONS[self.precision]):
                    logits = self.module(normalised)
        if not isinstance(logits, Tensor):
            raise RequestError(
                f"model '{self.name}' returns a {type(logits).__name__}; "
                "expected a tensor of logits (B, classes)"
            )
        # Where a hook makes several rows of an image, each has its own logits.
        self.meter.forwards += max(len(images), len(logits))
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits.float()

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] as the network takes them; the order in memory is kept."""
        # In place: on a CPU a second large tensor costs more than the division. One fused product and
        # sum would round differently at different places in memory.
        mean, std = (_like_rows(numbers, images) for numbers in (self.mean, self.std))
        return (images - mean).div_(std)

    def _count(self, gradient: Tensor) -> None:
        self.meter.count_backward(gradient)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.mean.device

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the images that the evaluation transform gives."""
        return self.transform.size

    @property
    def anatomy(self) -> Anatomy:
        """Family, target layer, feature grid and class count, found at the first call."""
        if self._anatomy is None:
            example = torch.zeros(1, 3, *self.input_size, device=self.device)
            try:
                with accounted_for():
                    self._anatomy = find_anatomy(
                        self.module, self.normalise(example), self._layer, self._reshape, self._family
                    )
            except RequestError as error:
                raise RequestError(f"model '{self.name}': {error}") from error
        return self._anatomy

    @property
    def family(self) -> str:
        """ "cnn" or "vit"."""
        return self._family or self.anatomy.family

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the target layer's features, or tokens, at the model's input size."""
        return self.anatomy.grid

    @property
    def num_classes(self) -> int:
        """The number of logits."""
        return self.anatomy.classes

    @property
    def target_layer(self) -> str:
        """Dotted name of the layer that CAMs look at."""
        return self.anatomy.layer

    def layer(self, name: str | None = None) -> nn.Module:
        """The module of that dotted name, or at that depth; the target layer by default.

        Args:
            name: a dotted name, or a place such as "stage:-2" or "block:9/12"; see
                `faithmap.layers.layer_at`.

        Raises:
            RequestError: there is no such layer; the nearest are suggested.
        """
        wanted = name or self.target_layer
        if ":" in wanted:
            wanted = self._layer_at(wanted)
        try:
            return self.module.get_submodule(wanted)
        except AttributeError:
            names = [known for known, _ in self.module.named_modules() if known]
            raise RequestError(
                f"model '{self.name}' has no layer '{wanted}'; {nearest(wanted, names)}"
            ) from None

    def _layer_at(self, place: str) -> str:
        """The dotted name of the layer at a depth, looked for once."""
        if place not in self._places:
            example = torch.zeros(1, 3, *self.input_size, device=self.device)
            try:
                with accounted_for():
                    self._places[place] = layer_at(self.module, self.normalise(example), place)
            except RequestError as error:
                raise RequestError(f"model '{self.name}': {error}") from error
        return self._places[place]

    def features(
        self, output: object, name: str | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Bring the output of a layer, for images of a size (H, W), to features (B, C, h, w)."""
        return as_features(output, self.anatomy.reshape, name or self.target_layer, size or self.input_size)

    @contextmanager
    def counting(self) -> Iterator[Meter]:
        """Count the images that pass through within the block, apart from all else."""
        outer, self.meter = self.meter, Meter()
        try:
            yield self.meter
        finally:
            outer.add(self.meter)
            self.meter = outer

    def forget_digests(self) -> None:
        """Take the digests anew when they are next asked for: weights have been changed."""
        self._digest = self._weights_digest = ""

    def around(self, module: nn.Module, class_names: Sequence[str] | None) -> Model:
        """The same normalisation, transform, layer and name around another network of the same insides."""
        other = Model(
            module, mean=self.mean.flatten().tolist(), std=self.std.flatten().tolist(),
            input_size=self.transform.size, target_layer=self._layer, reshape=self._reshape, name=self.name,
            family=self._family, crop_pct=self.transform.crop_pct,
            interpolation=self.transform.interpolation, crop_mode=self.transform.mode,
            class_names=class_names,
        )  # fmt: skip
        other.precision = self.precision
        return other.to(self.device)

    @property
    def asked(self) -> dict[str, str | None]:
        """The layer and the family that were asked for; None where they are found."""
        return {"layer": self._layer, "family": self._family}

    def digest(self) -> str:
        """SHA-256 over every weight and buffer, the normalisation and the transform, shortened."""
        if not self._digest:
            state = self._weights()
            # Weights alone do not tell two architectures apart (a padding, a stride).
            state.update(repr(self.module).encode())
            state.update(repr((self.mean.flatten().tolist(), self.std.flatten().tolist())).encode())
            state.update(repr((self.transform, self._layer)).encode())
            self._digest = str(state.hexdigest())[:16]
        return self._digest

    def weights_digest(self) -> str:
        """SHA-256 over every weight and buffer alone, shortened.

        Unlike `digest` it does not depend on how a library prints its modules, and so outlives
        that library's releases.
        """
        if not self._weights_digest:
            self._weights_digest = str(self._weights().hexdigest())[:16]
        return self._weights_digest

    def _weights(self) -> Any:
        state = hashlib.sha256()
        for key, value in sorted(self.module.state_dict().items()):
            state.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return state

    def _name_of(self, layer: str | nn.Module | None) -> str | None:
        if layer is None or isinstance(layer, str):
            return layer
        for name, module in self.module.named_modules():
            if module is layer:
                return str(name)
        raise RequestError(
            "target_layer is a module that does not belong to the model; name one of its own layers"
        )


def _like_rows(numbers: Tensor, images: Tensor) -> Tensor:
    """A number a channel (1, 3, 1, 1), for images (B, 3, H, W) that lie pixel by pixel repeated over a row.

    On a CPU three numbers at a time are broadcast four times as slowly as a whole row; the values are
    the same.
    """
    pixelwise = torch.channels_last
    if images.is_contiguous() or not images.is_contiguous(memory_format=pixelwise):
        return numbers
    return numbers.expand(1, 3, 1, images.shape[3]).contiguous(memory_format=pixelwise)


def _per_channel(what: str, values: float | Sequence[float]) -> Tensor:
    wrong = RequestError(f"{what} is {values!r}; expected one number or one for each of R, G, B")
    try:
        tensor = torch.as_tensor(values, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise wrong from error
    if tensor.numel() not in (1, 3) or not bool(torch.isfinite(tensor).all()):
        raise wrong
    return tensor.expand(3).clone().view(1, 3, 1, 1)


def load_model(name: str | Model | nn.Module, **params: Any) -> Model:
    """Make a `Model` from a name.

    Names are `timm/NAME`, `torchvision/NAME`, `hf/ID`, `dino/NAME`, `shapes/NAME` (embedded),
    `tuned/NAME` or the path of a file that `faithmap finetune` wrote, and `file.py:function`, where the
    function takes no arguments, or the keywords given here, and returns a `Model`. A `Model` is handed
    back as it is.

    Args:
        name: one of the above.
        **params: `weights` (a safetensors file or a state dict), `pretrained` (fetch the
            published weights; the default where no `weights` are given), `mean`, `std`, `input_size`,
            `crop_pct`, `interpolation`, `crop_mode`, `layer`, and `kwargs` for the architecture; for
            `dino/NAME` also `head`, the file of its linear classifier; for `timm/NAME` and `hf/ID` also
            `revision`, the commit of the hub whose weights are fetched.

    Raises:
        RequestError: the name, a key or a file is wrong, or weights do not fit.
    """
    if isinstance(name, Model):
        if params:
            raise RequestError("a Model takes no further parameters; give them when it is made")
        return name
    if isinstance(name, nn.Module):
        raise RequestError(
            "a bare torch module does not say how images are normalised; "
            "wrap it: faithmap.Model(module, mean=..., std=..., input_size=...)"
        )
    from faithmap.model_sources import build

    return build(name, params)
