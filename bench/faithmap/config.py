"""What a run is asked to do: TOML files, presets and flags, all ending in one `Config`."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator

from faithmap.errors import RequestError, nearest
from faithmap.records import OF_THE_LINE, Spec, canonical_json

Part = Literal["eval", "dev", "all"]
Precision = Literal["fp32", "bf16"]
Target = Literal["predicted", "label", "second"]
MapGrid = Literal["model", "native"] | int
OwnNull = Literal["swapped", "rolled"]
LISTS = ("models", "datasets", "explainers", "metrics", "fits")
SECTIONS = ("run", *LISTS, "published", "variants")
DEFAULT_PRESET = "quickstart"
#: Parameters that name files or folders; a relative one is relative to the TOML file.
PATH_KEYS = ("weights", "head", "root", "index", "class_map", "annotations", "devkit")
#: Parameters of datasets that say how the data come to be here, not what they are.
PLACE_KEYS = (*PATH_KEYS, "download", "unmapped")
#: Parameters of explainers that hold a word or the path of a file.
FILE_KEYS = ("statistics", "weights", "fitted")


class RunSettings(BaseModel):
    """The `[run]` section: settings that hold for every cell."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0)
    #: Images of each dataset; None for all.
    limit: int | None = Field(default=None, gt=0)
    part: Part = "eval"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    precision: Precision = "fp32"
    batch_size: Literal["auto"] | int = "auto"
    target: Target = "predicted"
    #: The grid that every map is reduced to: the model's own, none, or a side in cells.
    map_grid: MapGrid = "model"
    #: Draws of each null for an image.
    null_draws: int = Field(default=2, ge=1)
    #: Each method's own maps, moved: of another image, or rolled on the torus.
    own_nulls: tuple[OwnNull, ...] = ("swapped", "rolled")
    #: Threads of a unit's arithmetic; None takes the machine's cores, once, and stores them.
    threads: int | None = Field(default=None, gt=0)

    @field_validator("batch_size")
    @classmethod
    def _positive_batch(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError('must be "auto" or a number of at least 1')
        return value

    @field_validator("map_grid")
    @classmethod
    def _usable_grid(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 2:
            raise ValueError('must be "model", "native" or a side of at least 2 cells')
        return value


class VariantSettings(BaseModel):
    """The `[variants]` section: the published ways of a perturbation test that a run is repeated in.

    The three readings of the curves and the two spans, 0 to 0.9 and 0 to 1, cost nothing and are always
    among them. See `faithmap.multiverse`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fills: tuple[str, ...] = ("black", "mean", "blur", "noisy-linear")
    targets: tuple[Target, ...] = ("predicted", "label")
    map_grids: tuple[MapGrid, ...] = ("model", "native", 14)

    @field_validator("fills", "targets", "map_grids")
    @classmethod
    def _some(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("must name at least one")
        for value in values:
            if isinstance(value, int) and value < 2:
                raise ValueError('must name "model", "native" or sides of at least 2 cells')
        return tuple(dict.fromkeys(values))


class Config(BaseModel):
    """A request: settings, and the models, datasets, explainers and metrics of the grid.

    An empty `metrics` means every metric that the dataset can serve, but for those that must be named.
    `fits` say by the name of an explainer how the run fits it to each model where that has not been done; see
    `faithmap.requested_fits`.
    `published` names figures (`SOURCE` or `SOURCE:TABLE`) that the outcome is set beside; see
    `faithmap.comparing`. `variants` repeats the perturbation test in its published variants.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: str = DEFAULT_PRESET
    run: RunSettings = RunSettings()
    models: tuple[Spec, ...] = ()
    datasets: tuple[Spec, ...] = ()
    explainers: tuple[Spec, ...] = ()
    metrics: tuple[Spec, ...] = ()
    fits: tuple[Spec, ...] = ()
    published: tuple[str, ...] = ()
    variants: VariantSettings | None = None

    @field_serializer("models", "datasets", "explainers", "metrics", "fits")
    def _plain(self, specs: tuple[Spec, ...]) -> list[dict[str, Any]]:
        return [
            {"name": spec.name, **({"label": spec.label} if spec.label else {}), **spec.params}
            for spec in specs
        ]

    def with_run(self, **settings: Any) -> Config:
        """The same request under other settings; those that are None are left as they are.

        Raises:
            RequestError: a setting does not exist or has a wrong value.
        """
        given = {key: value for key, value in settings.items() if value is not None}
        return self._replace(run=run_settings({**self.run.model_dump(), **given}, "flags"))

    def with_lists(self, **lists: Iterable[str | Spec] | None) -> Config:
        """The same request with other lists of models, datasets, explainers or metrics; None leaves one.

        What the request itself has is meant with all that it says there: a model or dataset by its name
        (weights, folders), an explainer or metric by the label that sets its line apart. The names of
        explainers and metrics are taken as they are written.

        Raises:
            RequestError: a label is none of the request's.
        """
        given = {
            key: unique(tuple(self._own(key, item) or parse_spec(item) for item in items), key)
            for key, items in lists.items()
            if items
        }
        return self._replace(**given)

    def with_variants(self) -> Config:
        """The same request with its variants, or with all of them where it names none."""
        return self if self.variants is not None else self._replace(variants=VariantSettings())

    def _own(self, key: str, item: str | Spec) -> Spec | None:
        """The request's own model or dataset of a name, or its line of a label; None where it has none."""
        known: tuple[Spec, ...] = getattr(self, key)
        plain = key in ("models", "datasets")
        own = next((spec for spec in known if item == (spec.title if plain else spec.label)), None)
        if own is not None or plain or isinstance(item, Spec):
            return own
        if " " in item.partition("[")[0] and ".py" not in item:
            # No name has a space, and the registry's are no help to whoever meant a label.
            labels = [spec.label for spec in known if spec.label]
            raise RequestError(f"no line of the request has the label '{item}'; {nearest(item, labels)}")
        return None

    def _replace(self, **changes: Any) -> Config:
        return self.model_copy(update=changes)


def load_config(source: str | Path | Mapping[str, Any] | Config | None = None) -> Config:
    """Make a `Config` from a preset's name, a TOML file, a dictionary, or nothing (quickstart).

    Raises:
        RequestError: there is no such preset or file, or its content is wrong.
    """
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return from_mapping(source, name="custom", where="the configuration")
    if source is None:
        return preset(DEFAULT_PRESET)
    if str(source).endswith(".toml"):
        return from_file(Path(source))
    return preset(str(source))


def preset_names() -> list[str]:
    """The shipped presets."""
    folder = files("faithmap") / "presets"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def preset(name: str) -> Config:
    """A shipped preset by name."""
    return from_mapping(tomllib.loads(preset_text(name)), name=name, where=f"preset '{name}'")


def preset_text(name: str) -> str:
    """A shipped preset as it is written.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in preset_names():
        raise RequestError(
            f"unknown preset '{name}'; {nearest(name, preset_names())} (or give the path of a .toml file)"
        )
    return (files("faithmap") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def from_file(path: Path) -> Config:
    """A request from a TOML file; relative paths in it are relative to it."""
    if not path.is_file():
        raise RequestError(f"no such file: {path}; give a preset's name or the path of a .toml file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not valid TOML: {error}") from error
    return from_mapping(content, name=path.stem, where=str(path), base=path.resolve().parent)


def from_mapping(content: Mapping[str, Any], name: str, where: str, base: Path | None = None) -> Config:
    """A request from a dictionary of the form of a TOML file; sections left out are quickstart's."""
    for key in content:
        if key not in SECTIONS:
            raise RequestError(f"{where}: unknown key '{key}'; {nearest(key, SECTIONS)}")
    run = content.get("run", {})
    if not isinstance(run, Mapping):
        raise RequestError(f"{where}: [run] must be a table of settings")
    default = None if name == DEFAULT_PRESET and base is None else preset(DEFAULT_PRESET)
    defaults = default.run.model_dump() if default else {}
    lists = {}
    for key in LISTS:
        if key in content:
            lists[key] = _specs(content[key], key, where, base)
        elif default is not None and key not in ("metrics", "fits"):
            lists[key] = getattr(default, key)
    published = content.get("published", [])
    if not isinstance(published, list | tuple) or not all(isinstance(entry, str) for entry in published):
        raise RequestError(f'{where}: published must list sources or tables, such as ["scan-2026:table1"]')
    settings = run_settings({**defaults, **run}, where)
    variants = variant_settings(content.get("variants", False), where)
    return Config(name=name, run=settings, published=tuple(published), variants=variants, **lists)


def run_settings(values: Mapping[str, Any], where: str) -> RunSettings:
    """Settings from plain values.

    Raises:
        RequestError: a setting does not exist or has a wrong value; `where` it stands is named.
    """
    return _checked(RunSettings, values, where, "run")


def variant_settings(given: Mapping[str, Any] | bool, where: str) -> VariantSettings | None:
    """The `[variants]` section; `variants = true` asks for all of them.

    Raises:
        RequestError: a setting does not exist or has a wrong value; `where` it stands is named.
    """
    if isinstance(given, bool):
        return VariantSettings() if given else None
    if not isinstance(given, Mapping):
        raise RequestError(f"{where}: variants must be true, or a table [variants] of lists")
    for key, value in given.items():
        if key in VariantSettings.model_fields and not isinstance(value, list | tuple):
            raise RequestError(f"{where}, [variants]: {key} = {value!r} must be a list")
    return _checked(VariantSettings, given, where, "variants")


_Settings = TypeVar("_Settings", bound=BaseModel)


def _checked(kind: type[_Settings], values: Mapping[str, Any], where: str, section: str) -> _Settings:
    for key in values:
        if key not in kind.model_fields:
            raise RequestError(
                f"{where}, [{section}]: unknown key '{key}'; {nearest(key, kind.model_fields)}"
            )
    try:
        return kind(**values)
    except ValidationError as error:
        fault = error.errors()[0]
        key = str(fault["loc"][0])
        raise RequestError(
            f"{where}: {key} = {values.get(key)!r}: {_expectation(key, fault['msg'])}"
        ) from error


def _expectation(key: str, message: str) -> str:
    choices = {"part": Part, "precision": Precision, "target": Target, "targets": Target}
    if key in choices:
        return "expected one of " + ", ".join(get_args(choices[key]))
    if key == "map_grids":
        return 'expected "model", "native" and sides in cells, of at least 2'
    if key == "device":
        return "expected auto, cpu, mps, cuda or cuda:N"
    if key == "limit":
        return "expected a number of images of at least 1 (leave it out for all)"
    return message.removeprefix("Value error, ").replace("Input should be", "expected")


def _specs(entries: Any, key: str, where: str, base: Path | None) -> tuple[Spec, ...]:
    if not isinstance(entries, list) or not entries:
        raise RequestError(f"{where}: '{key}' must be tables [[{key}]], each with a name")
    specs = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"name": entry}
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise RequestError(f'{where}: a [[{key}]] table has no name; write name = "..." in it')
        rest = {k: v for k, v in entry.items() if k not in OF_THE_LINE}
        specs.append(Spec(entry["name"], rest, str(entry.get("label", "")), base))
    return unique(tuple(specs), key)


def unique(specs: tuple[Spec, ...], key: str) -> tuple[Spec, ...]:
    """Give every spec a label of its own: its parameters where one name occurs twice.

    Raises:
        RequestError: the very same thing is asked for twice.
    """
    names = [spec.name for spec in specs]
    labelled = []
    for spec in specs:
        label = spec.label
        if not label and names.count(spec.name) > 1 and spec.params:
            label = write_spec(spec.name, spec.params)
        labelled.append(replace(spec, label=label))
    titles = [spec.title for spec in labelled]
    for title in titles:
        if titles.count(title) > 1:
            raise RequestError(
                f"'{title}' is listed twice among the {key}; drop one, or tell them apart with label ="
            )
    return tuple(labelled)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value)


