"""InfoCAM (reconstruction): channels weighted by the information that tells the class (2026)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from faithmap import explainer

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from faithmap.batch import Batch, Maps
    from faithmap.bottleneck import Statistics
    from faithmap.cuts import Cut, Tail
    from faithmap.models import Model
    from faithmap.stream_bounds import StreamReport
    from faithmap.streams import Features, Gates

MODES = ("auto", "channel", "element", "mean-field")
MAPS = ("auto", "A", "A_plus", "density", "density_plus")
WEIGHTS = ("info", "gate")
#: What is noted of maps that are zero everywhere.
SHUT = "less than min_nats passes the gates: nothing speaks for the class, or beta is too large"
ABSENT = "what passes the gates lies in channels or cells that the map leaves out"
#: Words that `statistics` takes; anything else is a file.
STATISTICS = ("zero", "image", "fitted")
NOT_NEGATIVE = ("gamma", "min_active", "min_nats")


def _undefined(model: Model, params: Mapping[str, Any]) -> str | None:
    """Why there is no layer at which the network can be cut, or no such map of it."""
    from faithmap.cuts import cut_at
    from faithmap.errors import RequestError

    try:
        cut_at(model)
        if model.num_classes < 2:
            return "has one output only: there are no odds of one class against the others"
        _setting(model, params)
    except RequestError as error:
        return str(error)
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
    name="infocam", version=1, fit_params=["layer"], check_fit={"batch_size": 3},
    source="InfoCAM 2026, reconstruction: of the paper only the abstract is public",
    defined_for=_undefined, forwards=_forwards, backwards=_backwards, exact_cost=False, iterative=True,
    check_params={"iterations": 6, "samples": 4, "prior_samples": 4},
)  # fmt: skip
class InfoCAM:
    """Channels weighted by the information about the class that a dual-stream bottleneck lets pass.

    InfoCAM (reconstruction): only the paper's abstract is public. It fixes a dual-stream information
    bottleneck, a variational split of a layer's activations into a discriminative and a noise stream,
    and weights from the mutual information of the discriminative stream and the prediction. All else
    here is a reconstruction from the literature on bottlenecks, and its figures are not the paper's.
    It is another method than the infoCAM of Qin et al. 2021 (arXiv:2106.10472).

    A gate lambda_k = sigmoid(a_k) divides the features A_k of a channel, beside noise
    eps ~ N(mu_k, sigma_k^2), into z_d = lambda A + (1 - lambda) eps and z_n = (1 - lambda) A + lambda eps'.
    Y says whether the class is the one explained, with log-odds logit_c - logsumexp of the others. Adam
    minimises for each image

        E[-log p(Y | z_d)]  +  beta * mean over features of KL(z_d given A || noise)
                            +  gamma * E[KL(pi || p(Y | z_n)), where that speaks for the class]

    with draws in pairs of opposite sign; pi is what passes of noise alone believe. The last term makes
    evidence that is there twice pass twice. Without it, gamma = 0, elements with beta 10 and noise of the
    image are IBA without smoothing: the cross-entropy is the same, and with start 5, 10 steps and equal
    draws so is the map "density", in nats instead of bits, but for channels that are zero all over, which
    stay shut here. (Of many images IBA takes noise for each position, this for each channel.) I_k, the KL
    averaged over a channel's cells, is its information in nats.

    Modes. "channel": w_k = I_k where the channel's mean is above mu_k, else 0, divided by the sum;
    the map is ReLU(sum_k w_k A_k) ("A") or sum_k w_k (A_k - mu_k)^+ ("A_plus"). The condition leaves out
    channels whose absence tells the class: their maps do not show it. With `halves` a channel has a gate
    above mu_k and one below, and the map is the sum of both excesses, each with its weight: for features
    with a sign. "element": a gate for each feature; the map is sum_k KL in every cell ("density"), or
    only where A > mu ("density_plus"), or channels weighted by their mean KL where A > mu ("A",
    "A_plus"). "mean-field": gates of channels without any gradient. Each is weighed by the loss with the
    channel shut less that with it open, in random halves of the others, and solves
    dKL / dlambda * beta / K = max(that, 0). "auto" is "channel" at the last maps of a CNN and "element"
    at layers before and for transformers, where channels hardly tell places apart.

    Weights come from gates alone: no gradient of a score with respect to the image's features is one. Gates
    are found through the frozen tail of the network, by derivatives of the loss with respect to the gates,
    at noisy features and as an average over noise; or in the mean-field mode by forward passes alone.

    The layer has to be a cut: every path to the logits passes it. Otherwise evidence goes round the
    gates and no noise stream can lose it. That is tried once for each model and layer, with equal
    features for two images, in a few passes that are not counted. The default is the model's target
    layer where it is one and, for transformers, the output of the last block but one: patches of the
    last reach a class token's head no more. All tokens are gated, the class token with noise of its own;
    only patches are in the map.

    The map is (B, h, w) on the features' grid, not negative, in the unit of the features ("density": nats
    per cell). The stretch to [0, 1] that ends the published map is left to whoever shows it. A map is
    zero where all that passes is less than `min_nats` per cell: nothing speaks for the class, or beta is
    too large. That is noted. `report` gives what the streams come to for each image, in nats.

    Cost. A pass of the tail counts as one of the whole network, although what lies before the layer
    is not computed again where modules can be left out. Where the tail is mean pooling and one linear
    layer (most residual networks at their last stage), which is tried too, noise is drawn for the pooled
    vector; this is exact, and the network is passed once.

    mu and sigma are meant to come from a thousand images or more, over which and over cells they are
    taken for each channel: `faithmap train "infocam[statistics=fitted]" --model MODEL --dataset DATASET`,
    or `faithmap.bottleneck.fit_statistics(model, images, layer).save(path)`. By default no data is
    needed: noise lies around zero with the channel's root mean square over the image.
    "image" takes the channel's mean over the image; a head that averages the layer then loses nothing,
    and maps are blank. Gates do not change where a channel becomes c A + d and the tail makes up for it, if
    statistics are those of many images: noise around zero, the default, follows the scale c, not the shift d.

    Reconstructed, not published: everything with a number. The preset `infocam-open-points` sets each
    choice beside its alternatives, on the dev part of `shapes`; results/README.md has what came of it.

    Args:
        mode: "channel", "element", "mean-field" or "auto".
        statistics: "zero", "image", "fitted", or the path of a file made for this model and layer.
        layer: dotted name of a layer that is a cut; see above.
        map: "A", "A_plus", "density", "density_plus", or "auto": "A_plus" for channels, else a density,
            "density_plus" where features have no sign.
        weight: "info" weighs with nats, "gate" with lambda.
        halves: two gates a channel, in the modes of channels; None for: where features are signed.
        beta: weight of the mean information, in nats; above zero. None for 5, or 20 for elements.
        gamma: weight of the noise stream.
        iterations: steps of Adam; None for 50, or 30 for elements.
        learning_rate: Adam's; None for 0.5, or 1 for elements.
        samples: draws of each stream and step, an even number.
        prior_samples: passes of noise alone, from which pi is taken.
        contexts: random halves in the mean-field mode.
        start: a_k before the first step; 0 gives each stream half.
        min_std: floor under sigma, in the unit of the features.
        min_active: channels that are not zero at less than this share of images and cells stay shut;
            without a file, those that are zero all over the image.
        min_nats: least information per cell, summed over channels, for a map that is not zero.

    Raises:
        RequestError: a word is unknown, or a number makes no sense.
    """

    def __init__(
        self,
        *,
        mode: str = "auto",
        statistics: str = "zero",
        layer: str | None = None,
        map: str = "auto",
        weight: str = "info",
        halves: bool | None = None,
        beta: float | None = None,
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
    ) -> None:
        self._given = {
            "mode": mode, "map": map, "weight": weight, "halves": halves, "beta": beta, "gamma": gamma,
            "iterations": iterations, "learning_rate": learning_rate, "samples": samples,
            "prior_samples": prior_samples, "contexts": contexts, "start": start, "min_nats": min_nats,
        }  # fmt: skip
        _check(self._given, min_std=min_std, min_active=min_active)
        _check_statistics(statistics)
        self._layer, self._min_std, self._min_active = layer, min_std, min_active
        self._statistics: str | Statistics = statistics

    #: The parameters that ask for a fit.
    fit_when: ClassVar[Mapping[str, Any]] = {"statistics": "fitted"}

    @property
    def wants_fit(self) -> bool:
        """Whether the statistics are those of a fit."""
        return self._statistics == "fitted"

    def fit(self, model: Model, data: Any, session: Any, *, batch_size: int = 32) -> dict[str, Tensor]:
        """Gather mean and spread of the layer's features over the images, once through.

        Args:
            model: the model.
            data: the images, a `faithmap.training.TrainingData`.
            session: a `faithmap.training.Session`.
            batch_size: images in a pass.
        """
        from faithmap.bottleneck import gather_statistics
        from faithmap.cuts import cut_at

        layer = cut_at(model, self._layer).layer
        return gather_statistics(model, data, session, layer, batch_size).tensors()

    def numbers_used(self, tensors: Mapping[str, Tensor]) -> int:
        """Mean and spread of each channel, of prefix tokens apart; the rest says how they are had."""
        prefix = tensors.get("prefix")
        return 2 * len(tensors["mean"]) + (0 if prefix is None else prefix.numel())

    def load(self, model: Model, tensors: Mapping[str, Tensor]) -> None:
        """Take the statistics of a fit."""
        from faithmap.bottleneck import Statistics
        from faithmap.cuts import cut_at

        layer = cut_at(model, self._layer).layer
        self._statistics = Statistics.of_tensors(tensors, layer, model.digest())

    def __call__(self, model: Model, batch: Batch) -> Maps:
        """Maps (B, h, w) on the features' grid.

        Raises:
            RequestError: the layer is no cut (others are named), or the statistics do not fit.
        """
        import torch

        maps, shut = [], []
        for part in self._parts(model, batch):
            maps.append(_map(part.cut, part.features, part.gates, part.chosen))
            shut.append(_shut(part.cut, part.features, part.gates, part.chosen))
        return _noted(batch, torch.cat(maps), torch.cat(shut))

    def report(self, model: Model, batch: Batch, *, samples: int = 64) -> StreamReport:
        """What the gates behind the maps of a batch come to, image by image, in nats.

        Args:
            model: the model.
            batch: images with targets; their seeds are the maps' if its key of the seeds is.
            samples: draws of each stream, an even number.
        """
        from faithmap.stream_bounds import joined, stream_report

        return joined(
            stream_report(
                part.tail, part.features, part.gates, part.generators, samples=samples, chunk=part.chunk
            )
            for part in self._parts(model, batch)
        )

    def _parts(self, model: Model, batch: Batch) -> Iterator[_Part]:
        """The images of a batch with their gates, as many at once as fit."""
        import torch

        from faithmap.cuts import PooledTail, cut_at, tail_of
        from faithmap.errors import RequestError
        from faithmap.perturb import chunk_size
        from faithmap.streams import with_noise

        if self._statistics == "fitted":
            raise RequestError(
                f"infocam has no statistics for model '{model.name}'; `faithmap train` gathers them"
            )
        cut = cut_at(model, self._layer, batch.size)
        chosen = _settle(model, cut, self._given)
        features = with_noise(
            model, cut, batch.context.outputs(cut.layer), batch.targets, self._statistics,
            min_std=self._min_std, min_active=self._min_active,
        )  # fmt: skip
        tail = tail_of(model, cut)
        # A pass with a graph holds about four times what a pass without one does.
        chunk = max(1, chunk_size(model, batch.size) // 4)
        if isinstance(tail, PooledTail):
            chunk = max(64, 2**23 // features.values[0].numel())
        for part in torch.arange(len(batch), device=features.values.device).split(
            max(1, chunk // (2 * chosen.samples))
        ):
            here, generators = features.select(part), [batch.generator(i) for i in part.tolist()]
            gates = _fitted(tail, here, generators, chosen, chunk)
            yield _Part(cut, chosen, tail, here, gates, generators, chunk)


@dataclass(frozen=True)
class _Part:
    """Some images of a batch with the gates that were found for them."""

    cut: Cut
    chosen: _Settings
    tail: Tail
    features: Features
    gates: Gates
    #: One an image, as the search for its gates has left it.
    generators: list[Generator]
    #: Copies in one pass.
    chunk: int


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
    "mode": "auto", "map": "auto", "weight": "info", "halves": None, "beta": None, "gamma": 1.0,
    "iterations": None, "learning_rate": None, "samples": 10, "prior_samples": 64, "contexts": 4,
    "start": 0.0, "min_nats": 0.01,
}  # fmt: skip


def _settle(model: Model, cut: Cut, given: Mapping[str, Any]) -> _Settings:
    """The mode and the rest of the settings: channels at the last maps of a CNN, elements elsewhere."""
    from faithmap.cuts import cut_at
    from faithmap.errors import RequestError

    mode = given["mode"]
    if mode == "auto":
        last = cut.layout.order == "first" and cut.layer == cut_at(model).layer
        mode = "channel" if last else "element"
    halves = cut.signed if given["halves"] is None else given["halves"]
    kind = "element" if mode == "element" else "half" if halves else "channel"
    picture = given["map"]
    if kind == "half" and picture == "A":
        raise RequestError(
            f"infocam: layer '{cut.layer}' of model '{model.name}' has two gates a channel, above the "
            'mean of noise and below, which map="A", a sum of features as they are, cannot show; give '
            'map="A_plus", or halves=False'
        )
    if picture == "auto":
        dense = "density" if cut.signed else "density_plus"
        picture = dense if kind == "element" else "A_plus"
    beta, steps, rate = (20.0, 30, 1.0) if kind == "element" else (5.0, 50, 0.5)
    beta = beta if given["beta"] is None else given["beta"]
    steps = steps if given["iterations"] is None else given["iterations"]
    rate = rate if given["learning_rate"] is None else given["learning_rate"]
    return _Settings(
        mode, kind, picture, given["weight"], beta, given["gamma"], steps, rate,
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
    counted = [name for name in (*positive, *NOT_NEGATIVE, "start") if numbers[name] is not None]
    wrong = [name for name in counted if not math.isfinite(numbers[name])]
    wrong += [name for name in positive if name in counted and numbers[name] <= 0]
    wrong += [name for name in NOT_NEGATIVE if numbers[name] < 0]
    wrong += ["samples"] if given["samples"] % 2 else []
    if wrong:
        raise RequestError(
            f"infocam: got {wrong[0]} {numbers[wrong[0]]}; expected finite numbers: {', '.join(positive)} "
            "above zero (without a beta, features of no effect would keep their gates), samples even (they "
            f"come in pairs), and {', '.join(NOT_NEGATIVE)} not negative"
        )


def _check_statistics(statistics: str | Path) -> None:
    """Refuse an unknown word. What has an ending or a folder is a file, and looked for when it is read."""
    from faithmap.errors import RequestError, nearest

    name = str(statistics)
    bare = Path(name).name == name and not Path(name).suffix
    if bare and name not in STATISTICS and not Path(name).is_file():
        raise RequestError(
            f"infocam: unknown statistics '{name}', and no such file; {nearest(name, STATISTICS)}"
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
    placed: Tensor = maps.unflatten(1, cut.layout.grid)
    return placed


def _shut(cut: Cut, features: Features, gates: Gates, chosen: _Settings) -> Tensor:
    """Bool (n,): of which images so little passes that their map is zero."""
    nats = gates.nats(features)[:, :, list(cut.layout.patches)]
    return nats.mean(2).sum(1) < chosen.min_nats


def _noted(batch: Batch, maps: Tensor, shut: Tensor) -> Tensor:
    """The maps, zero where the gates are shut; why one is zero everywhere is told."""
    filled = maps.masked_fill(shut.view(-1, 1, 1), 0.0)
    batch.note(shut, SHUT)
    batch.note(~shut & ~filled.flatten(1).any(1), ABSENT)
    return filled


def _shares(weights: Tensor) -> Tensor:
    """Weights (n, ...) divided by their sum; all zero where there are none."""
    total = weights.flatten(1).sum(1).view(-1, *[1] * (weights.ndim - 1))
    return weights / total.where(total > 0, total.new_ones(()))
