"""SCAN: a decoder's confidence in reconstructing the image from gradient-masked features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.decoders import Decoder
    from faithmap.gradient_masks import Masked
    from faithmap.models import Model

#: Whose gradient masks the features in training.
TRAINING_CLASSES = ("label", "predicted")
#: What a map shows.
OUTPUTS = ("confidence", "error")
#: How the learning rate goes on.
SCHEDULES = ("cosine", "constant")
#: The parameters that a trained decoder depends on.
FIT_PARAMS = (
    "layer", "alpha", "flexibility", "lowest_percentile", "stretch", "squash", "blur", "weighting",
    "scalar", "training_class", "width", "skips", "mask",
)  # fmt: skip


def _misfit(model: Model, params: Mapping[str, Any]) -> str | None:
    from faithmap.decoders import misfit

    return misfit(model, params["layer"])


def _backwards(model: Model, params: Mapping[str, Any]) -> float:
    """One image, or none where nothing is masked."""
    return 0.0 if params.get("mask") == "none" else 1.0


@explainer(
    name="scan", version=1, source="SCAN (arXiv:2603.06523), eq. 1, 3 to 10",
    defined_for=_misfit, forwards=1, backwards=_backwards, check_params={"width": 0.125},
    fit_params=FIT_PARAMS, check_fit={"epochs": 2, "batch_size": 3},
)  # fmt: skip
class Scan:
    """Self-confidence of a decoder that reconstructs the image from features masked by the gradient.

    Features F of a layer are kept where the target's positive gradient reaches its percentile (eq. 1). A
    decoder, trained on images of the same kind, gives from them a reconstruction and a confidence C, of
    which it may spend about 1 / (1 + alpha) of the image's area (eq. 4 to 10). The map is C. Shape
    (B, H, W) of the image; range [0, 1], as it is, without any rescaling. One forward and one backward
    pass to the layer, then one pass of the decoder. It must be fitted first, once for a model and its
    images.

    Published: alpha 4, percentile 95 (drawn from U(70, 100) in training), the decoder's outline, the layers.
    Read from the authors' codes, where they agree: the forms of eq. 4 to 8, lambda 0.1, no stopped
    gradients, Adam at 1e-3. Where they differ there is a parameter for what can change the map much:
    `weighting`, `stretch`, `blur`, `scalar`, `training_class`, `skips`. In the rest this is the PyTorch
    code: losses are multiplied image by image, percentiles interpolated, a decoder begins and ends as there.
    An image without any positive gradient is not masked, as in both codes; it is noted.

    Args:
        layer: dotted name of the layer; by default the block halfway up a vision transformer (the 6th of 12),
            of other models the target layer, the last stage.
        alpha: weight of confidence in eq. 9, above 0; the target area is 1 / (1 + alpha).
        flexibility: the paper's lambda (eq. 8), 0 or more.
        percentile: of the positive gradients, when explaining; 0 to 100.
        lowest_percentile: in training it is drawn between this and 100 for each image and step.
        stretch: a of the stretching sine (eq. 4); 0.15 in the PyTorch code, 1.5 in the TensorFlow code.
        squash: "sine", or "sigmoid" (the paper's ablation).
        blur: sigma of the target's blur in cells of the features (eq. 7); 1 in the PyTorch code, 0.5 in the
            TensorFlow code, 0 for none, which is what both do for transformers.
        weighting: "amplified", alpha C (eq. 9 in the paper's words and the PyTorch code), or "discounted",
            C / alpha (the TensorFlow code). See `faithmap.reconstruction.error_weights`.
        scalar: what the gradient is of: "logit" (PyTorch code) or "probability" (TensorFlow code).
        training_class: whose gradient masks in training: "label" (PyTorch code; the prediction where there
            is no label) or "predicted" (TensorFlow code).
        width: multiplies the decoder's channels; by default 1 as published, and 0.25 for images of less than
            128 pixels a side, such as those of the embedded models.
        skips: of a CNN's decoder: a skip around each pair of residual modules (PyTorch code), or none, as in
            the TensorFlow code, whose first and last modules differ besides. A transformer's has none.
        mask: "gradient"; "positive" keeps all positive gradients (percentile 0); "none" and "random" (as many
            entries, anywhere) are controls.
        output: "confidence", or "error": the distance of the reconstruction from its target in [-1, 1], mean
            over the colours; a control.

    Raises:
        RequestError: a parameter is out of range or not known.
    """

    #: What a column of the curve counts: the record of a fit keeps its sum.
    counts: ClassVar[Mapping[str, str]] = {"unmasked": "not masked, as no gradient was positive"}

    def __init__(
        self,
        *,
        layer: str | None = None,
        alpha: float = 4.0,
        flexibility: float = 0.1,
        percentile: float = 95.0,
        lowest_percentile: float = 70.0,
        stretch: float = 0.15,
        squash: str = "sine",
        blur: float = 1.0,
        weighting: str = "amplified",
        scalar: str = "logit",
        training_class: str = "label",
        width: float | None = None,
        skips: bool = True,
        mask: str = "gradient",
        output: str = "confidence",
    ) -> None:
        from faithmap.cam import READINGS
        from faithmap.gradient_masks import MASKS
        from faithmap.reconstruction import SQUASHES, WEIGHTINGS

        _within("alpha", alpha, 0, math.inf, open_low=True)
        _within("flexibility", flexibility, 0, math.inf)
        _within("percentile", percentile, 0, 100)
        _within("lowest_percentile", lowest_percentile, 0, 100)
        _within("stretch", stretch, 0, math.inf)
        _within("blur", blur, 0, math.inf)
        if width is not None:
            _within("width", width, 0, 8, open_low=True)
        _one_of("squash", squash, SQUASHES)
        _one_of("weighting", weighting, WEIGHTINGS)
        _one_of("scalar", scalar, READINGS)
        _one_of("training_class", training_class, TRAINING_CLASSES)
        _one_of("mask", mask, MASKS)
        _one_of("output", output, OUTPUTS)
        self.layer, self.width, self.skips, self.mask, self.scalar = layer, width, skips, mask, scalar
        self.alpha, self.flexibility, self.weighting = alpha, flexibility, weighting
        self.percentile, self.lowest_percentile = percentile, lowest_percentile
        self.stretch, self.squash, self.blur = stretch, squash, blur
        self.training_class, self.output = training_class, output
        self._decoder: Decoder | None = None

    @staticmethod
    def idle_options(options: Mapping[str, Any]) -> set[str]:
        """A number of steps leaves that of epochs without effect."""
        return {"epochs"} if options["steps"] else set()

    def as_default(self, model: Model) -> set[str]:
        """Which of `layer`, `width` and `skips` mean what their defaults stand for on a model."""
        from faithmap.decoders import default_width
        from faithmap.errors import RequestError
        from faithmap.gradient_masks import analysed_layer, layout_of

        same = set()
        try:
            layers = [model.layer(analysed_layer(model, place)) for place in (self.layer, None)]
            if layers[0] is layers[1]:
                same.add("layer")
            layout = layout_of(model, self.layer)
            if self.width == default_width(layout):
                same.add("width")
            if layout.tokens:  # whose decoder is the same with and without
                same.add("skips")
        except RequestError:  # no such layer, or none with features: told where the decoder is made
            pass
        return same

    def __call__(self, model: Model, batch: Batch) -> Maps:
        """Maps (B, H, W): the confidence in [0, 1], or the reconstruction's error.

        Raises:
            RequestError: no decoder is loaded, or none for images of this size.
        """
        from faithmap.reconstruction import blurred_target

        decoded, masked = self.decode(model, batch)
        if self.output == "confidence":
            return self.confidence(decoded)
        target = blurred_target(batch.images.float(), masked.layout.grid, self.blur)
        return (target - decoded[:, 1:]).abs().mean(1)

    def reconstruct(self, model: Model, batch: Batch) -> Tensor:
        """The decoder's reconstruction (B, 3, H, W) in [0, 1]: what it still sees in the masked features."""
        decoded, _ = self.decode(model, batch)
        return ((decoded[:, 1:] + 1) / 2).clamp(0, 1)

    def decode(self, model: Model, batch: Batch) -> tuple[Tensor, Masked]:
        """What the decoder makes of a batch, and what it was given.

        Returns:
            (B, 4, H, W): first what `confidence` takes, then the colours of the reconstruction in [-1, 1], as
            they come (nothing clips them); and the masked features.

        Raises:
            RequestError: no decoder is loaded, or none for images of this size.
        """
        import torch

        from faithmap.decoders import decode_batch
        from faithmap.errors import RequestError
        from faithmap.gradient_masks import analysed_layer, masked_features, note_unmasked

        if self._decoder is None:
            raise RequestError(
                f"scan has no decoder for model '{model.name}'; train one with "
                f"`faithmap train scan --model {model.name} --dataset DATASET`"
            )
        name = analysed_layer(model, self.layer)
        noise = None
        if self.mask == "random":
            shape = batch.context.outputs(name).shape[1:]
            noise = torch.stack([torch.rand(shape, generator=batch.generator(i)) for i in range(len(batch))])
        masked = masked_features(
            batch.context, batch.targets, name, mask=self.mask, percentiles=self.percentile,
            score=self.scalar, noise=noise,
        )  # fmt: skip
        note_unmasked(batch, masked.unmasked)
        return decode_batch(self._decoder, model, masked), masked

    def confidence(self, decoded: Tensor) -> Tensor:
        """The confidence map (B, H, W) in [0, 1] of what the decoder gave, (B, 4, H, W) (eq. 3 and 4)."""
        from faithmap.reconstruction import confidence_of

        return confidence_of(decoded[:, 0], self.squash, self.stretch)

    def load(self, model: Model, tensors: Mapping[str, Tensor]) -> None:
        """Make the decoder of a fit ready: on the model's device, frozen, in evaluation mode.

        Args:
            model: the model that it was fitted for.
            tensors: what `fit` returned, in any floating type.

        Raises:
            RequestError: they do not belong to a decoder for this model at these parameters.
        """
        from faithmap.decoders import fold_norms, seeded_decoder, weights_of
        from faithmap.errors import RequestError
        from faithmap.gradient_masks import layout_of

        layout = layout_of(model, self.layer)
        decoder = seeded_decoder(layout, self.width, 0, model.device, skips=self.skips)
        expected = weights_of(decoder)
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        if shapes != {name: tuple(value.shape) for name, value in expected.items()}:
            told = "" if self.width is None else f" of width {self.width:g}"
            raise RequestError(
                f"scan: these tensors are no decoder{told} for model '{model.name}'; "
                "give those that were fitted for this model, layer and width"
            )
        decoder.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
        decoder.requires_grad_(False).eval()
        fold_norms(decoder)
        self._decoder = decoder

    def fit(
        self,
        model: Model,
        data: Any,
        session: Any,
        *,
        epochs: int = 5,
        steps: int = 0,
        batch_size: int = 32,
        rate: float = 1e-3,
        schedule: str = "cosine",
    ) -> dict[str, Tensor]:
        """Train the decoder on images; the model stays as it is.

        Published: 5 epochs on ImageNet, 50 on CUB-200-2011, 10 on Food-101: 200,000, 9,400 and 24,000 steps
        of 32 images. A thousand images need as many steps, not as many epochs. From the codes: Adam at
        1e-3; batches of 32 and a constant rate (TensorFlow), 128 and a cosine to 1e-6 (PyTorch, stepped each
        epoch; here each step). No augmentation but the random percentile. On a CPU, features and gradients
        are taken once and kept, up to 2 GiB of them.

        Args:
            model: the model.
            data: the images, a `faithmap.training.TrainingData`.
            session: a `faithmap.training.Session`; its precision is that of the decoder's layers.
            epochs: passes over the images, 1 or more.
            steps: how many steps in all, whatever that is in epochs; 0 leaves it to `epochs`.
            batch_size: images in a step; a last batch that is smaller is left out.
            rate: of Adam, at the start.
            schedule: "cosine" or "constant".

        Returns:
            The decoder's weights and running statistics, float32, on the CPU.

        Raises:
            RequestError: a setting is out of range, or the labels are not those of the model: one is no class
                of it, or hardly any is what it predicts.
            FaithmapError: the loss is no longer finite.
        """
        import torch

        from faithmap.decoder_training import DecoderTraining, learning_rate
        from faithmap.decoders import weights_of
        from faithmap.errors import RequestError
        from faithmap.explaining import guarded

        _one_of("schedule", schedule, SCHEDULES)
        if min(epochs, batch_size, len(data)) < 1 or steps < 0 or not rate > 0:
            raise RequestError(
                f"scan: got {len(data)} images, epochs {epochs}, batch_size {batch_size}, steps {steps}, "
                f"rate {rate:g}; expected one or more of the first three, 0 or more steps, and a rate above 0"
            )
        with guarded(model), torch.enable_grad():
            model.requires_grad_(False)  # the graph to the layer then keeps nothing for the weights
            # Images of fewer than a batch make one.
            partly = len(data) < batch_size
            each = data.steps(batch_size, drop_last=not partly)
            steps = steps or epochs * each
            training = DecoderTraining(self, model, session.seed, session.precision)
            training.keep_features(len(data), -(-steps // each))
            state = session.resume()
            with session.restoring():
                training.restore(state)
            while training.step < steps:
                epoch, done = divmod(training.step, each)
                for images, labels in data.batches(batch_size, epoch, drop_last=not partly, start=done):
                    if training.step == steps:
                        break
                    if not len(labels):  # none of them could be read
                        training.step += 1
                        continue
                    share = training.step / steps if schedule == "cosine" else 0.0
                    values = training.advance(images, labels, epoch, learning_rate(rate, share))
                    session.report(training.step, steps, values)
                    session.checkpoint(training.state)
                training.step = min(steps, (epoch + 1) * each)
        weights = weights_of(training.decoder).items()
        return {name: value.detach().float().cpu().contiguous() for name, value in weights}


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    from faithmap.errors import RequestError

    if not (low <= value <= high and math.isfinite(value)) or (open_low and value == low):
        least = f"above {low:g}" if open_low else f"{low:g} or more"
        most = " and finite" if high == math.inf else f", up to {high:g}"
        raise RequestError(f"scan, {name}: got {value:g}, expected {least}{most}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    from faithmap.errors import RequestError, nearest

    if value not in known:
        raise RequestError(f"scan, {name}: got '{value}'; {nearest(value, known)}")
