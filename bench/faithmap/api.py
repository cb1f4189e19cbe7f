"""`faithmap.explain`, `reconstruct` and `score`: one call each, without a run, a dataset or a folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from faithmap.batch import Batch
from faithmap.config import parse_spec, split_list
from faithmap.context import Context
from faithmap.errors import FaithmapError, RequestError
from faithmap.explaining import (
    HANDED,
    Bound,
    MapSet,
    bind,
    explain_batch,
    judge,
    lacking,
    reconstruct_batch,
    reconstructs,
    undefined,
)
from faithmap.fitting import advice, find, wants_fit
from faithmap.models import Model, load_model
from faithmap.records import Spec
from faithmap.registry import default_metrics, get
from faithmap.scoring import MetricUse, score_maps, use_metric

if TYPE_CHECKING:
    import pandas as pd


def explain(
    model: Model | str,
    images: Tensor,
    targets: Sequence[int] | Tensor | None = None,
    explainer: str = "gradcam",
    *,
    seed: int = 0,
    **params: Any,
) -> Tensor:
    """The maps of one explainer.

    What the explainer notes of its maps, such as a fallback, is given as one warning.

    Args:
        model: a `Model`, or a name such as "timm/resnet18".
        images: (B, 3, H, W), RGB in [0, 1].
        targets: the classes (B,) explained; by default the predictions.
        explainer: a registry name.
        seed: of explainers that draw random numbers.
        **params: the explainer's own.

    Returns:
        (B, h, w) at the explainer's own resolution; signed where the method is.

    Raises:
        RequestError: a name, a shape or a parameter is wrong, or the explainer is not defined for
            the model.
        FaithmapError: the explainer failed on an image, which is named.
    """
    maps, notes = ask(model, images, targets, explainer, seed, params).maps()
    if notes:
        told = [f"{text} (image {', '.join(map(str, which))})" for text, which in notes.items()]
        warnings.warn(f"explainer '{explainer}' notes: {'; '.join(told)}", stacklevel=2)
    return maps


def reconstruct(
    model: Model | str,
    images: Tensor,
    targets: Sequence[int] | Tensor | None = None,
    explainer: str = "scan",
    *,
    seed: int = 0,
    **params: Any,
) -> Tensor:
    """The images as an explainer reconstructs them, where it gives that beside its maps.

    It takes what `explain` takes.

    Returns:
        (B, 3, H, W) in [0, 1].

    Raises:
        RequestError: a name, a shape or a parameter is wrong, or the explainer is not defined for
            the model or gives no reconstruction.
        FaithmapError: the explainer failed.
    """
    return ask(model, images, targets, explainer, seed, params).reconstruction()


@dataclass(frozen=True)
class Asked:
    """One explainer, checked, with its fit, and the images that it explains: ready to be asked."""

    call: Bound
    model: Model
    batch: Batch

    def maps(self) -> tuple[Tensor, dict[str, list[int]]]:
        """The maps (B, h, w), and what is noted of which images.

        Raises:
            FaithmapError: the explainer failed on an image, which is named.
        """
        found = explain_batch(self.call, self.model, self.batch)
        notes: dict[str, list[int]] = {}
        for i, (status, reason) in enumerate(zip(found.status, found.reasons, strict=True)):
            if status == "failed":
                raise FaithmapError(f"explainer '{self.call.plugin.name}' failed on image {i}: {reason}")
            if status == "ok" and reason:
                notes.setdefault(reason, []).append(i)
        return found.maps, notes

    @property
    def reconstructs(self) -> bool:
        """Whether it gives a reconstruction beside its maps."""
        return reconstructs(self.call.plugin)

    def reconstruction(self) -> Tensor:
        """The images (B, 3, H, W) in [0, 1] as the explainer reconstructs them.

        Raises:
            FaithmapError: it gives no reconstruction, or fails on it.
        """
        return reconstruct_batch(self.call, self.model, self.batch)


def ask(
    model: Model | str,
    images: Tensor,
    targets: Sequence[int] | Tensor | None,
    explainer: str,
    seed: int,
    params: Mapping[str, Any],
) -> Asked:
    """Check what is asked of one explainer, and find its fit; arguments as of `explain`.

    Raises:
        RequestError: a name, a shape or a parameter is wrong, or the explainer is not defined for
            the model.
    """
    network = load_model(model)
    plugin = get("explainer", explainer)
    checked = plugin.check(params)
    batch = _batch(network, images, targets, seed=seed)
    reason, fit = undefined(plugin, network, set(), checked), None
    if not reason and wants_fit(plugin, checked):
        fit = find(plugin, checked, network)
        reason = "" if fit else advice(plugin, checked, network)
    if reason:
        raise RequestError(f"explainer '{explainer}': {reason}")
    return Asked(bind(plugin, checked, fit=fit), network, batch)


def score(
    model: Model | str,
    images: Tensor,
    maps: Tensor,
    targets: Sequence[int] | Tensor | None = None,
    metrics: Sequence[str] | None = None,
    labels: Sequence[int] | Tensor | None = None,
    masks: Tensor | None = None,
    boxes: Sequence[Tensor] | None = None,
    *,
    void: Tensor | None = None,
    ids: Sequence[str] | None = None,
    map_grid: int | str = "native",
    seed: int = 0,
) -> pd.DataFrame:
    """Score maps, whoever made them.

    Args:
        model: a `Model`, or a name.
        images: (B, 3, H, W), RGB in [0, 1]; they are never resized.
        maps: (B, h, w) at any resolution, signs kept.
        targets: the classes (B,) that the maps explain; by default the predictions.
        metrics: registry names, also `name[key=value]`; by default all that the given truths
            serve, but for those that must be named.
        labels, masks, boxes: truths: (B,); bool (B, H, W); a (K, 4) tensor an image,
            `x0, y0, x1, y1` in pixels of `images`.
        void: bool (B, H, W), true where the masks leave open whether a pixel is on the object, as VOC's
            do along outlines; scores of localisation look at the other pixels alone.
        ids: names of the images; by default their positions.
        map_grid: "native", "model", or a side in cells that maps are reduced to first.
        seed: of the field that orders tied pixels.

    Returns:
        One row an image and score: `image_id, metric, value, status, reason`.

    Raises:
        RequestError: a name, a shape or a parameter is wrong.
    """
    import pandas as pd

    network = load_model(model)
    batch = _batch(network, images, targets, labels, masks, boxes, ids, seed, _grid(network, map_grid), void)
    found = _given_maps(maps, batch)
    rows = []
    for use in _uses(metrics, batch):
        for verdict in score_maps(use, network, batch, found):
            for i in verdict.only:
                rows.append(
                    (batch.ids[i], verdict.metric, verdict.values[i], verdict.status[i], verdict.reasons[i])
                )
    frame = pd.DataFrame(rows, columns=["image_id", "metric", "value", "status", "reason"])
    return frame.astype({"value": "float64"})


def _uses(metrics: Sequence[str] | None, batch: Batch) -> list[MetricUse]:
    gives = {"label"} if batch.labels is not None else set()
    gives |= {"mask"} if batch.masks is not None else set()
    gives |= {"box"} if batch.boxes is not None else set()
    if metrics is None:
        uses = [use_metric(Spec(plugin.name)) for plugin in default_metrics()]
        return [u for u in uses if not u.facts.needs & HANDED and not lacking(u.needs, gives)]
    uses = [use_metric(parse_spec(name)) for text in metrics for name in split_list(text)]
    for use in uses:
        if use.facts.needs & HANDED:
            raise RequestError(
                f"metric '{use.plugin.name}' calls the explainer itself; use faithmap.run for it"
            )
        reason = lacking(use.needs, gives)
        if reason:
            needs = reason.replace(", which the dataset does not give", "")
            raise RequestError(f"metric '{use.plugin.name}' {needs}; give labels=, masks= or boxes=")
    return uses


def _grid(model: Model, setting: int | str) -> tuple[int, int] | None:
    if setting == "native":
        return None
    if setting == "model":
        return model.grid
    if isinstance(setting, int) and not isinstance(setting, bool) and setting > 1:
        return setting, setting
    raise RequestError(f'map_grid is {setting!r}; expected "native", "model" or a side of at least 2 cells')


def _given_maps(maps: Any, batch: Batch) -> MapSet:
    tensor = torch.as_tensor(maps)
    if tensor.ndim != 3 or len(tensor) != len(batch) or min(tensor.shape[1:]) < 2:
        raise RequestError(
            f"maps have shape {tuple(tensor.shape)} for images {tuple(batch.images.shape)}; "
            f"expected ({len(batch)}, h, w) with h, w > 1"
        )
    return judge(tensor.detach().to(batch.images.device, torch.float32))


def _batch(
    model: Model,
    images: Tensor,
    targets: Sequence[int] | Tensor | None = None,
    labels: Sequence[int] | Tensor | None = None,
    masks: Tensor | None = None,
    boxes: Sequence[Tensor] | None = None,
    ids: Sequence[str] | None = None,
    seed: int = 0,
    grid: tuple[int, int] | None = None,
    void: Tensor | None = None,
) -> Batch:
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        shape = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
        raise RequestError(f"images are {shape}; expected a float tensor (B, 3, H, W), RGB in [0, 1]")
    if not images.is_floating_point() or bool((images < 0).any()) or bool((images > 1).any()):
        raise RequestError(
            f"images are {images.dtype} from {float(images.min()):g} to {float(images.max()):g}; "
            "expected floats in [0, 1] (divide bytes by 255; do not normalise, the model does)"
        )
    placed = images.to(model.device, torch.float32)
    count = len(placed)
    if ids is not None and (len(ids) != count or len(set(ids)) != count):
        raise RequestError(f"ids are {len(ids)} names for {count} images; expected one each, all different")
    if masks is not None and tuple(masks.shape) != (count, *images.shape[2:]):
        raise RequestError(f"masks have shape {tuple(masks.shape)}; expected {(count, *images.shape[2:])}")
    if void is not None and (masks is None or void.shape != masks.shape):
        held = "None" if masks is None else str(tuple(masks.shape))
        raise RequestError(
            f"void has shape {tuple(void.shape)}, masks {held}; it goes with masks of the same shape"
        )
    if boxes is not None and len(boxes) != count:
        raise RequestError(
            f"boxes are given for {len(boxes)} images, not for {count}; expected a (K, 4) tensor each"
        )
    model.eval()
    context = Context(model, placed)
    return Batch(
        images=placed,
        targets=context.logits.argmax(1)
        if targets is None
        else _classes("targets", targets, count, model, placed),
        ids=tuple(str(name) for name in ids) if ids is not None else tuple(str(i) for i in range(count)),
        context=context,
        labels=None if labels is None else _classes("labels", labels, count, model, placed),
        masks=None if masks is None else masks.to(placed.device).bool(),
        void=None if void is None else void.to(placed.device).bool(),
        boxes=None if boxes is None else [torch.as_tensor(box).float().reshape(-1, 4).cpu() for box in boxes],
        grid=grid,
        seed=seed,
    )


def _classes(what: str, given: Sequence[int] | Tensor, count: int, model: Model, images: Tensor) -> Tensor:
    tensor = torch.as_tensor(given, device=images.device).flatten()
    if tensor.dtype.is_floating_point or len(tensor) != count:
        raise RequestError(
            f"{what} are {len(tensor)} values of {tensor.dtype}; expected {count} whole numbers"
        )
    with torch.no_grad():
        classes = int(model(images[:1]).shape[1])
    if bool((tensor < 0).any()) or bool((tensor >= classes).any()):
        raise RequestError(
            f"{what} range from {int(tensor.min())} to {int(tensor.max())}; the model has {classes} classes "
            f"(0 to {classes - 1})"
        )
    return tensor.long()