def located(spec: Spec) -> tuple[str, dict[str, Any]]:
    """A spec's name and parameters with its paths made ready to open.

    `~` and `$VARIABLE` are filled in, and relative paths are taken from the file that they stand in.
    """
    params = {
        key: _place(value, spec.base) if key in PATH_KEYS and isinstance(value, str) else value
        for key, value in spec.params.items()
    }
    file, _, function = spec.name.rpartition(":")
    name = f"{_place(file, spec.base)}:{function}" if file.endswith(".py") else spec.name
    if name.endswith(".safetensors"):
        name = _place(name, spec.base)
    return name, params


def located_files(spec: Spec) -> dict[str, str]:
    """The files that an explainer's parameters name, by parameter; a word that is no file is left out."""
    places = {
        key: _place(value, spec.base)
        for key, value in spec.params.items()
        if key in FILE_KEYS and isinstance(value, str)
    }
    return {key: place for key, place in places.items() if Path(place).is_file()}


def _place(text: str, base: Path | None) -> str:
    filled = os.path.expandvars(text)
    if "$" in filled:
        raise RequestError(f"the path {text} names a variable that is not set; set it, or write the path out")
    path = Path(filled).expanduser()
    return str(path if base is None else base / path)


def split_list(text: str) -> list[str]:
    """Split a comma list, leaving commas within brackets, braces, parentheses and quotes alone.

    >>> split_list("rise[masks=10,cells=7], gradcam")
    ['rise[masks=10,cells=7]', 'gradcam']
    >>> split_list("scan (probability, predicted),gradcam")
    ['scan (probability, predicted)', 'gradcam']
    >>> split_list('net[mean=[0.4,0.5,0.6],kwargs={a="x,y",b=1}]')
    ['net[mean=[0.4,0.5,0.6],kwargs={a="x,y",b=1}]']
    """
    parts, depth, quote, before = [""], 0, "", ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'" and before in ("=", "[", ","):  # where a string begins; else a part of a name
            quote = sign
        else:
            depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
        before = before if sign == " " else sign
    return [part.strip() for part in parts if part.strip()]


