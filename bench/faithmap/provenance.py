"""What a manifest says of the circumstances of a run: versions, commit, device, plugins."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import faithmap
from faithmap.data import LoadedDataset, traces
from faithmap.fitting import Fit
from faithmap.models import Model
from faithmap.plan import ExplainerUse, Grid
from faithmap.records import OF_THE_LINE
from faithmap.scoring import MetricUse

LIBRARIES = (
    "torch", "torchvision", "timm", "captum", "grad-cam", "numpy", "scipy", "pillow",
    "pandas", "pyarrow",
)  # fmt: skip


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries whose arithmetic a run depends on."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def gpu(device: str | torch.device) -> dict[str, str]:
    """The card behind a CUDA device and the CUDA that it is spoken to with; nothing for other devices."""
    if torch.device(device).type != "cuda":
        return {}
    return {"gpu": f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"}


def cpu() -> str:
    """The processor's name; empty where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor()


def checkout() -> Path | None:
    """The checkout that holds the imported package, or None when it is an installed copy."""
    root = Path(faithmap.__file__).resolve().parents[2]
    return root if (root / "bench" / "faithmap").is_dir() else None


def git_state(root: Path | None) -> dict[str, Any]:
    """Commit and dirtiness of a checkout; None for both where there is none."""
    state: dict[str, Any] = {"commit": None, "dirty": None}
    if root is None:
        return state
    try:
        state["commit"] = _git(root, "rev-parse", "HEAD")
        state["dirty"] = bool(_git(root, "status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return state


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def command_line() -> str:
    """The command that runs, as it would be typed; empty outside the command line."""
    if Path(sys.argv[0]).stem not in ("faithmap", "__main__"):
        return ""
    return shlex.join(["faithmap", *sys.argv[1:]])


def describe_model(model: Model) -> dict[str, Any]:
    """A model's entry in the manifest."""
    mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
    return {
        "digest": model.digest(),
        "family": model.family,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": model.num_classes,
        "input_size": list(model.input_size),
        "crop_pct": model.transform.crop_pct,
        "interpolation": model.transform.interpolation,
        "mean": [round(value, 6) for value in mean],
        "std": [round(value, 6) for value in std],
        "target_layer": model.target_layer,
        "grid": list(model.grid),
    }


def describe_dataset(dataset: LoadedDataset, images: int) -> dict[str, Any]:
    """A dataset's entry in the manifest; `unreadable` is set when the run is over."""
    facts = dataset.plugin.facts
    return {
        "name": dataset.plugin.name,
        "version": facts.version,
        "revision": dataset.revision,
        "license": facts.license,
        "source": facts.source,
        "gives": sorted(dataset.gives),
        "images": images,
        "available": len(dataset.samples),
        "unreadable": 0,
    }


def describe_explainer(use: ExplainerUse, grid: Grid) -> dict[str, Any]:
    """An explainer's entry in the manifest."""
    facts = use.plugin.facts
    fits = {name: describe_fit(fit, grid) for name, fit in use.fits.items()}
    entry = {
        "name": use.plugin.name,
        "params": use.params,
        "version": facts.version,
        "role": facts.role,
        "source": facts.source,
        "class_specific": facts.class_specific,
        "file_sha256": use.plugin.file_sha256(),
        "built_in": use.plugin.built_in,
        "reliable": True,
    }
    return {**entry, "fits": fits} if fits else entry


def describe_fit(fit: Fit, grid: Grid) -> dict[str, Any]:
    """What an explainer has learnt of a model, in the manifest; `scored_too` names datasets of both."""
    record = fit.record
    return {
        "key": fit.key,
        "digest": fit.digest,
        "fit_images": record.get("data", {}).get("images", 0),
        "fit_seconds": record.get("seconds", 0.0),
        "params_added": record.get("params_added", 0),
        "scored_too": _scored_too(record, grid),
        "record": _told(record),
    }


def describe_tuned(model: Model, grid: Grid) -> dict[str, Any]:
    """How a model was fine-tuned, in the manifest; `scored_too` names datasets that it has learnt from."""
    if not model.tuned:
        return {}
    return {"tuned": {"scored_too": _scored_too(model.tuned, grid), "record": _told(model.tuned)}}


def _scored_too(record: Mapping[str, Any], grid: Grid) -> list[str]:
    """Datasets of which images that are scored here were learnt from."""
    data = record.get("data", {})
    seen = set(data.get("ids", ()))
    return [
        dataset.label
        for dataset, chosen in grid.datasets
        if seen and not seen.isdisjoint(traces(dataset, chosen))
    ]


def _told(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the command, which may name folders of the machine, and without ids."""
    kept = {key: value for key, value in record.items() if key not in ("command", "data", "base")}
    data = {key: value for key, value in record.get("data", {}).items() if not key.endswith("ids")}
    return {**kept, "data": data}


def describe_metric(use: MetricUse) -> dict[str, Any]:
    """A metric's entry in the manifest."""
    facts = use.facts
    return {
        "name": use.plugin.name,
        "version": facts.version,
        "params": use.params,
        "spec": use.spec,
        "variant": use.variant,
        "file_sha256": use.plugin.file_sha256(),
        "built_in": use.plugin.built_in,
        "source": facts.source,
        "scores": use.scores,
        "fallback": {
            use.title(score): use.title(other) if other else "" for score, other in facts.fallback.items()
        },
        "fill": use.params.get("fill"),
    }


def manifest(
    grid: Grid, identity: dict[str, Any], settings: dict[str, Any], cells: list[str]
) -> dict[str, Any]:
    """The manifest of a run as it starts."""
    config = grid.config.model_dump(mode="json")
    return {
        "schema": 1,
        "version": faithmap.__version__,
        "command": command_line(),
        "created": datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat(),
        "identity": identity,
        "settings": settings,
        "config": config,
        **git_state(checkout()),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu(),
        **gpu(settings["device"]),
        "libraries": library_versions(),
        "models": {
            model.name: {
                "name": model.name,
                "params": _params(config["models"], model.name),
                **describe_model(model),
                **describe_tuned(model, grid),
            }
            for model in grid.models
        },
        "datasets": {
            dataset.label: {
                "params": _params(config["datasets"], dataset.label),
                **describe_dataset(dataset, len(chosen)),
            }
            for dataset, chosen in grid.datasets
        },
        "explainers": {use.label: describe_explainer(use, grid) for use in grid.explainers},
        "metrics": [describe_metric(use) for use in grid.metrics],
        "request": {
            "models": [model.name for model in grid.models],
            "datasets": [dataset.label for dataset, _ in grid.datasets],
            "explainers": [use.label for use in grid.explainers],
        },
        "cells": cells,
    }


def _params(entries: list[dict[str, Any]], label: str) -> dict[str, Any]:
    """The parameters as they were typed, with relative paths left relative."""
    for entry in entries:
        if entry.get("label", entry["name"]) == label:
            return {key: value for key, value in entry.items() if key not in OF_THE_LINE}
    return {}
