"""Every preset names what exists: plugins and their parameters, models, tables, fits."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import timm
import torchvision

from faithmap.comparing import chosen_figures
from faithmap.config import PATH_KEYS, Config, load_config, parse_spec, preset_names, preset_text
from faithmap.dino import CLASSIFIERS
from faithmap.listing import entries
from faithmap.publications import publications
from faithmap.registry import get
from faithmap.requested_fits import SETTINGS
from faithmap.training import fit_options
from faithmap.tuning_options import finetune_options

PAPERS = [
    name
    for name in preset_names()
    if load_config(name).published
    and {"imagenet", "cub-200-2011", "food-101"} & {spec.name for spec in load_config(name).datasets}
]


@pytest.fixture(params=preset_names())
def preset(request: pytest.FixtureRequest) -> Config:
    return load_config(request.param)


def test_plugins_take_their_parameters(preset: Config) -> None:
    for kind, specs in (("explainer", preset.explainers), ("metric", preset.metrics)):
        for spec in specs:
            get(kind, spec.name).check(spec.params)  # type: ignore[arg-type]
    for spec in preset.datasets:
        known = get("dataset", spec.name).parameters
        assert set(spec.params) <= set(known)
    for spec in preset.fits:
        options = {k: v for k, v in spec.params.items() if k not in (*SETTINGS, "dataset")}
        fit_options(get("explainer", spec.name), options)
        assert spec.name in {used.name for used in preset.explainers}


def test_the_list_says_what_each_is() -> None:
    told = {entry["name"]: entry["summary"] for entry in entries("presets")}
    assert told["scan-table2"] == (
        "SCAN (arXiv:2603.06523), table 2: six methods on ResNet50V2 and ImageNet by perturbation "
        "(1 model, 1 dataset, 10 explainers)"
    )
    assert all(len(said) > 60 and "et al (" not in said for said in told.values())


def test_the_guide_names_every_preset_of_a_paper() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "tables.md").read_text()
    for name in preset_names():
        inner = name in {"scan-table7", "scan-table8"}  # "`scan-table6` to `scan-table9`"
        assert name == "quickstart" or inner or f"`{name}`" in guide, name


def command(preset: Config) -> dict[str, str]:
    """The options of the command in a preset's comments that makes its models; none where it needs none."""
    text = preset_text(preset.name)
    start = text.find("faithmap finetune")
    if start < 0:
        return {}
    lines = text[start : text.index("\n#\n", start)].replace("\n#", "\n").replace("\\\n", " ")
    words = shlex.split(lines)[2:]
    return dict(zip(words[::2], words[1::2], strict=True))


def architectures(preset: Config) -> list[str]:
    """The names of a preset's models; of a fine-tuned one the name of what is tuned."""
    found, options = [], command(preset)
    for spec in preset.models:
        source, _, name = spec.name.partition("/")
        if source == "tuned":
            before, _, behind = options["--name"].partition("MODEL")
            assert name.startswith(before) and name.endswith(behind)
            stem = name[len(before) : len(name) - len(behind)] if "MODEL" in options["--name"] else ""
            found.append(parse_spec(options["--model"].replace("MODEL", stem)).name)
        else:
            found.append(spec.name)
    return found


def test_models_exist(preset: Config) -> None:
    for name in architectures(preset):
        source, _, name = name.partition("/")
        if source == "timm":
            assert timm.is_model(name)
        elif source == "torchvision":
            assert name in torchvision.models.list_models()
        elif source == "dino":
            assert name in CLASSIFIERS
        else:
            assert source == "shapes"


#: Weights of the hub whose commit nobody could be asked for; their tag is named all the same.
UNPINNED = {"timm/resnetv2_50.a1h_in1k", "timm/convnext_small.in12k_ft_in1k"}


def test_weights_of_the_hub_are_pinned(preset: Config) -> None:
    """By tag and commit: neither a release of timm nor an upload changes what a preset runs on."""
    specs = [spec for spec in preset.models if spec.name.startswith("timm/")]
    options = command(preset)
    if options and "MODEL" not in options["--model"]:
        specs.append(parse_spec(options["--model"]))
    for spec in specs:
        if not spec.params.get("pretrained") or not timm.is_model(spec.name.partition("/")[2]):
            continue
        assert "." in spec.name, f"{spec.name} names no tag"
        revision = str(spec.params.get("revision", ""))
        assert re.fullmatch("[0-9a-f]{40}", revision) or (not revision and spec.name in UNPINNED)


def test_what_a_preset_tunes_is_what_it_runs_on(preset: Config) -> None:
    """The command in its comments learns from the preset's data set and keeps the images of the run apart."""
    options = command(preset)
    if not options:
        assert not any(spec.name.startswith("tuned/") for spec in preset.models)
        return
    learnt, tested = parse_spec(options["--dataset"]), parse_spec(options["--test-dataset"])
    (used,) = preset.datasets
    assert learnt.name == tested.name == used.name
    assert tested.params == used.params and learnt.params == {**used.params, "split": "train"}
    for fit in preset.fits:
        assert fit.params["dataset"] == {"name": learnt.name, **learnt.params}
    named = {"--model", "--dataset", "--test-dataset", "--train", "--epochs", "--name"}
    assert set(options) == named
    finetune_options({"train": options["--train"], "epochs": int(options["--epochs"])})


def test_no_path_of_a_machine(preset: Config) -> None:
    for spec in (*preset.models, *preset.datasets):
        for key in PATH_KEYS:
            assert str(spec.params.get(key, "$FAITHMAP_DATA")).startswith("$FAITHMAP_DATA")


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_preset_asks_for_all_that_its_table_holds(name: str) -> None:
    """Models, methods and scores of the published figures are all in the request."""
    config = load_config(name)
    assert config.published
    explainers = {spec.name for spec in config.explainers}
    for source, figures in chosen_figures(config.published):
        if figures.images.registry not in {spec.name for spec in config.datasets}:
            continue  # the same table on other images, which a preset may leave to another
        if figures.model.same_as:
            assert any(figures.model.is_architecture_of(name) for name in architectures(config)), figures
        for column, printed in figures.columns.items():
            for method in printed:
                known = source.methods[method]
                assert not known.explainer or known.explainer in explainers, method
            readings = source.columns[column].readings
            metrics = [(spec.name, get("metric", spec.name).check(spec.params)) for spec in config.metrics]
            assert not readings or any(
                reading.metric == metric and reading.params.items() <= params.items()
                for reading in readings
                for metric, params in metrics
            ), column


def test_there_are_presets_of_each_source() -> None:
    found = {entry.partition(":")[0] for name in PAPERS for entry in load_config(name).published}
    assert found == set(publications())
