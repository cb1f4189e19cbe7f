"""Runs with planted orders, to set beside the papers' tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

import slow_rows
from faithmap.comparing import Comparison, Section, chosen_figures, compare
from faithmap.evidence import read_evidence
from faithmap.records import canonical_json

N = 40
TABLE = "scan-2026:table2"
PRINTED = ("scan", "layercam", "gradcam++", "xgradcam", "lime", "rise")
PERTURBATION = {"fill": "black", "span": 0.9, "steps": 9}
#: What makes a line of `scan` the method that was printed.
SCAN = {"mask": "gradient", "output": "confidence"}
DROP = {"mute": "soft", "score": "probability", "space": "pixel"}
Values = Callable[[str, int], float | None]


def metric(name: str, params: Mapping[str, Any], *scores: str, variant: str = "") -> dict[str, Any]:
    """A metric's entry in a manifest."""
    return {"name": name, "version": 1, "params": dict(params), "spec": f"{name}{variant}/1",
            "variant": variant, "scores": dict.fromkeys(scores, "higher"), "fallback": {}}  # fmt: skip


def planted(
    means: Mapping[str, float],
    *,
    score: str = "auc_d@label",
    spec: str = "perturbation/1",
    noise: float = 1.0,
    value: Values | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Rows of one score whose means are those given, up to noise that is shared in part."""
    rows = slow_rows.Rows(seed)
    shared = rows.rng.normal(0, 5, N)
    for name, mean in means.items():
        for image in range(N):
            found = mean + shared[image] + rows.rng.normal(0, noise) if value is None else value(name, image)
            rows.add(name, f"img{image:03d}", score, found, spec, status="skipped" if found is None else "ok",
                     reason="no gain" if found is None else "")  # fmt: skip
    frame = rows.frame()
    frame.loc[frame["explainer"] == "scan", "params"] = canonical_json(SCAN)
    return frame


def manifest(
    methods: Sequence[str],
    metrics: Sequence[dict[str, Any]] = (),
    family: str = "cnn",
    dataset: str = "shapes",
) -> dict[str, Any]:
    """A manifest of these methods on one model."""
    made = slow_rows.manifest(methods, (), datasets=(dataset,), images=N)
    made["models"]["shapes/resnet"]["family"] = family
    if "scan" in made["explainers"]:
        made["explainers"]["scan"]["params"] = SCAN
    made["metrics"] = list(metrics) or [metric("perturbation", PERTURBATION, "auc_d@label")]
    return made


def sections(rows: pd.DataFrame, made: Mapping[str, Any], *wanted: str, named: bool = False) -> list[Section]:
    return compare(read_evidence(rows, made), chosen_figures(wanted or (TABLE,)), named=named, resamples=300)


def only(found: Sequence[Section]) -> Comparison:
    """The one comparison that there is."""
    (section,) = [section for section in found if section.comparisons]
    (comparison,) = section.comparisons
    return comparison


def falling(names: Sequence[str], step: float = 5.0) -> dict[str, float]:
    """Means that put the names in their order, the first the best."""
    return {name: 50 - step * place for place, name in enumerate(names)}
