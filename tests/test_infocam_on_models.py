"""InfoCAM on the embedded models: whose evidence it shows, and that it follows the head's weights."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import explain
from planted_channels import fitted
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

import faithmap
from faithmap import registry, streams
from faithmap.batch import Batch
from faithmap.bottleneck import fit_statistics, load_statistics
from faithmap.context import Context
from faithmap.cuts import cut_at, tail_of
from faithmap.data import load_dataset
from faithmap.models import Model
from faithmap.records import Spec
from faithmap.stream_bounds import belief_divergence
from faithmap.transforms import prepare

pytestmark = pytest.mark.slow


def pictures(model: Model, **params: object) -> tuple[list[str], Tensor]:
    """Ids and images of `shapes`."""
    samples = load_dataset(Spec("shapes", params)).samples
    return [s.id for s in samples], torch.stack([prepare(s, model.transform).image for s in samples])


def two_objects(model: Model, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images whose two objects are the model's first two guesses, with classes and masks (n, 2, ...)."""
    knobs = {"objects": 2, "difficulty": 0.2}
    ids, images = pictures(model, n=64, **knobs)
    describe = importlib.import_module("faithmap.datasets.shapes").describe
    told = [describe(name, **knobs)["objects"] for name in ids]
    classes = torch.tensor([[thing["label"] for thing in things] for things in told])
    masks = torch.stack(
        [torch.stack([torch.as_tensor(thing["mask"]) for thing in things]) for things in told]
    )
    with torch.no_grad():
        guesses = model(images).topk(2).indices
    kept = (guesses.sort().values == classes.sort().values).all(1).nonzero()[:most, 0]
    return images[kept], classes[kept], masks[kept]


@pytest.mark.parametrize(
    ("name", "least"), [("shapes/resnet", 0.9), pytest.param("shapes/vit", 0.7, marks=pytest.mark.long)]
)
def test_of_two_objects_each_class_has_its_own(name: str, least: float) -> None:
    model = faithmap.load_model(name)
    images, classes, masks = two_objects(model, most=8)
    assert len(images) == 8
    own, other = [], []
    for one, two in ((0, 1), (1, 0)):
        found = faithmap.explain(model, images, classes[:, one], explainer="infocam")
        maps = F.interpolate(found[:, None], size=images.shape[2:], mode="bilinear")[:, 0].clamp_min(0)
        for energy, of in ((own, one), (other, two)):
            energy.append((maps * masks[:, of]).sum((1, 2)) / maps.sum((1, 2)))
    mine, others = torch.cat(own), torch.cat(other)
    assert float((mine > others).float().mean()) >= least
    assert float(mine.mean()) > 2 * float(others.mean())


def test_weights_follow_a_shuffled_head_and_lie_where_it_reads() -> None:
    """Of the channels that are active, others carry the class, and the weight moves to them."""
    weights, active = {}, torch.empty(0)
    for shuffled in (False, True):
        model = faithmap.load_model("shapes/resnet")
        head = [module for module in model.module.modules() if isinstance(module, nn.Linear)][-1]
        if shuffled:
            order = torch.randperm(head.weight.numel(), generator=torch.Generator().manual_seed(0))
            head.weight.data = head.weight.data.flatten()[order].view_as(head.weight)
        ids, images = pictures(model, n=8)
        targets = torch.arange(8)
        batch = Batch(images=images, targets=targets, ids=tuple(ids), context=Context(model, images))
        features, gates = fitted(model, batch)
        nats = gates.nats(features).mean(2)
        weights[shuffled] = nats / nats.sum(1, keepdim=True)
        means = batch.activations(model.target_layer).mean((2, 3))
        speaks_for = (head.weight.detach()[targets] - head.weight.detach().mean(0)) * means > 0
        on_them = (weights[shuffled] * speaks_for).sum(1)
        assert float(on_them.min()) > 0.9
        active = means > 1e-4
    ranks = [spearmanr(weights[False][i, active[i]], weights[True][i, active[i]])[0] for i in range(8)]
    assert sum(ranks) / 8 < 0.4


def with_masks(model: Model, count: int) -> Batch:
    """Images of `shapes` with their labels as targets and a mask of the object."""
    samples = load_dataset(Spec("shapes", {"n": count})).samples
    prepared = [prepare(sample, model.transform) for sample in samples]
    images = torch.stack([one.image for one in prepared])
    masks = torch.stack([torch.as_tensor(one.mask) for one in prepared])
    labels, ids = torch.tensor([sample.label for sample in samples]), tuple(s.id for s in samples)
    return Batch(images, labels, ids, Context(model, images), labels=labels, masks=masks)


def noise_file(model: Model, layer: str, folder: Path) -> str:
    """Statistics of a layer over 64 images of the train split."""
    _, images = pictures(model, n=64, split="train")
    return str(fit_statistics(model, [images], layer).save(folder / "statistics.safetensors"))


def infocam(model: Model, batch: Batch, **params: Any) -> Tensor:
    """Maps whose seeds do not depend on where the statistics lie."""
    maps: Tensor = registry.get("explainer", "infocam").make(params)(model, batch)
    return maps


def energies(batch: Batch, maps: Tensor) -> Tensor:
    """Share of the positive part of each map that lies on the object; none where nothing is positive."""
    assert batch.masks is not None
    positive = F.interpolate(maps[:, None], size=batch.size, mode="bilinear")[:, 0].clamp_min(0)
    return (positive * batch.masks).sum((1, 2)) / positive.sum((1, 2)).clamp_min(1e-12)


