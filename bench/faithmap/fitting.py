"""Explainers that are fitted before they explain: where a fit is kept, and how it is found again.

Such an explainer is a class:

- `__init__(self, *, ...)`: its parameters, keyword-only with defaults.
- `fit(self, model, data, session, *, ...) -> {name: tensor}`: learns and returns all that it keeps.
  `data` is a `faithmap.training.TrainingData`, `session` a `faithmap.training.Session`; the options
  behind them, keyword-only with defaults, are those of `faithmap train --set`.
- `load(self, model, tensors)`: makes it ready to explain that model with what a fit has kept.
- `__call__(self, model, batch) -> maps`: as any explainer.
- `wants_fit` (optional, a property): False where the parameters need no fit.
- `reconstruct(self, model, batch) -> images` (optional): the images as it reconstructs them, (B, 3, H, W) in
  [0, 1], for `faithmap explain` and `faithmap.reconstruct`.
- `fit_when` (optional, of the class): the parameters that ask for a fit, where the default ones do not;
  messages name them.
- `as_default(self, model) -> names` (optional): the parameters whose value is what their default stands for
  on that model; a fit of the one serves the other.
- `idle_options(options) -> names` (optional, a static method): the options of a fit that have no effect
  beside the others; they are in neither its key nor its record.
- `numbers_used(self, tensors) -> int` (optional): how many of the numbers that are kept it explains with.
- `counts` (optional, of the class): columns of the curve that count images of a step, and what is true of
  these images, such as a fallback; the record keeps their sums, and `faithmap train` ends with them.

A fit is a safetensors file with its record. Its name begins with the key of what it serves (explainer,
version, the model's weights and the parameters that the fit depends on) and ends with the key of how it
came about (images, options, seed). It lies in the user's folder of fits, ships with the package, or lies in
the folder of those that a request has made for its own lines, which serve others where there is nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faithmap.config import write_spec
from faithmap.errors import FaithmapError, RequestError
from faithmap.plugin import AUTO, FITTED, REDUCED, Plugin
from faithmap.records import digest
from faithmap.store import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from faithmap.models import Model

HOME_VARIABLE = "FAITHMAP_HOME"
SUFFIX = ".safetensors"
RECORD = "faithmap"
#: Ends of the names of tensors that batch normalisation keeps beside its parameters.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Fit:
    """What an explainer has learnt of a model, and how."""

    #: How it came about: explainer, params, model, data, options, seconds, ...; plain values.
    record: Mapping[str, Any]
    #: SHA-256 over the tensors, shortened: part of the key of every map made with them.
    digest: str
    #: Where it lies; None for one that is held in memory.
    path: Path | None = None
    held: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    #: Whether its file was written just now; False for one that was there.
    written: bool = field(default=False, compare=False)

    @property
    def key(self) -> str:
        """The key of how it came about, which `fitted=` takes."""
        return str(self.record["key"])

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was learnt, float32, on the CPU.

        Raises:
            FaithmapError: the file is damaged, or no longer the one that was found.
        """
        if self.path is None:
            return dict(self.held)
        tensors = _read(self.path)[1]
        if tensors_digest(tensors) != self.digest:
            raise FaithmapError(f"{self.path} has changed since this run began; run again")
        return tensors


def home() -> Path:
    """The user's folder of faithmap: `$FAITHMAP_HOME`, or `faithmap` among the user's data."""
    if given := os.environ.get(HOME_VARIABLE):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local" / "share"))
    return base / "faithmap"


def folders(explainer: str) -> list[Path]:
    """Where fits of an explainer may lie, the first that has one first.

    The user's folder, the package's, and that of fits that `[[fits]]` of a request has asked for.
    """
    packaged = Path(__file__).parent / "zoo" / "fitted"
    return [home() / "fitted" / explainer, packaged / explainer, requested_folder(explainer)]


def requested_folder(explainer: str) -> Path:
    """Where the fits lie that a request has made by its `[[fits]]`."""
    return home() / "requested" / explainer


def adopt(explainer: str, name: str) -> None:
    """Make a fit that a request has made the user's own, as `faithmap train` of the same would.

    Args:
        explainer: its name.
        name: of the fit's file; nothing happens where there is none.
    """
    file, own = requested_folder(explainer) / name, folders(explainer)[0] / name
    if not file.is_file() or own.is_file():
        return
    own.parent.mkdir(parents=True, exist_ok=True)
    curve = file.with_suffix(".csv")
    if curve.is_file():
        curve.replace(own.with_suffix(".csv"))
    file.replace(own)


