"""The runs that a board was put together from: under which circumstances each was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from faithmap.errors import RequestError

#: What of a run's manifest says how it was made.
CIRCUMSTANCES = (
    "version", "commit", "dirty", "command", "created", "python", "platform", "cpu", "gpu", "libraries",
)  # fmt: skip
#: Settings that times and rounding depend on and that several runs on one board need not share.
OWN_SETTINGS = ("device", "batch_size", "threads", "chunks")


def sources(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs behind a manifest, in the order in which they were named: one, or those that were merged."""
    held: list[dict[str, Any]] | None = manifest.get("sources")
    if held:
        return list(held)
    settings = manifest.get("settings", {})
    return [
        {
            **{key: manifest[key] for key in CIRCUMSTANCES if key in manifest},
            "settings": {key: settings[key] for key in OWN_SETTINGS if key in settings},
            "request": dict(manifest["request"]),
            "files": {
                label: entry["file_sha256"]
                for label, entry in manifest["explainers"].items()
                if entry.get("file_sha256")
            },
        }
    ]


def asked_for(manifest: Mapping[str, Any], model: str, dataset: str) -> list[str]:
    """The explainers' labels that one run at least was asked for on a model and a dataset, in order."""
    labels = [str(label) for label in manifest["request"]["explainers"]]
    if "sources" not in manifest:
        return labels
    asked: set[str] = set()
    for source in sources(manifest):
        request = source["request"]
        if model in request["models"] and dataset in request["datasets"]:
            asked |= set(request["explainers"])
    return [label for label in labels if label in asked]


def timed_alike(manifest: Mapping[str, Any]) -> bool:
    """Whether all times of a board were taken on machines of one kind, as far as that is known."""
    held = sources(manifest)
    if len(held) == 1:
        return True
    kinds = set()
    for source in held:
        device = str(source["settings"].get("device", ""))
        chip = source.get("gpu") if device.startswith("cuda") else source.get("cpu")
        if not chip:  # a manifest of before it was kept
            return False
        kinds.add((source.get("platform"), device, chip, source["settings"].get("threads")))
    return len(kinds) == 1


def edited(manifest: Mapping[str, Any]) -> list[str]:
    """Explainers whose file was another one in another of the runs, by label."""
    seen: dict[str, set[str]] = {}
    for source in sources(manifest):
        for label, sha in source["files"].items():
            seen.setdefault(label, set()).add(sha)
    return [label for label, shas in seen.items() if len(shas) > 1]


def refuse_other_versions(
    merged: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]], where: Any
) -> None:
    """Refuse explainers of one label that compute something else, by their entries in two manifests.

    Raises:
        RequestError: a label stands for another plugin, another version of it, or other parameters.
    """
    for label in merged.keys() & other.keys():
        for key in ("name", "version", "params"):
            one, two = merged[label].get(key), other[label].get(key)
            if one != two:
                raise RequestError(
                    f"{where} has '{label}' with {key} = {two!r}, an earlier folder with {one!r}; give them "
                    "labels of their own (label = in the request), or run one of them again"
                )
