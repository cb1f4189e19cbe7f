"""InfoCAM on the embedded models: whose evidence it shows, and that it follows the head's weights."""

from __future__ import annotations

import importlib

import pytest
import torch
from planted_channels import fitted
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

import faithmap
from faithmap.batch import Batch
from faithmap.context import Context
from faithmap.data import load_dataset
from faithmap.models import Model
from faithmap.records import Spec
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


@pytest.mark.parametrize(("name", "least"), [("shapes/resnet", 0.9), ("shapes/vit", 0.7)])
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