def wants_fit(plugin: Plugin, params: Mapping[str, Any]) -> bool:
    """Whether an explainer with these parameters must be fitted before it explains.

    Raises:
        RequestError: it does not take the parameters.
    """
    if not plugin.fits:
        return False
    try:
        return bool(getattr(plugin.make(params), "wants_fit", True))
    except FaithmapError:
        raise
    except Exception as error:
        raise RequestError(
            f"explainer '{plugin.name}' does not take these parameters: {type(error).__name__}: {error}"
        ) from error


def needless(plugin: Plugin, params: Mapping[str, Any]) -> str:
    """One sentence: with these parameters there is nothing to fit, and with which there is."""
    asking = getattr(plugin.target, "fit_when", {})
    instead = f"; {spec_text(plugin, {**params, **asking})} needs one" if asking else ""
    return f"explainer '{plugin.name}' needs no fit with these parameters{instead}"


def numbers_used(plugin: Plugin, params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """How many of the numbers that a fit has kept the explainer explains with.

    By default all but what batch normalisation keeps beside its parameters.
    """
    counted = getattr(plugin.make(params), "numbers_used", None)
    if counted is not None:
        return int(counted(tensors))
    return sum(value.numel() for name, value in tensors.items() if not name.endswith(BUFFERS))


def counts(plugin: Plugin) -> Mapping[str, str]:
    """The columns of a fit's curve that count images, and what is true of these."""
    found: Mapping[str, str] = getattr(plugin.target, "counts", {})
    return found


def fit_params(plugin: Plugin, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a fit depends on."""
    named = plugin.facts.fit_params
    return {
        key: value for key, value in params.items()
        if key not in (FITTED, REDUCED) and (named is None or key in named)
    }  # fmt: skip


def served_key(plugin: Plugin, params: Mapping[str, Any], model: Model) -> str:
    """The key of what a fit serves: explainer, version, the model's weights, input and layer, parameters.

    What a model is shown is part of its input: squeezed or cropped images are other ones to a decoder.
    A parameter that spells out what its default stands for is the default.
    """
    try:
        place: tuple[Any, ...] = (model.target_layer, model.grid, model.family)
    except RequestError:  # no spatial features
        place = (model.family,)
    kept = fit_params(plugin, params)
    spelled = getattr(plugin.target, "as_default", None)
    if spelled is not None:
        kept |= {key: plugin.parameters[key] for key in kept.keys() & spelled(plugin.make(params), model)}
    return digest(
        plugin.name, plugin.facts.version, model.weights_digest(), model.mean.flatten().tolist(),
        model.std.flatten().tolist(), repr(model.transform), place, kept, length=12,
    )  # fmt: skip


def find(plugin: Plugin, params: Mapping[str, Any], model: Model) -> Fit | None:
    """The fit that an explainer with these parameters explains a model with; None where there is none.

    Fits that come with the package serve where the user has none of their own, and those that requests have
    made for themselves where there is no other.

    Raises:
        RequestError: there are several and none is named, or the one that is named is not there or
            serves another model or other parameters.
        FaithmapError: a file is damaged.
    """
    served = served_key(plugin, params, model)
    choice = str(params.get(FITTED, AUTO))
    if choice.endswith(SUFFIX):
        return _named(plugin, Path(choice), served, model)
    files = known(plugin.name, served)
    if choice != AUTO:
        chosen = [file for file in files if _key_in(file).startswith(choice)]
        if not chosen:
            there = _told([read(file) for file in files])
            raise RequestError(
                f"explainer '{plugin.name}': no fit for model '{model.name}' has a key that begins with "
                f"'{choice}'; {there}"
            )
        files = chosen
    else:
        first = files[0].parent if files else None
        files = [file for file in files if file.parent == first]
    if len(files) > 1:
        spec = spec_text(plugin, {**params, FITTED: _key_in(files[0])})
        raise RequestError(
            f"explainer '{plugin.name}' has {len(files)} fits for model '{model.name}'; "
            f"{_told([read(file) for file in files])}; name one by the beginning of its key, {spec}, or "
            "delete the files that you do not want"
        )
    return read(files[0]) if files else None


def known(explainer: str, served: str) -> list[Path]:
    """The files of all fits that serve a key, by folder; one that lies in several counts in the first."""
    found: dict[str, Path] = {}
    for folder in folders(explainer):
        for file in sorted(folder.glob(f"{served}-*{SUFFIX}")):
            found.setdefault(file.name, file)
    return list(found.values())


def _key_in(file: Path) -> str:
    """The key that a fit's file is named after."""
    return file.stem.partition("-")[2]


def advice(plugin: Plugin, params: Mapping[str, Any], model: Model, named: str = "") -> str:
    """One sentence: there is no fit, and the command that makes one.

    Args:
        plugin: the explainer.
        params: its parameters.
        model: the model.
        named: how the command names the model; by default by its name.
    """
    spec = spec_text(plugin, {key: value for key, value in params.items() if key != FITTED})
    file = "" if plugin.built_in or plugin.file is None else f" --plugin {plugin.file.name}"
    return (
        f"not fitted for this model; `faithmap train {shlex.quote(spec)} "
        f"--model {named or shlex.quote(model.name)} --dataset DATASET{file}` does it"
    )


def spec_text(plugin: Plugin, params: Mapping[str, Any]) -> str:
    """An explainer as the command line names it: what differs from its defaults stands in brackets."""
    defaults = plugin.parameters
    changed = {key: value for key, value in params.items() if value != defaults.get(key)}
    return write_spec(plugin.name, changed)


def _named(plugin: Plugin, file: Path, served: str, model: Model) -> Fit:
    file = file.expanduser()
    if not file.is_file():
        raise RequestError(
            f"explainer '{plugin.name}': there is no file {file}; `faithmap train` writes such a file"
        )
    fit = read(file)
    if fit.record.get("served") != served:
        raise RequestError(
            f"{file} was fitted for explainer '{fit.record.get('explainer')}' with "
            f"{fit.record.get('params')} on model '{fit.record.get('model', {}).get('name')}', not for "
            f"'{plugin.name}' on '{model.name}' with these weights and parameters; fit it for them"
        )
    return fit


def _told(fits: Sequence[Fit]) -> str:
    if not fits:
        return "there are none"
    lines = []
    for fit in fits:
        data, options = fit.record.get("data", {}), fit.record.get("options", {})
        told = ", ".join(f"{key} {value}" for key, value in options.items())
        images = told_images(data.get("images"), data.get("seen"))
        lines.append(
            f"{fit.key} ({images} of {data.get('dataset')}, {told}, seed "
            f"{fit.record.get('seed')}, made {fit.record.get('created')}: {fit.path})"
        )
    return ("there is " if len(lines) == 1 else "there are ") + " and ".join(lines)


def told_images(given: int | None, seen: int | None) -> str:
    """How many images a fit was given, and how many it has seen where these are fewer.

    >>> told_images(128, 12), told_images(128, 128), told_images(128, None)
    ('12 of 128 images', '128 images', '128 images')
    """
    few = f"{seen} of " if seen is not None and given is not None and seen < given else ""
    return f"{few}{given} images"


def file_name(served: str, key: str) -> str:
    """The file of a fit."""
    return f"{served}-{key}{SUFFIX}"


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, shortened."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name}{tuple(tensor.shape)}".encode())
        state.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def in_memory(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Fit:
    """A fit that is not written anywhere."""
    held = {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
    return Fit(record, tensors_digest(held), held=held)


def write(file: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any], half: bool = False) -> Fit:
    """Write a fit, whole or not at all.

    Args:
        file: the file, which is replaced.
        tensors: what was learnt.
        record: how; plain values.
        half: store in half precision what fits in it, for files that ship.
    """
    import torch
    from safetensors.torch import save

    kept = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    if half:
        # Counters stay whole, and what would overflow stays finite.
        halves = {name: tensor.half() for name, tensor in kept.items() if tensor.ndim}
        kept |= {name: tensor for name, tensor in halves.items() if bool(torch.isfinite(tensor).all())}
    entry = {RECORD: json.dumps({**record, "half": half}, ensure_ascii=False)}
    write_bytes(file, save(kept, metadata=entry))
    return replace(read(file), written=True)


def read(file: Path) -> Fit:
    """Read a fit's record and digest.

    Raises:
        FaithmapError: the file is damaged or holds something else.
    """
    record, tensors = _read(file)
    return Fit(record, tensors_digest(tensors), path=file)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            record: dict[str, Any] = json.loads((opened.metadata() or {})[RECORD])
            return record, {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise FaithmapError(
            f"{file} holds no fit ({type(error).__name__}: {error}); delete it and fit again"
        ) from error
