"""The parts of `leaderboard.md` that say what the columns mean and what exactly was run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from faithmap.fitting import told_images
from faithmap.records import canonical_json
from faithmap.report._format import code
from faithmap.sources import OWN_SETTINGS, edited, sources

_TIMES = "\N{MULTIPLICATION SIGN}"
_MEANINGS = {
    "auc_d": (
        "AUC-D",
        "Neg AUC less Pos AUC; the score that ranks. Percent, \N{MINUS SIGN}90 to 90; "
        "0 is what a map without knowledge gets.",
    ),
    "neg_auc": (
        "Neg AUC",
        "Agreement with the model's own prediction while the *least* relevant pixels are removed, 0 to "
        "90% of them; area under the curve. Percent, 0 to 90.",
    ),
    "pos_auc": (
        "Pos AUC",
        "The same while the *most* relevant pixels are removed. Percent, 0 to 90.",
    ),
    "auc_d_z": (
        "Effect",
        "AUC-D less the reference null's on the same image: mean over standard deviation. An effect size;"
        " it does not grow with the number of images.",
    ),
    "average_drop": (
        "Drop",
        "Share of the class probability that is lost when the image is multiplied by the map; gains count"
        " as 0. Percent. It measures a map's brightness as much as its place.",
    ),
    "increase": (
        "Increase",
        "Images whose class probability rises by that. Percent of images.",
    ),
    "win": (
        "Win",
        "How often a method's drop is smaller than another ranked method's, mean over those; a tie counts"
        " one half. Percent.",
    ),
    "win_share": (
        "Win share",
        "Images on which the method has the smallest drop, shared among ties. Percent.",
    ),
    "area": (
        "Area",
        "Mean of the map as Drop uses it: how bright it is. Percent; neither way is better.",
    ),
    "energy_pg": (
        "Energy",
        "Share of the map's mass on the object. Percent. Scored where the model is right and the object "
        "fills 2 to 50% of the image.",
    ),
    "energy_pg_corrected": (
        "Energy, corrected",
        "The same with the object's share of the image taken off: 0 is chance, 100 all mass on the "
        "object. A ratio of sums.",
    ),
    "beats_swapped": (
        "Beats swapped",
        "Images on which a map has a larger AUC-D than the method's own map of another image (mean of its"
        " draws). Percent, 50 is chance.",
    ),
    "beats_rolled": (
        "Beats rolled",
        "The same against the map shifted around the image. Percent.",
    ),
    "ms_per_image": (
        "ms / image",
        "Time of one explanation, median with quartiles. Milliseconds.",
    ),
    "forwards": (
        "Forwards, Backwards",
        "Images passed through the model, and back, per explained image.",
    ),
    "fit_images": (
        "Fit images, Fit seconds, Parameters added",
        "What fitting the method to the model took, once, beforehand. Images may have been seen more than "
        "once.",
    ),
    "peak_mb": (
        "Peak MB",
        "Largest memory that the device's allocator held. Megabytes.",
    ),
}

_NOTES = (
    "Rank: by AUC-D among the ranked methods; in parentheses, 1 + the number of methods that are "
    "significantly better, to the number of methods less those significantly worse (simultaneous max-|t| "
    "bootstrap over images, 95%). Ties are not transitive: *a* and *ab* share a letter, *ab* and *b* do, "
    "*a* and *b* do not. Intervals are BCa bootstrap over images, Wilson for hits. An empty or failed map"
    " is scored as the mean of the reference null on that image and counted in `leaderboard.csv`; a "
    "method that fails on more than 1% of the images is not ranked."
)


def legend(columns: Iterable[str]) -> list[str]:
    """What the columns of a board mean, for those that it has."""
    present = set(columns)
    lines = ["| Column | In the CSV | Meaning |", "| :-- | :-- | :-- |"]
    lines += [
        f"| {title} | `{name}` | {text} |" for name, (title, text) in _MEANINGS.items() if name in present
    ]
    return ["## What the columns mean", "\n".join(lines), _NOTES]


def unreliable(manifest: Mapping[str, Any]) -> list[str]:
    """Which plugins failed checks of the kit, and why; nothing where none did."""
    lines = [
        f"- {verdict['kind']} `{verdict['name']}`, `{fault['check']}`"
        + (f" on `{fault['model']}`" if fault["model"] else "")
        + f": {plain(fault['message'])}"
        for verdict in manifest.get("verdicts", {}).values()
        for fault in verdict["failed"]
    ]
    if not lines:
        return []
    note = (
        "Plugins that are not part of faithmap are checked before they run. These failed, and are shown "
        "but not ranked; `faithmap check` tells more."
    )
    return ["## Unreliable plugins", note, "\n".join(lines)]


def plain(text: Any) -> str:
    """Free text made safe for a list or a table: one line, no markup of its own."""
    flat = " ".join(str(text).split())
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|" else sign for sign in flat)


def provenance(manifest: Mapping[str, Any]) -> list[str]:
    """What was run: enough to run it again and to tell two boards apart."""
    runs = sources(manifest)
    alone = len(runs) == 1
    lines = [
        *([_faithmap(manifest)] if alone else map(_run, runs)),
        *_edited(manifest),
        *_settings(manifest, () if alone else OWN_SETTINGS),
        *(_machine(manifest) if alone else ()),
        *(_model(name, facts) for name, facts in _chosen(manifest, "models")),
        *(_dataset(name, facts) for name, facts in _chosen(manifest, "datasets")),
        "- **explainers** "
        + ", ".join(_explainer(name, facts) for name, facts in _chosen(manifest, "explainers")),
        *_fits(manifest),
        "- **metrics** " + ", ".join(_metric(entry) for entry in manifest.get("metrics", ())),
    ]
    if alone:
        lines += [f"- **libraries** {told}" for told in [_libraries(manifest)] if told]
    commands = [run["command"] for run in runs if run.get("command")]
    parts = ["## Provenance", "\n".join(line for line in lines if line)]
    if commands:
        parts.append("```\n" + "\n".join(dict.fromkeys(commands)) + "\n```")
    return parts


def _faithmap(source: Mapping[str, Any]) -> str:
    return f"- **faithmap** {source.get('version', '?')}, {_commit(source)}"


def _run(source: Mapping[str, Any]) -> str:
    """One of several runs: what it was asked for, and its circumstances."""
    names = {key: ", ".join(map(code, asked)) for key, asked in source["request"].items()}
    said = [f"faithmap {source.get('version', '?')}", _commit(source)]
    said += _circumstances({**source, **source["settings"]})
    if told := _libraries(source):
        said.append(told)
    where = f"{names['models']} and {names['datasets']}"
    return f"- **run** of {names['explainers']} on {where}: {', '.join(said)}"


def _edited(manifest: Mapping[str, Any]) -> list[str]:
    names = edited(manifest)
    if not names:
        return []
    told = ", ".join(map(code, names))
    return [f"- **edited between the runs** (the file, not its version): {told}; the run named first counts"]


def _libraries(source: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(source.get("libraries", {}).items()))


def _chosen(manifest: Mapping[str, Any], kind: str) -> list[tuple[str, Mapping[str, Any]]]:
    known = manifest.get(kind, {})
    names: Sequence[str] = manifest["request"][kind]
    return [(name, known.get(name, {})) for name in names]


def _fits(manifest: Mapping[str, Any]) -> list[str]:
    """What fitted explainers have learnt from: a line a fit."""
    lines = []
    for name, facts in _chosen(manifest, "explainers"):
        for model, fit in sorted(facts.get("fits", {}).items()):
            record = fit.get("record", {})
            data, options = record.get("data", {}), record.get("options", {})
            given = {**data.get("params", {}), "part": data.get("part"), "limit": data.get("limit")}
            settings = {**given, **options}.items()
            where = " and ".join(record.get("devices", [str(record.get("gpu", record.get("device")))]))
            told = ", ".join(f"{key} {_shown(value)}" for key, value in settings if value is not None)
            lines.append(
                f"- **fit** of {code(name)} to {code(model)}: `{fit['key']}` (tensors "
                f"`{fit['digest']}`), {told_images(fit['fit_images'], data.get('seen'))} of "
                f"`{plain(str(data.get('dataset')))}`, {told}, seed {record.get('seed')}, "
                f"{record.get('precision')}, {fit['fit_seconds']:.0f} s on {where}"
            )
    return lines


def _commit(manifest: Mapping[str, Any]) -> str:
    if not manifest.get("commit"):
        return "not from a checkout"
    return f"commit `{manifest['commit']}`" + (" with uncommitted changes" if manifest.get("dirty") else "")


def _settings(manifest: Mapping[str, Any], without: Sequence[str]) -> list[str]:
    settings = {key: value for key, value in manifest.get("settings", {}).items() if key not in without}
    said = [
        f"{name.replace('_', ' ')} {_shown(value)}" for name, value in settings.items() if value is not None
    ]
    return [f"- **settings** {', '.join(said)}"] if said else []


def _machine(manifest: Mapping[str, Any]) -> list[str]:
    said = _circumstances(manifest)
    return [f"- **machine** {', '.join(said)}"] if said else []


def _circumstances(held: Mapping[str, Any]) -> list[str]:
    """Machine and time of a run, with those of its settings that are given beside them."""
    names = {"device": "device", "threads": "threads", "batch_size": "batch size", "python": "Python",
             "platform": "platform", "cpu": "CPU", "gpu": "GPU", "null_draws": "null draws",
             "own_nulls": "own nulls", "created": "created"}  # fmt: skip
    return [f"{title} {_shown(held[name])}" for name, title in names.items() if held.get(name)]


def _model(name: str, facts: Mapping[str, Any]) -> str:
    said = [f"weights `{facts['digest']}`"] if facts.get("digest") else []
    for key, title in (("input_size", "input"), ("grid", "grid")):
        if facts.get(key):
            said.append(f"{title} {_TIMES.join(map(str, facts[key]))}")
    if facts.get("parameters"):
        said.append(f"{facts['parameters']:,} parameters")
    if facts.get("declared_accuracy") is not None:
        said.append(f"declared accuracy {facts['declared_accuracy']}%")
    return f"- **model** `{name}`{_params(facts)}: {', '.join(said) or 'no facts recorded'}"


def _dataset(name: str, facts: Mapping[str, Any]) -> str:
    said = [f"{key} {_shown(facts[key])}" for key in ("revision", "license", "images", "unreadable")
            if facts.get(key) not in (None, "")]  # fmt: skip
    return f"- **dataset** `{name}`{_params(facts)}: {', '.join(said) or 'no facts recorded'}"


def _explainer(name: str, facts: Mapping[str, Any]) -> str:
    version = f" v{facts['version']}" if facts.get("version") is not None else ""
    return f"`{name}`{version}{_params(facts)}"


def _metric(entry: Mapping[str, Any]) -> str:
    spec = f" (spec `{entry['spec']}`)" if entry.get("spec") else ""
    return f"`{entry.get('name', '?')}` v{entry.get('version', '?')}{_params(entry)}{spec}"


def _params(facts: Mapping[str, Any]) -> str:
    return f" `{canonical_json(facts['params'])}`" if facts.get("params") else ""


def _shown(value: Any) -> str:
    return canonical_json(value) if isinstance(value, (dict, list, tuple)) else str(value)
