"""The runs that a board was put together from: under which circumstances each was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from faithmap.errors import RequestError
from faithmap.records import canonical_json

#: What of a run's manifest says how it was made.
CIRCUMSTANCES = (
    "version", "commit", "dirty", "command", "created", "python", "platform", "cpu", "gpu", "libraries",
)  # fmt: skip
#: Settings that several runs on one board need not share.
OWN_SETTINGS = ("device", "batch_size", "threads", "chunks", "null_draws", "own_nulls")
#: The metric whose values depend on the machine.
COST = "cost"


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
            "timed": any(entry.get("name") == COST for entry in manifest["metrics"]),
            "files": {
                label: entry["file_sha256"]
                for label, entry in manifest["explainers"].items()
                if entry.get("file_sha256")
            },
        }
    ]


def joined(manifests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The runs behind several manifests; one that is behind two of them stands once."""
    found: list[dict[str, Any]] = []
    for manifest in manifests:
        found += [source for source in sources(manifest) if source not in found]
    return found


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
    held = [source for source in sources(manifest) if source["timed"]]
    if len(held) < 2:
        return True
    kinds = set()
    for source in held:
        device = str(source["settings"].get("device", "")).partition(":")[0]
        chip = source.get("gpu") if device == "cuda" else source.get("cpu")
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


def refuse_other_meanings(merged: Mapping[str, Any], other: Mapping[str, Any], where: Any) -> None:
    """Refuse a manifest whose names mean something else than those of the runs that were named before.

    Raises:
        RequestError: a label of an explainer, a dataset or a metric stands for another plugin, version,
            revision or other parameters, a plugin of one's own was edited in between, or one explainer has
            two labels.
    """
    for kind, keys in (
        ("explainers", ("name", "version", "params")), ("datasets", ("name", "version", "revision")),
    ):  # fmt: skip
        for label in merged[kind].keys() & other[kind].keys():
            _refuse_other(f"'{label}'", keys, merged[kind][label], other[kind][label], where)
    known = {_column(entry): entry for entry in merged["metrics"]}
    for entry in other["metrics"]:
        said = f"metric '{entry.get('name')}'" + (f" ({entry['variant']})" if entry.get("variant") else "")
        before = known.get(_column(entry), entry)
        _refuse_other(said, ("version", "params", "spec"), before, entry, where)
    labels = {_meaning(entry): label for label, entry in merged["explainers"].items()}
    for label, entry in other["explainers"].items():
        called = labels.get(_meaning(entry), label)
        if called != label:
            raise RequestError(
                f"{where} calls '{label}' what an earlier folder calls '{called}'; give it one label "
                "(label = in the request) and run again, which computes nothing anew"
            )


def _column(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a metric's columns from those of others."""
    return (entry.get("name"), entry.get("variant", canonical_json(entry.get("params", {}))))


def _meaning(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells an explainer's rows from another one's; of an entry that says nothing, itself."""
    if "name" not in entry:
        return (id(entry),)
    return (entry["name"], canonical_json(entry.get("params", {})))


def _refuse_other(
    said: str, keys: Sequence[str], one: Mapping[str, Any], two: Mapping[str, Any], where: Any
) -> None:
    for key in keys:
        if one.get(key) != two.get(key):
            raise RequestError(
                f"{where} has {said} with {key} = {two.get(key)!r}, an earlier folder with {one.get(key)!r}; "
                "give them labels of their own (label = in the request), or run one of them again"
            )
    own = not (one.get("built_in", True) and two.get("built_in", True))
    if own and one.get("file_sha256") != two.get("file_sha256"):
        raise RequestError(
            f"{where} has {said} from another state of its file than an earlier folder; run one of them "
            "again, or give the edited one another name or version"
        )
