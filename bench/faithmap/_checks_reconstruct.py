"""The check of explainers that give a reconstruction of the image beside their maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from faithmap._checks import CheckError, fail, listed, watch
from faithmap._trial import IMAGES, Trial, disagreement, equal_enough, same_bits
from faithmap.errors import PluginError
from faithmap.explaining import bind


def check_reconstruct(trial: Trial) -> None:
    """Images (B, 3, H, W) in [0, 1], the same at a second call and alone; everything else is as before."""
    trial.maps()
    together = _reconstructed(trial, range(IMAGES))
    if not same_bits(together, again := _reconstructed(trial, range(IMAGES))):
        for one, two in zip(together, again, strict=True):
            if apart := disagreement(trial, one, two):
                raise fail(
                    f"two calls of its reconstruct with one seed have {apart}",
                    "the same images",
                    "Draw from batch.generator(i).",
                )
    for i in range(IMAGES):
        if apart := disagreement(trial, together[i], _reconstructed(trial, [i])[0]):
            raise fail(
                f"the reconstruction of image {i} in a batch of {IMAGES} and alone have {apart}",
                equal_enough(trial),
                "Compute each image by itself, as for its map.",
            )


def _reconstructed(trial: Trial, positions: Sequence[int]) -> Tensor:
    """What `reconstruct` gives for some of the trial's images, on a fresh copy of the model."""
    model = trial.fresh()
    batch = trial.batch(model, positions)
    call = bind(trial.plugin, dict(trial.params), fit=trial.fit)
    seen = watch(lambda: call.reconstruct(model, batch), model, batch)
    if isinstance(seen.error, PluginError):
        raise CheckError(f"{seen.error}. Scale and clip what you return.") from seen.error
    if seen.error is not None:
        raise fail(f"its reconstruct raises {seen.said}", "images (B, 3, H, W) in [0, 1]", "See the error.")
    changed = [f"{kind} ({listed(names)})" for kind, names in seen.changes.items() if names]
    if changed:
        raise fail(
            f"its reconstruct changes {', '.join(changed)}",
            "inputs, model and process as before",
            "Restore what you switch in a finally block, or work on copies.",
        )
    images: Tensor = seen.result
    return images
