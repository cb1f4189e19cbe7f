"""InfoCAM (reconstruction): channels weighted by the information that tells the class (2026)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.cuts import Cut, Tail
    from faithmap.models import Model
    from faithmap.streams import Features, Gates

MODES = ("auto", "channel", "element", "mean-field")
MAPS = ("auto", "A", "A_plus", "density", "density_plus")
WEIGHTS = ("info", "gate")


def _undefined(model: Model) -> str | None:
    """Why there is no layer at which the network can be cut."""
    from faithmap.cuts import cut_at
    from faithmap.errors import RequestError

    try:
        cut_at(model)
    except RequestError as error:
        return str(error)
    if model.num_classes < 2:
        return "has one output only: there are no odds of one class against the others"
    return None


def _setting(model: Model, params: Mapping[str, Any]) -> tuple[Cut, _Settings]:
    from faithmap.cuts import cut_at

    cut = cut_at(model, params.get("layer"))
    return cut, _settle(model, cut, {**_DEFAULTS, **params})


def _forwards(model: Model, params: Mapping[str, Any]) -> float:
    """The clean image, and every pass of the tail as if it were one of the whole network."""
    cut, chosen = _setting(model, params)
    if cut.head is not None:
        return 1  # a matrix product stands for the tail
    prior = chosen.prior_samples if chosen.gamma else 0
    if chosen.mode == "mean-field":
        gates = cut.layout.channels * (2 if chosen.kind == "half" else 1)
        return 1 + prior + 2 * chosen.contexts * gates
    return 1 + prior + _backwards(model, params)


def _backwards(model: Model, params: Mapping[str, Any]) -> float:
    """At most: a copy of the noise stream that tells nothing has no gradient."""
    cut, chosen = _setting(model, params)
    if cut.head is not None or chosen.mode == "mean-field":
        return 0
    return chosen.iterations * chosen.samples * (2 if chosen.gamma else 1)


@explainer(
    version=1, source="InfoCAM 2026, reconstruction: of the paper only the abstract is public",
    defined_for=_undefined, forwards=_forwards, backwards=_backwards, exact_cost=False, iterative=True,
    check_params={"iterations": 6, "samples": 4, "prior_samples": 4},
)  # fmt: skip
def infocam(
    model: Model,
    batch: Batch,
    *,
    mode: str = "auto",
    statistics: str = "zero",
    layer: str | None = None,
    map: str = "auto",
    weight: str = "info",
    halves: bool | None = None,
    beta: float = 5.0,
    gamma: float = 1.0,
    iterations: int | None = None,
    learning_rate: float | None = None,
    samples: int = 10,
    prior_samples: int = 64,
    contexts: int = 4,
    start: float = 0.0,
    min_std: float = 0.01,
    min_active: float = 0.01,
    min_nats: float = 0.01,
) -> Maps:
    """Channels weighted by the information about the class that a dual-stream bottleneck lets pass."""
    import torch

    from faithmap.cuts import PooledTail, cut_at, tail_of
    from faithmap.perturb import chunk_size
    from faithmap.streams import with_noise

    given = {
        "mode": mode, "map": map, "weight": weight, "halves": halves, "beta": beta, "gamma": gamma,
        "iterations": iterations, "learning_rate": learning_rate, "samples": samples,
        "prior_samples": prior_samples, "contexts": contexts, "start": start, "min_nats": min_nats,
    }  # fmt: skip
    _check(given, min_std=min_std, min_active=min_active)
    cut = cut_at(model, layer, batch.size)
    chosen = _settle(model, cut, given)
    features = with_noise(
        model, cut, batch.context.output(cut.layer), batch.targets, statistics,
        min_std=min_std, min_active=min_active,
    )  # fmt: skip
    tail = tail_of(model, cut)
    # A pass with a graph holds about four times what a pass without one does.
    chunk = max(1, chunk_size(model, batch.size) // 4)
    if isinstance(tail, PooledTail):
        chunk = max(64, 2**23 // features.values[0].numel())
    maps = []
    for part in torch.arange(len(batch), device=features.values.device).split(
        max(1, chunk // (2 * chosen.samples))
    ):
        here = features.select(part)
        gates = _fitted(tail, here, [batch.generator(i) for i in part.tolist()], chosen, chunk)
        maps.append(_map(cut, here, gates, chosen))
    return torch.cat(maps)


@dataclass(frozen=True)
class _Settings:
    """What is left open by "auto" and None, settled for a model and a layer."""

    mode: str
    kind: str
    map: str
    weight: str
    beta: float
    gamma: float
    iterations: int
    learning_rate: float
    samples: int
    prior_samples: int
    contexts: int
    start: float
    min_nats: float


_DEFAULTS: dict[str, Any] = {
    "mode": "auto", "map": "auto", "weight": "info", "halves": None, "beta": 5.0, "gamma": 1.0,
    "iterations": None, "learning_rate": None, "samples": 10, "prior_samples": 64, "contexts": 4,
    "start": 0.0, "min_nats": 0.01,
}  # fmt: skip


def _settle(model: Model, cut: Cut, given: Mapping[str, Any]) -> _Settings:
    """The mode and the rest of the settings: channels at the last maps of a CNN, elements elsewhere."""
    from faithmap.cuts import cut_at

    mode = given["mode"]
    if mode == "auto":
        last = cut.layout.order == "first" and cut.layer == cut_at(model).layer
        mode = "channel" if last else "element"
    halves = cut.signed if given["halves"] is None else given["halves"]
    kind = "element" if mode == "element" else "half" if halves else "channel"
    picture = given["map"]
    if picture == "auto":
        picture = (
            "A" if kind != "element" else "density" if cut.layout.prefix or cut.signed else "density_plus"
        )
    steps, rate = given["iterations"], given["learning_rate"]
    if steps is None:
        steps = 30 if kind == "element" else 50
    if rate is None:
        rate = 1.0 if kind == "element" else 0.5
    return _Settings(
        mode, kind, picture, given["weight"], given["beta"], given["gamma"], steps, rate,
        given["samples"], given["prior_samples"], given["contexts"], given["start"], given["min_nats"],
    )  # fmt: skip


def _check(given: Mapping[str, Any], **more: float) -> None:
    """Refuse words that are unknown and numbers that make no sense."""
    from faithmap.errors import RequestError, nearest

    for what, known in (("mode", MODES), ("map", MAPS), ("weight", WEIGHTS)):
        if given[what] not in known:
            raise RequestError(f"infocam: unknown {what} '{given[what]}'; {nearest(given[what], known)}")
    numbers = {**given, **more}
    positive = ("beta", "iterations", "learning_rate", "samples", "prior_samples", "contexts", "min_std")
    wrong = [name for name in positive if numbers[name] is not None and numbers[name] <= 0]
    wrong += [name for name in ("gamma", "min_active", "min_nats") if numbers[name] < 0]
    wrong += ["samples"] if given["samples"] % 2 else []
    if wrong:
        raise RequestError(
            f"infocam: got {wrong[0]} {numbers[wrong[0]]}; expected {', '.join(positive)} above zero "
            "(without a beta, features of no effect would keep their gates), samples even (they come in "
            "pairs), and gamma, min_active and min_nats not negative"
        )


def _fitted(
    tail: Tail, features: Features, generators: list[Generator], chosen: _Settings, chunk: int
) -> Gates:
    """The gates of some images, found by steps of Adam or, without gradients, in random contexts."""
    from faithmap.streams import Gates, mean_field, optimised, prior_odds

    gates = Gates.start(chosen.kind, features, chosen.start)
    prior = features.values.new_zeros(len(features.targets))
    if chosen.gamma:
        prior = prior_odds(tail, features, generators, chosen.prior_samples, chunk)
    if chosen.mode == "mean-field":
        return mean_field(
            tail, features, gates, generators,
            beta=chosen.beta, gamma=chosen.gamma, contexts=chosen.contexts, prior=prior, chunk=chunk,
        )  # fmt: skip
    return optimised(
        tail, features, gates, generators,
        beta=chosen.beta, gamma=chosen.gamma, iterations=chosen.iterations, samples=chosen.samples,
        learning_rate=chosen.learning_rate, prior=prior, chunk=chunk,
    )  # fmt: skip


def _map(cut: Cut, features: Features, gates: Gates, chosen: _Settings) -> Tensor:
    """Maps (n, h, w) of what the discriminative stream carries, at the places that lie on the image."""
    import torch

    patches = list(cut.layout.patches)
    nats = gates.nats(features)[:, :, patches]
    carried = nats if chosen.weight == "info" else gates.passed(features)[:, :, patches]
    values, above = features.values[:, :, patches], features.above[:, :, patches]
    excess = values - features.mean[:, :, patches]
    if chosen.map.startswith("density"):
        maps = (carried * above if chosen.map == "density_plus" else carried).sum(1)
    elif chosen.kind == "half":
        # A weight for where a channel exceeds the noise's mean, and one for where it falls short of it.
        upper, lower = (carried * above).mean(2), (carried * ~above).mean(2)
        upper, lower = _shares(torch.stack([upper, lower], 1)).unsqueeze(3).unbind(1)
        maps = (upper * excess.clamp_min(0) + lower * (-excess).clamp_min(0)).sum(1)
    else:
        if chosen.kind == "element":
            weights = (carried * above).mean(2)
        else:
            weights = carried.mean(2) * (excess.mean(2) > 0)
        shown = excess.clamp_min(0) if chosen.map == "A_plus" else values
        maps = (_shares(weights).unsqueeze(2) * shown).sum(1).clamp_min(0)
    empty = nats.mean(2).sum(1) < chosen.min_nats
    return maps.masked_fill(empty.unsqueeze(1), 0.0).unflatten(1, cut.layout.grid)


def _shares(weights: Tensor) -> Tensor:
    """Weights (n, ...) divided by their sum; all zero where there are none."""
    total = weights.flatten(1).sum(1).view(-1, *[1] * (weights.ndim - 1))
    return weights / total.where(total > 0, total.new_ones(()))
