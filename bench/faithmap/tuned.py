"""Fine-tuned models: the file that `faithmap finetune` writes, and how `tuned/NAME` finds and loads it.

A file is a safetensors file of the whole network, so that it needs no other, with its record: the
architecture, the layers of the head, the evaluation transform, the names of the classes, and how it came
about. `NAME-KEY.safetensors` lies in `models` in the user's folder; the key is that of what it learnt from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from faithmap import fitting
from faithmap.errors import FaithmapError, RequestError, nearest
from faithmap.fitting import Fit
from faithmap.heads import put_head
from faithmap.models import Model

#: The source of models in a request: `tuned/NAME`.
SOURCE = "tuned"
#: Parameters of a model that a fine-tuned one takes too; all else is in its file.
KEYS = ("mean", "std", "input_size", "crop_pct", "interpolation", "crop_mode", "layer", "family")


def folder() -> Path:
    """Where fine-tuned models lie."""
    return fitting.home() / "models"


def known() -> dict[str, list[Path]]:
    """The files of all fine-tuned models, by name."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder().glob(f"*{fitting.SUFFIX}")):
        found.setdefault(name_in(file), []).append(file)
    return found


def name_in(file: Path) -> str:
    """The name that a file is called by."""
    return file.stem.rpartition("-")[0]


def usable_name(text: str, *, asked: bool) -> str:
    """A name that a file can bear.

    Args:
        text: the name.
        asked: whether the user gave it; then it is refused where it will not do, else mended.

    Raises:
        RequestError: the name has other characters than letters, digits, dots, hyphens and underscores.
    """
    mended = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
    if not mended or (asked and mended != text):
        raise RequestError(
            f"--name {text!r}: expected letters, digits, dots, hyphens and underscores, such as "
            f"{mended or 'dogs-or-birds'}"
        )
    return mended


def find(name: str) -> Path:
    """The file of a fine-tuned model, by its name, or by its name and the beginning of its key.

    Raises:
        RequestError: there is none, or there are several.
    """
    there = known()
    files = there.get(name) or [
        file for held in there.values() for file in held
        if file.stem.startswith(name) and len(name) > len(name_in(file)) + 1
    ]  # fmt: skip
    if not files:
        hint = nearest(name, there) if there else f"{folder()} holds none: `faithmap finetune` makes one"
        raise RequestError(f"there is no fine-tuned model '{SOURCE}/{name}'; {hint}")
    if len(files) > 1:
        told = " and ".join(f"{SOURCE}/{file.stem} ({told_origin(file)})" for file in files)
        raise RequestError(
            f"there are {len(files)} fine-tuned models '{SOURCE}/{name}': {told}; name one with the "
            "beginning of its key, or delete the files that you do not want"
        )
    return files[0]


def told_origin(file: Path) -> str:
    """What a file was learnt from, in a few words."""
    record = read(file).record
    options = ", ".join(f"{key} {record['options'][key]}" for key in ("train", "epochs", "lr"))
    return f"{record['data']['images']} images of {record['data']['dataset']}, {options}"


def read(file: Path) -> Fit:
    """The record and the digest of a fine-tuned model.

    Raises:
        RequestError: there is no such file, or it holds something else.
    """
    file = file.expanduser()
    if not file.is_file():
        raise RequestError(f"no such file: {file}; give a file that `faithmap finetune` wrote")
    try:
        found = fitting.read(file)
    except FaithmapError as error:
        raise RequestError(
            f"{file} is no fine-tuned model, or damaged; give a file that `faithmap finetune` wrote, or for "
            "weights alone a model's name with weights = PATH"
        ) from error
    if "head" not in found.record:
        raise RequestError(
            f"{file} holds a fit of explainer '{found.record.get('explainer')}', no fine-tuned model"
        )
    return found


def load(name: str, params: Mapping[str, Any]) -> Model:
    """The model of `tuned/NAME`, or of a file.

    Args:
        name: the name as it was typed.
        params: any of `KEYS`, which take the place of what the file says.

    Raises:
        RequestError: there is no such model, a parameter does not apply, or the architecture is not here.
    """
    for key in params:
        if key not in KEYS:
            raise RequestError(
                f"the fine-tuned model '{name}' has no parameter '{key}'; {nearest(key, KEYS)} (its weights "
                "and architecture are in its file)"
            )
    source, _, rest = name.partition("/")
    found = read(Path(name) if name.endswith(fitting.SUFFIX) else find(rest if source == SOURCE else name))
    record = found.record
    module = _architecture(record["base"]).module
    put_head(module, record["head"], int(record["classes"]))
    from faithmap.model_sources import leave_auxiliary, misfit

    state = found.tensors()
    leave_auxiliary(module, state)
    fault = misfit(module.state_dict(), state)
    if fault:
        raise RequestError(
            f"{found.path} does not fit '{record['base']['name']}' as it is built here: {fault}; fine-tune "
            "it again with the libraries that are installed"
        )
    module.load_state_dict(state)
    given = {key: params[key] for key in KEYS if params.get(key) is not None}
    config = {**record["model"]["transform"], **given}
    layer = config.pop("layer", record["model"]["layer"])
    family = config.pop("family", record["model"]["family"])
    model = Model(
        module, target_layer=layer, family=family, name=name, class_names=record["class_names"], **config
    )
    model.tuned = record
    return model


def _architecture(base: Mapping[str, Any]) -> Model:
    """The network that was fine-tuned, with whatever weights it starts with."""
    from faithmap.model_sources import build

    name, params = str(base["name"]), dict(base["params"])
    if ".py:" in name:
        return build(name, params)
    params.pop("revision", None)  # of weights that are fetched; these are not
    return build(name, {**params, "pretrained": False})


def transform_of(model: Model) -> dict[str, Any]:
    """Normalisation and evaluation transform of a model, as a file keeps them."""
    return {
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "input_size": list(model.transform.size),
        "crop_pct": model.transform.crop_pct,
        "interpolation": model.transform.interpolation,
        "crop_mode": model.transform.mode,
    }
