"""What runs on a CPU runs on a GPU and says the same there: maps, scores, fits, heads, commands."""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import tunings
from fits import KillAt, KilledError, typed
from torch import Tensor

import faithmap
from faithmap import conformance, finetuning, fitting, registry, training
from faithmap.batch import Batch
from faithmap.data import Shard, choose, load_dataset, make_batch, read_shard
from faithmap.explaining import bind, explain_batch, undefined
from faithmap.models import Model, load_model
from faithmap.records import Spec
from faithmap.stats import rank_correlation
from faithmap.store import KEY_COLUMNS

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("home", "_context_made"),
]

MODELS = ("shapes/resnet", "shapes/vit")
IMAGES = 3
#: The least rank correlation of a map made there with one made here. Rounding alone tells them apart.
LEAST = 0.99
#: Where it may be lower. The first steps of Adam go by the sign of a gradient: where that is about zero,
#: rounding decides between a step up and a step down, and the later steps go on from there.
LEAST_BY_STEPS = {"iba": 0.9, "infocam": 0.9, "mask": 0.9, "opti-cam": 0.9}
#: What an explainer is tried with beside the parameters that the conformance kit takes.
MORE: dict[str, list[dict[str, Any]]] = {
    "iba": [{"statistics": "image"}],
    "infocam": [{"statistics": "fitted"}, {"mode": "mean-field", "contexts": 2}],
    "lime": [{"fill": "blur"}],
    "rise": [{"space": "normalised"}],
    "scan": [{"weighting": "discounted"}, {"output": "error"}],
}


