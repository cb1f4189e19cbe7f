"""Every preset names what exists: plugins and their parameters, models, tables, fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torchvision

from faithmap.comparing import chosen_figures
from faithmap.config import PATH_KEYS, Config, load_config, preset_names
from faithmap.listing import entries
from faithmap.publications import publications
from faithmap.registry import get
from faithmap.requested_fits import SETTINGS
from faithmap.training import fit_options

PAPERS = [name for name in preset_names() if load_config(name).published and "imagenet" in {
    spec.name for spec in load_config(name).datasets}]  # fmt: skip


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


def test_models_exist(preset: Config) -> None:
    for spec in preset.models:
        source, _, name = spec.name.partition("/")
        if source == "timm":
            assert timm.is_model(name)
        elif source == "torchvision":
            assert name in torchvision.models.list_models()
        else:
            assert source == "shapes"


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
        assert any(figures.model.is_architecture_of(spec.name) for spec in config.models), figures.model
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
