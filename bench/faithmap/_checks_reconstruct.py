"""The check of explainers that give a reconstruction of the image beside their maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from faithmap._checks import CheckError, fail, listed, watch
from faithmap._trial import IMAGES, Trial
from faithmap.errors import PluginError
from faithmap.explaining import bind

#: So far apart may reconstructions in [0, 1] be that should be equal: less than any eye can tell.
SAME = 1e-3


def check_reconstruct(trial: Trial) -> None:
    """Images (B, 3, H, W) in [0, 1], the same at a second call and alone; everything else is as before."""
    trial.maps()
    together = _reconstructed(trial, range(IMAGES))
    if apart := _apart(together, _reconstructed(trial, range(IMAGES))):
        raise fail(
            f"two calls of its reconstruct with one seed differ by {apart:.2g}",
            f"the same images, to {SAME:g}",
            "Draw from batch.generator(i).",
        )
    for i in range(IMAGES):
        if apart := _apart(together[i : i + 1], _reconstructed(trial, [i])):
            raise fail(
                f"the reconstruction of image {i} in a batch of {IMAGES} and alone differ by {apart:.2g}",
                f"the same image, to {SAME:g}",
                "Compute each image by itself, as for its map.",
            )


def _apart(one: Tensor, two: Tensor) -> float:
    """How far images in [0, 1] are apart, infinite for other shapes; 0 where it may be rounding."""
    gap = float((one - two).abs().max()) if one.shape == two.shape else float("inf")
    return gap if gap > SAME else 0.0


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