@pytest.fixture(scope="module")
def _context_made() -> None:
    """The first product of matrices in a backward pass may warn, once a process, that it makes a context."""
    weight = torch.ones(4, 4, device=DEVICE, requires_grad=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA")
        (weight @ weight).sum().backward()


@cache
def placed(name: str, device: str) -> Model:
    """An embedded model on a device; tests leave it as it is."""
    return load_model(name).to(device)


@cache
def predicted(name: str) -> tuple[int, ...]:
    """The classes that are explained of the images, the same everywhere."""
    return tuple(fresh_batch(name, "cpu").context.logits.argmax(1).tolist())


def fresh_batch(name: str, device: str) -> Batch:
    """Some shapes with all that is known of them, of which nothing has been computed yet."""
    model, dataset = placed(name, device), load_dataset(Spec("shapes"))
    read = read_shard(Shard(choose(dataset.samples, "dev", IMAGES), True), model)[0]
    return make_batch(read, model, "predicted", model.grid, 0, dataset.gives)


def images() -> Tensor:
    """The same images on the CPU."""
    return fresh_batch("shapes/resnet", "cpu").images


def maps_on(device: str, name: str, explainer: str, params: dict[str, Any]) -> Tensor:
    plugin, model = registry.get("explainer", explainer), placed(name, device)
    checked = plugin.check(params)
    fit = fitting.find(plugin, checked, model) if fitting.wants_fit(plugin, checked) else None
    batch = fresh_batch(name, device)
    batch = replace(batch, targets=torch.tensor(predicted(name), device=device))
    made = explain_batch(bind(plugin, checked, fit=fit), model, batch)
    assert set(made.status) <= {"ok", "empty"}, made.reasons
    return made.maps


def likeness(one: Tensor, two: Tensor) -> list[tuple[float, float]]:
    """Of each image: rank correlation, and the largest difference beside the range of the second map."""
    found = []
    for here, there in zip(one.detach().double().cpu(), two.detach().double().cpu(), strict=True):
        span = float(there.max() - there.min())
        apart = float((here - there).abs().max())
        share = apart / span if span else (0.0 if apart < 1e-6 else np.inf)
        found.append((float(rank_correlation(here.flatten(), there.flatten())), share))
    return found


def alike(one: Tensor, two: Tensor, least: float = LEAST) -> bool:
    """Whether all maps of two sets rank the pixels alike, or differ little."""
    return all(rank > least or share < 1e-2 for rank, share in likeness(one, two))


# Maps


def _tried() -> list[Any]:
    cases = []
    for plugin in registry.plugins("explainer"):
        # A decoder of the kit's width has no fit; those that ship are of the default one.
        cheap = {} if plugin.name == "scan" else dict(plugin.facts.check_params)
        for more in ({}, *MORE.get(plugin.name, ())):
            told = ",".join(f"{key}={value}" for key, value in more.items())
            label = f"{plugin.name}[{told}]" if told else plugin.name
            for name in MODELS:
                cases.append(pytest.param(plugin.name, {**cheap, **more}, name, id=f"{label}-{name[7:]}"))
    return cases


@pytest.mark.parametrize(("explainer", "params", "name"), _tried())
def test_a_map_is_that_of_the_cpu(explainer: str, params: dict[str, Any], name: str) -> None:
    plugin, gives = registry.get("explainer", explainer), load_dataset(Spec("shapes")).gives
    here, there = placed(name, "cpu"), placed(name, DEVICE)
    reason = undefined(plugin, here, gives, plugin.check(params))
    assert undefined(plugin, there, gives, plugin.check(params)) == reason
    if reason or (params.get("mode") == "mean-field" and here.family == "vit"):
        pytest.skip(reason or "this mode has one gate a channel, and is tried on maps")
    found, expected = maps_on(DEVICE, name, explainer, params), maps_on("cpu", name, explainer, params)
    assert found.device == there.device and found.shape == expected.shape
    assert bool(torch.isfinite(found).all())
    assert alike(found, expected, LEAST_BY_STEPS.get(explainer, LEAST)), likeness(found, expected)


@pytest.mark.parametrize("explainer", ["gradcam", "saliency", "scan"])
@pytest.mark.parametrize("name", MODELS)
def test_a_map_in_the_arithmetic_that_torch_starts_with(explainer: str, name: str) -> None:
    """Convolutions of fewer digits (TF32), torch's default, are no matter of maps; the setting stays."""
    before = torch.backends.cudnn.allow_tf32
    assert before, "torch's own default"
    found, expected = maps_on(DEVICE, name, explainer, {}), maps_on("cpu", name, explainer, {})
    assert alike(found, expected), likeness(found, expected)
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("name", MODELS)
def test_what_is_defined_is_defined_in_that_arithmetic_too(name: str) -> None:
    """Some explainers try beforehand whether sums are exact, or a layer a cut; TF32 must not decide that."""
    gives, reasons = load_dataset(Spec("shapes")).gives, {}
    for device in ("cpu", DEVICE):
        model = load_model(name).to(device)  # what is found out of a model may be kept beside it
        reasons[device] = {
            plugin.name: bool(undefined(plugin, model, gives)) for plugin in registry.plugins("explainer")
        }
    assert reasons[DEVICE] == reasons["cpu"]


@pytest.mark.parametrize("explainer", ["ablationcam", "deeplift", "fullgrad", "infocam"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_tried_of_a_network_comes_out_alike(explainer: str, name: str) -> None:
    """The same on a model that is new: the map itself is made, with TF32, and is like the CPU's."""
    plugin, model = registry.get("explainer", explainer), load_model(name).to(DEVICE)
    if undefined(plugin, placed(name, "cpu"), load_dataset(Spec("shapes")).gives):
        pytest.skip("not defined for this model")
    params = dict(plugin.facts.check_params)
    batch = fresh_batch(name, DEVICE)
    found = faithmap.explain(model, batch.images, list(predicted(name)), explainer, **params)
    expected = faithmap.explain(
        placed(name, "cpu"), batch.images.cpu(), list(predicted(name)), explainer, **params
    )
    least = LEAST_BY_STEPS.get(explainer, 0.95)
    assert bool(torch.isfinite(found).all()) and alike(found, expected, least), likeness(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_keeps_the_order_of_pixels(name: str) -> None:
    expected = maps_on(DEVICE, name, "gradcam", {})
    model = placed(name, DEVICE)
    model.precision = "bf16"
    try:
        found = maps_on(DEVICE, name, "gradcam", {})
    finally:
        model.precision = "fp32"
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert alike(found, expected, 0.9), likeness(found, expected)


def test_the_conformance_kit_passes_there() -> None:
    """It looks for what is left behind: hooks, random states, gradients, modes."""
    results = conformance.check_explainer("gradcam", {"there": placed("shapes/resnet", DEVICE)}, slow=False)
    assert not [(one.check, one.message) for one in conformance.failures(results)]


# Scores


def request_of(device: str, **run: Any) -> dict[str, Any]:
    metrics = [{"name": one.name, **one.facts.check_params} for one in registry.plugins("metric")]
    return {
        "run": {"limit": 6, "batch_size": 6, "own_nulls": [], "null_draws": 1, "device": device, **run},
        "models": [{"name": "shapes/resnet"}],
        "explainers": [{"name": name} for name in ("gradcam", "random-grid", "edges")],
        "datasets": [{"name": "shapes"}],
        "metrics": metrics,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, faithmap.Run]:
    """The same request, run here and there."""
    place, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    made = {
        name: faithmap.run(request_of(device), out=place / name, figures=False)
        for name, device in (("here", "cpu"), ("there", DEVICE))
    }
    torch.set_num_threads(threads)
    return made


@pytest.fixture(scope="module")
def both(runs: dict[str, faithmap.Run]) -> pd.DataFrame:
    """The rows of both runs side by side; memory is told of a GPU alone."""
    here, there = (rows[rows["metric"] != "peak_mb"] for rows in (runs[k].rows() for k in ("here", "there")))
    return here.merge(there, on=KEY_COLUMNS, suffixes=("_here", "_there"), how="outer", indicator=True)


@pytest.mark.parametrize("name", [plugin.name for plugin in registry.plugins("metric")])
def test_a_score_is_that_of_the_cpu(name: str, both: pd.DataFrame) -> None:
    """One prediction that flips at one of nine steps moves an area by 10 of 100: few rows may do so.

    All others differ by the rounding of maps (equal values ordered otherwise) and of probabilities, which
    is far below a hundredth of what the score takes on.
    """
    rows = both[both["spec"].str.split("/").str[0] == name]
    assert len(rows) and set(rows["_merge"]) == {"both"}
    assert list(rows["status_here"]) == list(rows["status_there"])
    assert not (rows["status_there"] == "failed").any()
    scored = rows[rows["status_there"] == "ok"]
    assert len(scored)
    for metric, part in scored.groupby("metric"):
        here, there = part["value_here"].to_numpy(), part["value_there"].to_numpy()
        if str(metric).startswith("ms_"):
            assert (there > 0).all()
            continue
        apart = np.abs(there - here) > 0.01 * max(np.abs(here).max(), 1e-3)
        allowed = 0.0 if metric in ("forwards", "backwards") else 0.15
        assert apart.mean() <= allowed, (metric, here[apart], there[apart])


def test_what_a_run_says_of_the_device(runs: dict[str, faithmap.Run]) -> None:
    done = runs["there"]
    assert done.manifest["settings"]["device"] == DEVICE
    assert torch.cuda.get_device_name() in done.manifest["gpu"]
    rows = done.rows()
    peaks = rows[(rows["metric"] == "peak_mb") & (rows["explainer"] == "gradcam")]
    assert len(peaks) and (peaks["status"] == "ok").all() and (peaks["value"] > 0).all()
    assert (done.leaderboard()["status"] == "ok").any()


def test_a_run_in_bf16(tmp_path: Path) -> None:
    request = {**request_of(DEVICE, precision="bf16", limit=4), "metrics": [{"name": "perturbation"}]}
    request["explainers"] = [{"name": name} for name in ("gradcam", "rise", "scan")]
    request["explainers"][1]["n_masks"] = 64
    rows = faithmap.run(request, out=tmp_path / "run", figures=False).rows()
    assert len(rows) and (rows["status"] == "ok").all()


# Fits


def only_fit(home: Path, explainer: str) -> fitting.Fit:
    (file,) = (home / "fitted" / explainer).glob("*.safetensors")
    return fitting.read(file)


def curve_of(file: Path) -> dict[str, list[float]]:
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scan_is_trained_and_serves_a_cpu(precision: str, home: Path) -> None:
    code, told = typed(
        "train", "scan[width=0.25]", "--model", "shapes/vit", "--dataset", "shapes[split=train,n=48]",
        "--set", "steps=12", "--set", "batch_size=16", "--device", DEVICE, "--precision", precision,
    )  # fmt: skip
    assert code == 0, told
    made = only_fit(home, "scan")
    assert made.path is not None
    losses = curve_of(made.path.with_suffix(".csv"))["loss"]
    assert len(losses) == 12 and np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert torch.device(made.record["device"]).type == DEVICE and made.record["precision"] == precision
    assert all(value.device.type == "cpu" for value in made.tensors().values())
    for device in ("cpu", DEVICE):
        maps = faithmap.explain(placed("shapes/vit", device), images(), explainer="scan", width=0.25)
        assert maps.device.type == device and bool(torch.isfinite(maps).all())


def scan_request(name: str) -> training.Training:
    plugin = registry.get("explainer", "scan")
    options = training.fit_options(plugin, {"steps": 8, "batch_size": 8})
    dataset = load_dataset(Spec("shapes", {"split": "train", "n": 40}))
    samples = choose(dataset.samples, "all", None)
    params = plugin.check({"width": 0.125})
    return training.Training(plugin, params, placed(name, DEVICE), dataset, samples, options)


@pytest.mark.parametrize("name", MODELS)
def test_a_fit_that_was_killed_goes_on(name: str, tmp_path: Path) -> None:
    whole = training.train(scan_request(name), out=tmp_path / "whole")
    with pytest.raises(KilledError):
        training.train(scan_request(name), KillAt(6), out=tmp_path / "killed", every=0.0)
    (kept,) = (tmp_path / "killed").glob("*.checkpoint")
    assert kept.stat().st_size
    resumed = training.train(scan_request(name), out=tmp_path / "killed")
    assert whole.path is not None and resumed.path is not None
    expected, found = (curve_of(fit.path.with_suffix(".csv")) for fit in (whole, resumed) if fit.path)
    assert found["step"] == expected["step"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    made = {}
    for device in ("cpu", DEVICE):
        code, told = typed(
            "train", "infocam[statistics=fitted]", "--model", name, "--dataset", "shapes[split=train,n=48]",
            "--device", device, "--out", tmp_path / device / "fit",
        )  # fmt: skip
        assert code == 0, told
        (file,) = (tmp_path / device / "fit").glob("*.safetensors")
        made[device] = fitting.read(file)
        assert torch.device(made[device].record["device"]).type == device
    expected, found = made["cpu"].tensors(), made[DEVICE].tensors()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-3 * float(value.abs().max())), key


# Heads and networks


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"epochs": 40, "lr": 0.01}, "fp32"),
        ({"epochs": 4, "train": "all", "lr": 3e-4, "balanced": True, "clip_grad": 1.0}, "fp32"),
        ({"epochs": 4, "train": "all", "lr": 3e-4}, "bf16"),
    ],
)
def test_a_model_is_tuned_and_serves_a_cpu(options: dict[str, Any], precision: str) -> None:
    request = tunings.asked(
        placed("shapes/resnet", DEVICE), n=48, precision=precision, options={"batch_size": 16, **options}
    )
    made = finetuning.finetune(request)
    assert torch.device(made.record["device"]).type == DEVICE
    assert made.path is not None
    losses = curve_of(made.path.with_suffix(".csv"))["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    if "train" not in options:  # a new head of a network that knows these classes; chance is 12.5
        assert made.record["test"]["accuracy"] > 50
    tuned = load_model("tuned/mine")
    expected = tuned(images())
    found = tuned.to(DEVICE)(images().to(DEVICE))
    assert torch.allclose(found.cpu(), expected, rtol=1e-2, atol=0.05)


# What people type and call


@pytest.mark.parametrize("name", MODELS)
def test_one_image_is_drawn(name: str, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "figure.png"
    code, told = typed(
        "explain", photo, "--model", name, "--explainers", "gradcam,scan,edges", "--out", out,
        "--device", DEVICE,
    )  # fmt: skip
    assert code == 0, told
    assert out.stat().st_size > 1000


@pytest.mark.parametrize("given", ["cpu", DEVICE])
@pytest.mark.parametrize("name", MODELS)
def test_images_may_lie_on_either_side(name: str, given: str) -> None:
    """Maps come where the model is; truths are taken from wherever they lie."""
    model, batch = placed(name, DEVICE), fresh_batch(name, "cpu")
    assert batch.masks is not None and batch.boxes is not None and batch.labels is not None
    shown = batch.images.to(given)
    for targets in (None, [0, 1, 2], torch.tensor([0, 1, 2], device=given)):
        maps = faithmap.explain(model, shown, targets, "gradcam")
        assert maps.device == model.device and bool(torch.isfinite(maps).all())
    pictures = faithmap.reconstruct(model, shown)
    assert pictures.device == model.device and pictures.shape == shown.shape
    for made in (maps, maps.cpu()):
        table = faithmap.score(
            model, shown, made, metrics=["perturbation", "pointing-game", "energy-pointing-game", "road"],
            labels=batch.labels.to(given), masks=batch.masks.to(given),
            boxes=[box.to(given) for box in batch.boxes],
        )  # fmt: skip
        assert len(table) and not (table["status"] == "failed").any()


def test_the_device_is_told() -> None:
    code, told = typed("doctor")
    assert code == 0 and f"{DEVICE}:0" in told and torch.cuda.get_device_name(0) in told