def parse_spec(item: str | Spec) -> Spec:
    """A spec from `name` or `name[key=value,...]`, values being TOML or plain words."""
    if isinstance(item, Spec):
        return item
    match = re.fullmatch(r"([^\[\]]+)(?:\[(.*)\])?", item)
    if match is None:
        raise RequestError(f"'{item}' is no name; write name or name[key=value,...]")
    params: dict[str, Any] = {}
    for pair in split_list(match[2] or ""):
        key, equals, value = pair.partition("=")
        if not equals:
            raise RequestError(f"'{item}': '{pair}' is no parameter; write key=value")
        params[key.strip()] = _value(value.strip())
    return Spec(match[1].strip(), params)


def write_spec(name: str, params: Mapping[str, Any]) -> str:
    """A name with parameters as `parse_spec` reads it.

    >>> write_spec("rise", {"n_masks": 10, "score": "logit"})
    'rise[n_masks=10,score=logit]'
    """
    written = ",".join(f"{key}={_short(value)}" for key, value in params.items())
    return f"{name}[{written}]" if written else name


def parse_option(text: str) -> tuple[str, Any]:
    """A pair from `key=value`, the value being TOML or a plain word.

    Raises:
        RequestError: there is no equals sign.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RequestError(f"'{text}' is no option; write key=value")
    return key.strip(), _value(value.strip())


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