def surely_above(one: Tensor, two: Tensor) -> bool:
    """Whether a paired difference is above two standard errors."""
    difference = one - two
    return float(difference.mean()) > 2 * float(difference.std()) / len(difference) ** 0.5


def test_at_the_last_layer_the_weights_find_the_object(tmp_path: Path) -> None:
    """Energy on the object beside Score-CAM and equal weights, at the last layer of a CNN.

    The prototype that the reconstruction was tried on had both maps above Score-CAM (by .02 and .08).
    Here, on 64 images, "A" is below it (.204 to .236; paired -.032, standard error .005) and "A_plus" level
    with it (.239). Both gain over equal weights (.154 and .210).
    """
    model = faithmap.load_model("shapes/resnet")
    batch = with_masks(model, 24)
    file, features = noise_file(model, "layer4", tmp_path), batch.activations("layer4")
    mean = load_statistics(file, model, "layer4").mean.mean((1, 2)).view(1, -1, 1, 1)
    equal = {"A": features.mean(1), "A_plus": (features - mean).clamp_min(0).mean(1)}
    found = {name: energies(batch, infocam(model, batch, statistics=file, map=name)) for name in equal}
    for name, maps in equal.items():
        assert surely_above(found[name], energies(batch, maps))
    assert surely_above(found["A_plus"], found["A"])
    rival = energies(batch, explain("scorecam", model, batch))
    assert abs(float((found["A_plus"] - rival).mean())) < 0.04


@pytest.mark.long
def test_before_the_last_layer_elements_tell_more_than_channels(tmp_path: Path) -> None:
    """On 8 images, about: density .62, channels .47, equal weights .42, Score-CAM .48."""
    model = faithmap.load_model("shapes/resnet")
    batch = with_masks(model, 8)
    file, features = noise_file(model, "layer3", tmp_path), batch.activations("layer3")
    mean = load_statistics(file, model, "layer3").mean.mean((1, 2)).view(1, -1, 1, 1)
    params = {"layer": "layer3", "statistics": file, "samples": 4}
    elements = energies(batch, infocam(model, batch, mode="element", iterations=15, **params))
    channels = energies(batch, infocam(model, batch, mode="channel", iterations=25, **params))
    assert surely_above(elements, channels)
    assert surely_above(elements, energies(batch, (features - mean).clamp_min(0).mean(1)))


def test_elements_of_a_transformer_find_the_object(tmp_path: Path) -> None:
    """On 24 images: .73, without the noise stream .65, Score-CAM .59, equal weights .16.

    Without the noise stream three maps are blank: the class token alone tells their class, and nothing asks
    patches for it too. That is all the difference; on the other images the energy is no lower without it.
    """
    model = faithmap.load_model("shapes/vit")
    batch, layer = with_masks(model, 24), cut_at(model).layer
    file = noise_file(model, layer, tmp_path)
    both, one = (
        infocam(model, batch, statistics=file, gamma=gamma, iterations=20, samples=4) for gamma in (1.0, 0.0)
    )
    seen = one.flatten(1).any(1)
    assert bool(both.flatten(1).any(1).all()) and 1 <= int((~seen).sum()) <= 8
    ours, without = energies(batch, both), energies(batch, one)
    assert float((ours - without).mean()) > 0.02  # a blank map has no energy on the object
    assert abs(float((ours - without)[seen].mean())) < 0.1
    assert float((ours - energies(batch, explain("scorecam", model, batch))).mean()) > 0.05
    mean = load_statistics(file, model, layer).mean.mean((1, 2)).view(1, -1, 1, 1)
    assert surely_above(ours, energies(batch, (batch.activations(layer) - mean).abs().mean(1)))


def test_a_class_token_that_is_left_open_leaks(tmp_path: Path) -> None:
    """What the noise stream tells of the class: .10 nat with a gate at the class token, .19 without one."""
    model = faithmap.load_model("shapes/vit")
    batch, cut = with_masks(model, 8), cut_at(model)
    file = noise_file(model, cut.layer, tmp_path)
    features = streams.with_noise(
        model, cut, batch.context.outputs(cut.layer), batch.targets, file, min_std=0.01, min_active=0.01
    )
    tail, rows = tail_of(model, cut), list(cut.layout.prefix)
    mean, std = features.mean.clone(), features.std.clone()
    mean[:, :, rows], std[:, :, rows] = features.values[:, :, rows], 1e-6  # its "noise" is itself

    def generators(first: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(first + i) for i in range(len(batch))]

    prior = streams.prior_odds(tail, features, generators(0), 16, 64)
    told = []
    for here in (features, replace(features, mean=mean, std=std)):
        gates = streams.optimised(
            tail, here, streams.Gates.start("element", here, 0.0), generators(100), beta=20.0, gamma=1.0,
            iterations=20, samples=4, learning_rate=1.0, prior=prior, chunk=64,
        )  # fmt: skip
        noise = streams.signed_pairs(generators(200), (1, 16, *tail.shape), here.values)
        centre, spread = gates.streams(here)
        with torch.no_grad():
            odds = streams.noisy_odds(tail, centre[:, 1], spread[:, 1], noise[:, 0], here.targets, 64)
        told.append(float(belief_divergence(odds, prior[:, None]).mean()))
    assert told[1] > 1.4 * told[0] > 0
