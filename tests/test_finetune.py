"""`faithmap finetune`: heads of any network, what is learnt and kept, fits that go on."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import typed
from torch import Tensor, nn
from tunings import ORDER, asked

from faithmap import finetuning, kept_features, tuned, tuning_options
from faithmap.errors import DataError, FaithmapError, RequestError
from faithmap.finetuning import Outcome
from faithmap.heads import find_head, logits_of, put_head
from faithmap.models import Model, load_model
from faithmap.records import Sample
from faithmap.training import Silent, TrainingData

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def resnet() -> Model:
    return load_model("shapes/resnet")


# Heads


HEADS: list[Any] = [
    ("timm/test_vit", {"img_size": 32, "patch_size": 4}, 32, ("head",), True),
    ("timm/resnetv2_50", {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16)}, 32, ("head.fc",), True),
    ("timm/deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1}, 32, ("head", "head_dist"), True),
    ("timm/convnext_atto", {}, 32, ("head.fc",), True),
    ("torchvision/resnet18", {}, 32, ("fc",), True),
    ("torchvision/squeezenet1_1", {}, 64, ("classifier.1",), False),
    ("shapes/convnext", {}, None, ("head.fc",), True),
]


@pytest.mark.parametrize(("name", "kwargs", "side", "layers", "direct"), HEADS)
def test_the_head_is_found_and_replaced(
    name: str, kwargs: dict[str, Any], side: int | None, layers: tuple[str, ...], direct: bool
) -> None:
    torch.manual_seed(0)
    sized = {"input_size": side, "kwargs": kwargs} if side else {}
    model = load_model(name, pretrained=False, **sized)
    images = torch.rand(2, 3, *model.input_size)
    head = find_head(model.module, images)
    assert (head.layers, head.direct) == (layers, direct)
    put_head(model.module, head.layers, 3, seed=1)
    first = [model.module.get_submodule(layer).weight.detach().clone() for layer in layers]
    assert model(images).shape == (2, 3)
    assert all(float(weight.std()) == pytest.approx(0.01, rel=0.3) for weight in first)
    put_head(model.module, head.layers, 3, seed=1)
    again = [model.module.get_submodule(layer).weight for layer in layers]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_kept_inputs_give_the_networks_logits() -> None:
    from faithmap.heads import Taps

    kwargs = {"img_size": 32, "depth": 1}
    model = load_model("timm/deit_tiny_distilled_patch16_224", pretrained=False, input_size=32, kwargs=kwargs)
    images = torch.rand(2, 3, 32, 32)
    layers = ("head", "head_dist")
    with torch.no_grad(), Taps(model.module, layers) as taps:
        logits = model(images)
    given = logits_of([model.module.get_submodule(name) for name in layers], taps.inputs)
    assert torch.allclose(given, logits, atol=1e-6)
    assert not model.module.head._forward_pre_hooks


class Upside(nn.Module):
    """A hidden layer has as many units as there are classes, and the logits are no layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.norm(self.first(images.mean((2, 3))))
        return logits


def test_a_network_without_a_linear_end_is_refused() -> None:
    model = Model(Upside(), mean=0.5, std=0.5, input_size=8, name="upside")
    with pytest.raises(RequestError, match="model 'upside': no layer of the network gives its logits"):
        _ = asked(model).head


# What is learnt


def test_a_head_learns_while_the_network_stays(resnet: Model) -> None:
    before = resnet.weights_digest()
    made = finetuning.finetune(asked(resnet, n=48, options={"epochs": 40, "lr": 0.01}))
    assert made.record["test"]["accuracy"] > 75  # chance is 12.5
    learnt, first = made.tensors(), load_model("shapes/resnet").module.state_dict()
    changed = [name for name in first if not torch.equal(first[name].float(), learnt[name])]
    assert set(changed) == {"fc.weight", "fc.bias"}
    resnet._weights_digest = ""
    assert resnet.weights_digest() == before
    assert made.record["last"]["loss"] < made.record["options"]["lr"] * 100


