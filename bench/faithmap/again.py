"""Explaining once more: what a metric needs that asks how a map changes, not what a map shows.

Such a metric declares `needs={"explainer"}`. The core then hands it the explainer that made the maps,
with its parameters, its fit and its seeds, as `batch.explainer`; here is how it is called, so that
other maps come about, and are seen, exactly as the first ones did.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.errors import RequestError
from faithmap.explaining import MapSet, explain_batch
from faithmap.models import Model
from faithmap.scoring import project


def with_images(batch: Batch, images: Tensor, **changes: Any) -> Batch:
    """The batch with other images in the place of its own, of which nothing is computed yet.

    The ids stay, and with them the seeds: an explainer that draws random numbers draws those that it
    drew for the first images, so that what differs is due to the images alone.

    Args:
        batch: the batch.
        images: (B, 3, H, W) in [0, 1], of any size that the model takes.
        **changes: other fields that change with them, such as `masks` and `grid`.
    """
    context = Context(batch.context.model, images)
    return replace(batch, images=images, context=context, cache={}, notes={}, **changes)


def with_model(batch: Batch, model: Model) -> Batch:
    """The batch for another model of the same classes, of which nothing is computed yet; the seeds stay."""
    return replace(batch, context=Context(model, batch.images), cache={}, notes={})


def for_classes(batch: Batch, targets: Tensor) -> Batch:
    """The batch with other classes (B,) to explain; images, shared passes and seeds are the same."""
    return replace(batch, targets=targets, notes={})


def explain_again(model: Model, batch: Batch, metric: str) -> MapSet:
    """Explain a batch with the explainer that made the maps which are being scored.

    The maps come as metrics see them: on the run's grid, brought to the images' size. One image that
    fails costs itself alone; what became of it stands in `status` and `reasons`. A constant map is
    given as it is, its status being "empty". Where the explainer refuses what a metric has made of model
    or images, as one does whose statistics are of another size, all maps have failed, with its reason.

    Args:
        model: the model.
        batch: images and targets, from `with_images` or `for_classes`.
        metric: the metric's name, for the error.

    Raises:
        RequestError: the batch comes with maps alone.
    """
    if batch.explainer is None:
        raise RequestError(
            f"metric '{metric}' calls the explainer, but only maps were given; name the explainer"
        )
    try:
        found = explain_batch(batch.explainer, model, batch)
    except RequestError as refusal:
        blank = torch.zeros(len(batch), 2, 2, device=batch.images.device)
        found = MapSet(blank, ["failed"] * len(batch), [str(refusal)] * len(batch))
    return replace(found, maps=project(found.maps, batch))


def failures(found: MapSet, what: str) -> dict[int, str]:
    """Positions of the maps that failed with the reasons, for `Scored.failed`; `what` names them."""
    return {
        i: f"{what}: {reason}"
        for i, (status, reason) in enumerate(zip(found.status, found.reasons, strict=True))
        if status == "failed"
    }
