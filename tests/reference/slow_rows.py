"""Rows of an imagined run with a planted order, one at a time, and the manifest that goes with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

METHODS = ("scan", "gradcam", "layercam", "saliency")
CONTROLS = ("centre", "random-grid", "random")
VARIANTS = ("label", "probability", "blur", "noisy-linear")
COSTS = {"ms_per_image": "lower", "forwards": "lower", "backwards": "lower", "peak_mb": "lower"}


def canonical(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True, separators=(",", ":"))


def manifest(
    methods: Sequence[str] = METHODS,
    controls: Sequence[str] = CONTROLS,
    models: Sequence[str] = ("shapes/resnet",),
    datasets: Sequence[str] = ("shapes",),
    images: int = 24,
) -> dict[str, Any]:
    """The manifest that a run of these methods writes."""
    roles = dict.fromkeys(methods, "method") | {
        name: "null" if name.startswith("random") else "control" for name in controls
    }
    perturbation = {"pos_auc": "lower", "neg_auc": "higher", "auc_d": "higher"}
    variants = {f"{s}@{v}": way for v in ("label", "probability") for s, way in perturbation.items()}
    return {
        "schema": 1,
        "version": "0.1.0",
        "command": "faithmap run quickstart",
        "config": {},
        "settings": {"seed": 0, "precision": "fp32", "map_grid": "model", "target": "predicted",
                     "part": "eval", "limit": images, "null_draws": 2},
        "libraries": {"torch": "2.13.0", "numpy": "2.4.6"},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "device": "cpu",
        "threads": 2,
        "batch_size": 16,
        "python": "3.11.7",
        "platform": "Linux-x86_64",
        "created": "2026-01-02T03:04:05+00:00",
        "models": {m: {"name": m, "params": {}, "digest": "ab12cd34ef56ab78", "family": "cnn",
                       "input_size": [96, 96], "grid": [12, 12], "parameters": 312_456,
                       "declared_accuracy": 95.2} for m in models},
        "datasets": {d: {"name": d, "params": {}, "revision": "1", "license": "CC0-1.0",
                         "source": "rendered", "images": images, "unreadable": 0,
                         "part_sizes": {"dev": 8, "eval": images}} for d in datasets},
        "explainers": {name: {"name": name, "params": {}, "version": 1, "role": role, "source": "here",
                              "file_sha256": "00" * 32, "class_specific": role == "method",
                              "reliable": True} for name, role in roles.items()},
        "metrics": [
            {"name": "perturbation", "version": 1, "params": {}, "spec": "perturbation-1",
             "scores": perturbation | variants, "fallback": {}, "fill": "black"},
            {"name": "perturbation", "version": 1, "params": {"fill": "blur"}, "spec": "perturbation-1-blur",
             "scores": perturbation, "fallback": {}, "fill": "blur"},
            {"name": "drop", "version": 1, "params": {}, "spec": "drop-1", "fallback": {},
             "scores": {"average_drop": "lower", "increase": "higher", "area": "none"}},
            {"name": "energy-pointing-game", "version": 1, "params": {}, "spec": "energy-1",
             "scores": {"energy_pg": "higher", "object_share": "none"},
             "fallback": {"energy_pg": "object_share"}},
            {"name": "cost", "version": 1, "params": {}, "spec": "cost-1", "scores": COSTS,
             "fallback": {}},
        ],
        "request": {"models": list(models), "datasets": list(datasets),
                    "explainers": [*methods, *controls]},
    }  # fmt: skip


class Rows:
    """A growing list of rows of one run; planted quality in, rows out."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.rows: list[dict[str, Any]] = []
        self.cell = ("shapes/resnet", "shapes")

    def add(self, explainer: str, image: str, metric: str, value: float | None, spec: str = "",
            status: str = "ok", params: str = "{}", reason: str = "", predicted: int = 1,
            curve: list[float] | None = None) -> None:  # fmt: skip
        self.rows.append({
            "model": self.cell[0], "dataset": self.cell[1], "explainer": explainer, "params": params,
            "map_grid": "model", "seed": 0, "spec": spec, "image_id": image, "label": 1,
            "predicted": predicted, "target": predicted, "metric": metric,
            "value": np.nan if value is None else value, "status": status, "reason": reason,
            "curve": curve,
        })  # fmt: skip

    def curve(self, keep: float, ease: float) -> list[float]:
        """Agreement at ten shares of removed pixels, falling once and for all."""
        last = int(self.rng.binomial(9, min(max(keep * ease, 0.0), 1.0)))
        return [1.0] * (last + 1) + [0.0] * (9 - last)

    def maps(self, explainer: str, quality: float, image: int, params: str = "{}",
             variants: Sequence[str] = VARIANTS, cost: float | None = None, energy: bool = True,
             only_perturbation: bool = False) -> None:  # fmt: skip
        """All scores of one explainer's map of one image; quality 0 knows nothing, 1 all."""
        rng, name = self.rng, f"img{image:05d}"
        ease = 0.6 + 0.8 * ((image * 7) % 11) / 11
        predicted = 1 if image % 9 else 2
        for variant in ("", *variants):
            keep = 0.1 if variant == "noisy-linear" else 0.0
            neg = self.curve(0.35 + keep + 0.55 * quality, ease)
            pos = self.curve(0.35 + keep - 0.30 * quality, ease)
            neg_auc, pos_auc = (10 * (sum(c) - (c[0] + c[-1]) / 2) for c in (neg, pos))
            suffix = f"@{variant}" if variant else ""
            scores = (
                ("pos_auc", pos_auc, pos),
                ("neg_auc", neg_auc, neg),
                ("auc_d", neg_auc - pos_auc, None),
            )
            for score, value, curve in scores:
                self.add(explainer, name, score + suffix, value, "perturbation-1", params=params,
                         predicted=predicted, curve=curve)  # fmt: skip
        if only_perturbation:
            return
        drop = float(np.clip(rng.normal(60 - 40 * quality, 20), 0, 100))
        gain = 100.0 if rng.random() < 0.1 + 0.3 * quality else 0.0
        scores2 = {"average_drop": drop, "increase": gain, "area": float(rng.uniform(20, 50))}
        for score, value in scores2.items():
            self.add(explainer, name, score, value, "drop-1", params=params, predicted=predicted)
        share = 5.0 + (image * 13) % 40
        self.add(explainer, name, "object_share", share, "energy-1", params=params, predicted=predicted)
        scored = energy and predicted == 1
        mass = float(np.clip(share + (100 - share) * rng.normal(0.5 * quality, 0.1), 0, 100))
        self.add(explainer, name, "energy_pg", mass if scored else None, "energy-1", params=params,
                 status="ok" if scored else "skipped", predicted=predicted,
                 reason="" if scored else "the model is wrong here")  # fmt: skip
        if cost is not None and image < 8:
            for score, value in zip(
                COSTS, (cost * rng.uniform(0.95, 1.1), 1 + cost // 2, 1.0, 40 + cost), strict=True
            ):
                self.add(explainer, name, score, value, "cost-1", params=params, predicted=predicted)

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)