def test_kept_features_teach_what_whole_passes_do(resnet: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = finetuning.finetune(asked(resnet)).tensors()
    monkeypatch.setattr(finetuning, "keep", None)  # must not be used
    whole = asked(resnet)
    head = replace(whole.head, direct=False)
    object.__setattr__(whole, "head", head)
    passed = finetuning.finetune(whole, fresh=True).tensors()
    assert kept.keys() == passed.keys()
    assert all(torch.allclose(kept[name], passed[name], atol=1e-5) for name in kept)


def test_a_head_of_one_epoch_is_gradient_descent(resnet: Model) -> None:
    """Plain SGD on kept features equals steps written out."""
    options = {"optimizer": "momentum", "momentum": 0.0, "lr": 0.1, "weight_decay": 0.0, "schedule": "none"}
    request = asked(resnet, options={**options, "epochs": 1})
    learnt = finetuning.finetune(request).tensors()
    data = TrainingData(request.samples, resnet, 0)
    module = load_model("shapes/resnet").module
    put_head(module, ("fc",), 8, finetuning.seed_of(0, "head") % 2**31)
    weight, bias = module.fc.weight.detach().double(), module.fc.bias.detach().double()
    module.fc = nn.Identity()
    for images, labels in data.batches(5, 0):
        with torch.no_grad():
            features = module(resnet.normalise(images)).double()
        error = (features @ weight.T + bias).softmax(1) - nn.functional.one_hot(labels, 8)
        weight = weight - 0.1 * error.T @ features / len(labels)
        bias = bias - 0.1 * error.mean(0)
    assert torch.allclose(learnt["fc.weight"].double(), weight, atol=1e-5)
    assert torch.allclose(learnt["fc.bias"].double(), bias, atol=1e-5)


def test_all_learns_everywhere(resnet: Model) -> None:
    made = finetuning.finetune(asked(resnet, n=12, options={"train": "all", "epochs": 1}))
    learnt, first = made.tensors(), load_model("shapes/resnet").module.state_dict()
    parameters = {name for name, _ in resnet.module.named_parameters()} - {"fc.weight", "fc.bias"}
    assert all(not torch.equal(first[name], learnt[name]) for name in parameters)
    assert made.record["options"]["augment"] == "crop"


@pytest.mark.parametrize("schedule", tuning_options.SCHEDULES)
def test_every_schedule_of_timm_is_followed(schedule: str) -> None:
    options = tuning_options.finetune_options({"schedule": schedule, "lr": 0.1, "epochs": 4})
    optimizer = tuning_options.make_optimizer(nn.Linear(2, 2), options)
    scheduler = tuning_options.make_scheduler(optimizer, options, 5)
    rates = []
    for step in range(1, 21):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        if scheduler is not None:
            scheduler.step_update(step)
    assert rates[0] == pytest.approx(0.1)
    assert (rates[-1] == rates[0]) == (schedule in ("constant", "none"))
    if schedule == "cosine":
        closed = [0.1 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
        assert rates == pytest.approx(closed)


@pytest.mark.parametrize("optimizer", ["sgd", "lamb", "lookahead_adamw", "lion", "muon"])
def test_optimisers_of_timm_go_by_name(resnet: Model, optimizer: str) -> None:
    made = finetuning.finetune(asked(resnet, options={"optimizer": optimizer, "epochs": 1}))
    assert made.record["options"]["optimizer"] == optimizer


def test_each_class_counts_alike_where_that_is_asked_for(resnet: Model) -> None:
    samples = [Sample(id=str(i), image="", label=label) for i, label in enumerate([0, 0, 0, 2])]
    request = replace(asked(resnet), samples=tuple(samples))
    weights = finetuning._class_weights(request)
    assert weights[:3].tolist() == pytest.approx([4 / 6, 0.0, 2.0])
    assert float(weights[torch.tensor([0, 0, 0, 2])].mean()) == pytest.approx(1.0)


def test_images_are_varied_by_seed_within_the_image() -> None:
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32)

    def varied(how: str, seed: int = 0) -> Tensor:
        return tuning_options.augmented(ramp, how, torch.Generator().manual_seed(seed))

    assert torch.equal(varied("none"), ramp)
    flipped = varied("flip")
    mirrored = [torch.equal(image, ramp[0].flip(2)) for image in flipped]
    assert 16 < sum(mirrored) < 48
    assert all(m or torch.equal(image, ramp[0]) for m, image in zip(mirrored, flipped, strict=True))
    cropped = varied("crop")
    assert torch.equal(cropped, varied("crop")) and not torch.equal(cropped, varied("crop", 1))
    # A crop of a ramp is a ramp, up or down, of 0.5 to 1 of its steepness.
    slopes = (cropped[:, 0, 16, 24] - cropped[:, 0, 16, 8]) / (ramp[0, 0, 0, 24] - ramp[0, 0, 0, 8])
    assert bool((slopes.abs() <= 1.0001).all()) and bool((slopes.abs() >= 0.5).all())
    assert bool((slopes > 0).any()) and bool((slopes < 0).any())


# How well it went


def test_balanced_accuracy_is_the_mean_recall() -> None:
    hits, counts = [9, 1, 0, 0], [10, 4, 0, 1]
    figures = Outcome(torch.tensor(hits), torch.tensor(counts)).figures
    recalls = [hit / count for hit, count in zip(hits, counts, strict=True) if count]
    assert figures["balanced_accuracy"] == pytest.approx(100 * np.mean(recalls), abs=1e-3)
    assert figures["accuracy"] == pytest.approx(100 * 10 / 15, abs=1e-3)
    # Wilson's interval of 10 of 15, by its formula.
    z, n, p = 1.959964, 15, 10 / 15
    centre, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    ends = [100 * (centre + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert [figures["accuracy_low"], figures["accuracy_high"]] == pytest.approx(ends, abs=1e-3)
    one = Outcome(torch.tensor([7]), torch.tensor([9])).figures
    assert one["balanced_accuracy_low"] == pytest.approx(one["accuracy_low"])


def test_the_interval_covers_what_it_should() -> None:
    generator = torch.Generator().manual_seed(0)
    counts, truth = torch.tensor([40, 15, 60]), torch.tensor([0.9, 0.6, 0.97])
    covered = 0
    for _ in range(300):
        hits = torch.tensor([
            int((torch.rand(int(n), generator=generator) < p).sum())
            for n, p in zip(counts, truth, strict=True)
        ])  # fmt: skip
        found = Outcome(hits, counts).figures
        mean = 100 * float(truth.mean())
        covered += found["balanced_accuracy_low"] <= mean <= found["balanced_accuracy_high"]
    assert 0.91 < covered / 300 < 0.995


def test_the_record_counts_what_was_recognised(resnet: Model) -> None:
    request = asked(resnet)
    made = finetuning.finetune(request)
    test = made.record["test"]
    model = load_model("tuned/mine")
    hits = 0
    for images, labels in TrainingData(request.test_samples, model, 0).batches(64, 0):
        hits += int((model(images).argmax(1) == labels).sum())
    assert sum(test["hits"]) == hits and sum(test["counts"]) == test["images"] == len(request.test_samples)
    assert test["hold_out"] is None and made.record["data"]["images"] == len(request.samples)


def test_another_test_does_not_learn_again(resnet: Model) -> None:
    first = finetuning.finetune(asked(resnet))
    other = replace(asked(resnet), test_samples=asked(resnet).test_samples[:2])
    second = finetuning.finetune(other)
    assert (second.path, second.digest) == (first.path, first.digest)
    assert second.record["created"] == first.record["created"]
    assert second.record["test"]["images"] == 2


# Interruptions


class KilledError(BaseException):
    """Stands in for a kill."""


class KillAt(Silent):
    """Kills at a step of a phase: "features", "test" or the fit itself ("tuned")."""

    def __init__(self, at: int, phase: str = "tuned", signalled: bool = False) -> None:
        self.at, self.phase, self.signalled, self.now = at, phase, signalled, ""

    def begin(self, title: str, steps: int, done: int) -> None:
        self.now = title

    def step(self, step: int, values: Any) -> None:
        if step == self.at and self.now.startswith(self.phase):
            if self.signalled:
                signal.raise_signal(signal.SIGINT)
            else:
                raise KilledError


MANNERS: list[dict[str, Any]] = [
    {},
    {"augment": "crop", "label_smoothing": 0.1},
    {"train": "all", "optimizer": "lookahead_adamw", "warmup_epochs": 1},
]


@pytest.mark.parametrize("options", MANNERS)
@pytest.mark.parametrize("at", [1, 4])
def test_it_goes_on_to_the_same_weights(resnet: Model, options: dict[str, Any], at: int) -> None:
    request = asked(resnet, n=12, options={"batch_size": 4, **options})
    with pytest.raises(KilledError):
        finetuning.finetune(request, KillAt(at), every=0.0)
    resumed = finetuning.finetune(request, every=0.0)
    assert resumed.path is not None
    curve = resumed.path.with_suffix(".csv").read_text()
    assert not list(tuned.folder().glob("*.checkpoint")) and not list(tuned.folder().glob("*.features"))
    whole = finetuning.finetune(request, fresh=True)
    assert resumed.digest == whole.digest
    assert curve == resumed.path.with_suffix(".csv").read_text()


def test_features_are_kept_over_a_kill(resnet: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_features, "SHARD", 5)
    request = asked(resnet)
    with pytest.raises(KilledError):
        finetuning.finetune(request, KillAt(2, "features"))
    (shelf,) = tuned.folder().glob("*.features")
    assert len(list(shelf.glob("*.safetensors"))) == 1
    resumed = finetuning.finetune(request)
    assert finetuning.finetune(request, fresh=True).digest == resumed.digest


def test_a_broken_file_of_features_is_computed_anew(resnet: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_features, "SHARD", 5)
    request = asked(resnet)
    with pytest.raises(KilledError):
        finetuning.finetune(request, KillAt(2))
    for place, file in enumerate(sorted(request.file.with_suffix(".features").glob("*.safetensors"))):
        file.write_bytes(file.read_bytes()[: 100 * place])
    resumed = finetuning.finetune(request)
    assert finetuning.finetune(request, fresh=True).digest == resumed.digest


def lost() -> Any:
    raise DataError("lost.png: no such file")


@pytest.mark.parametrize("train", ["head", "all"])
def test_images_that_cannot_be_read_are_remembered_over_a_kill(resnet: Model, train: str) -> None:
    request = asked(resnet, n=12, options={"batch_size": 2, "train": train})
    broken = tuple(replace(sample, image=lost) for sample in request.samples[:2])
    request = replace(request, samples=(*broken, *request.samples[2:]))
    whole = finetuning.finetune(request)
    assert whole.path is not None
    last = int(whole.path.with_suffix(".csv").read_text().splitlines()[-1].split(",")[0])
    with pytest.raises(KilledError):
        finetuning.finetune(request, KillAt(last), fresh=True, every=0.0)
    resumed = finetuning.finetune(request, every=0.0)
    assert resumed.record["data"] == whole.record["data"]
    assert resumed.record["data"]["unreadable_ids"] == sorted(sample.id for sample in broken)


def test_a_checkpoint_of_something_else_is_refused(resnet: Model) -> None:
    request = asked(resnet, options={"train": "all"})
    with pytest.raises(KilledError):
        finetuning.finetune(request, KillAt(3), every=0.0)
    file = request.file.with_suffix(".checkpoint")
    held = torch.load(file, weights_only=True)
    held["state"]["learning"].popitem()
    torch.save(held, file)
    with pytest.raises(FaithmapError, match=r"checkpoint .* is damaged \(RuntimeError\); .* --fresh"):
        finetuning.finetune(request)


@pytest.mark.parametrize("phase", ["features", "tuned"])
def test_ctrl_c_stops_with_what_there_is(resnet: Model, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    monkeypatch.setattr(kept_features, "FORWARD", 4)
    request = asked(resnet)
    with pytest.raises(KeyboardInterrupt):
        finetuning.finetune(request, KillAt(1, phase, signalled=True))
    assert not request.file.exists()
    assert request.file.with_suffix(".checkpoint").exists() == (phase == "tuned")
    assert finetuning.finetune(request).record["test"]["images"] == len(request.test_samples)


def test_a_kill_during_the_test_costs_the_test_alone(resnet: Model) -> None:
    request = asked(resnet)
    with pytest.raises(KilledError):
        finetuning.finetune(request, KillAt(1, "test"))
    assert "test" not in tuned.read(request.file).record
    made = finetuning.finetune(request, KillAt(1, "tuned"))  # would be killed if it learnt again
    assert made.record["test"]["images"] == len(request.test_samples)


SLOW_FIT = """
import sys, time
from faithmap import training
inner = training.Session.report
def report(self, step, steps, values):
    inner(self, step, steps, values)
    time.sleep(0.1)
training.Session.report = report
from faithmap import cli, finetuning
real = finetuning.finetune
finetuning.finetune = lambda *a, **k: real(*a, **k, every=0.0)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_it_survives_kill_9(home: Path) -> None:
    words = ["finetune", *ORDER, "--set", "batch_size=4"]
    command = [sys.executable, "-c", SLOW_FIT, *words]
    with subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not list((home / "models").glob("*.checkpoint")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not list((home / "models").glob("*.safetensors"))
    code, said = typed(*words)
    assert code == 0, said
    (curve,) = (home / "models").glob("*.csv")
    resumed = list(csv.DictReader(curve.read_text().splitlines()))
    code, said = typed(*words, "--fresh")
    assert code == 0, said
    whole = list(csv.DictReader(curve.read_text().splitlines()))
    assert [line["step"] for line in resumed] == [line["step"] for line in whole]
    for one, two in zip(resumed, whole, strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), abs=1e-6)