#: Planted quality and cost in milliseconds of every explainer of METHODS and CONTROLS.
PLANTED = {"scan": (0.9, 12.0), "gradcam": (0.55, 3.0), "layercam": (0.5, 3.4), "saliency": (0.1, 2.1),
           "centre": (0.35, 0.2)}  # fmt: skip


def run(
    plan: dict[str, tuple[float, float]] | None = None, images: int = 24, draws: int = 2, moved: bool = True,
    energy: bool = True, variants: Sequence[str] = VARIANTS,
    cells: Sequence[tuple[str, str]] = (("shapes/resnet", "shapes"),), seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Rows of a whole run: the planned explainers, both nulls, and each method's moved maps."""
    rows = Rows(seed)
    for cell in cells:
        rows.cell = cell
        for image in range(images):
            for name, (quality, cost) in (PLANTED if plan is None else plan).items():
                rows.maps(name, quality, image, cost=cost, energy=energy, variants=variants)
                for null in ("swapped", "rolled") if moved and name != "centre" else ():
                    for draw in range(draws):
                        params = canonical({"null": null, "draw": draw})
                        rows.maps(name, quality / 4, image, params, (), only_perturbation=True)
            for null in ("random-grid", "random"):
                for draw in range(draws):
                    rows.maps(null, 0.0, image, canonical({"draw": draw}), variants, energy=energy)
    return rows.frame()
