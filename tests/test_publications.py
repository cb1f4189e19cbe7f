"""The papers' figures: what is shipped holds together, and damaged files are named."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import pytest

from faithmap import publications, registry
from faithmap.columns import base_score
from faithmap.errors import FaithmapError, RequestError

FOLDER = Path(str(resources.files("faithmap") / "published"))
SOURCES = publications.publications()


class TestShipped:
    def test_the_sources(self) -> None:
        assert {name: source.arxiv for name, source in SOURCES.items()} == {
            "scan-2026": "2603.06523",
            "score-cam-2020": "1910.01279",
            "scorecampp-2024": "2404.19341",
        }

    @pytest.mark.parametrize(
        ("name", "table", "model", "column", "method", "value"),
        [
            ("scan-2026", "table1", "vit-b16", "auc_d", "scan", 36.87),
            ("scan-2026", "table2", "resnet50v2", "pos_auc", "layercam", 6.15),
            ("scan-2026", "table5", "resnet50v2", "inference_time", "rise", 11812.5),
            ("score-cam-2020", "table1", "vgg16", "increase", "scorecam", 30.6),
            ("score-cam-2020", "table3", "vgg16", "energy_pg", "gradient", 41.3),
            ("scorecampp-2024", "released notebook", "resnet18", "average_drop", "scorecam++", 4.36),
        ],
    )
    def test_figures_are_where_they_are_printed(
        self, name: str, table: str, model: str, column: str, method: str, value: float
    ) -> None:
        first = next(f for f in SOURCES[name].of_table(table) if f.model.key == model)
        assert first.columns[column][method] == value

    def test_every_line_is_read(self) -> None:
        for source in SOURCES.values():
            file = {"scorecampp-2024": "scorecam++-2024"}.get(source.name, source.name)
            lines = (FOLDER / f"{file}.csv").read_text(encoding="utf-8").splitlines()
            read = sum(len(values) for f in source.figures for values in f.columns.values())
            assert read == len(lines) - 1

    def test_auc_d_is_the_difference_of_its_halves(self) -> None:
        checked = 0
        for figures in SOURCES["scan-2026"].figures:
            columns = figures.columns
            for method, printed in columns.get("auc_d", {}).items():
                halves = columns["neg_auc"].get(method), columns["pos_auc"].get(method)
                if None not in halves:
                    assert printed == pytest.approx(halves[0] - halves[1], abs=0.031), (figures.table, method)  # type: ignore[operator]
                    checked += 1
        assert checked > 50

    def test_a_group_has_one_unit_and_one_setting(self) -> None:
        for source in SOURCES.values():
            for figures in source.figures:
                assert set(figures.units) == set(figures.columns)
                assert all(figures.units.values())

    def test_unmapped_columns_say_why(self) -> None:
        unmapped = {
            (source.name, column.name) for source in SOURCES.values() for column in source.columns.values()
            if column.unmapped
        }  # fmt: skip
        assert unmapped == {("scorecampp-2024", "win")}

    def test_fractions_become_percent_like_our_shares(self) -> None:
        (figures,) = SOURCES["score-cam-2020"].of_table("table2")
        assert figures.columns["deletion_auc"]["gradcam"] == 8.9
        assert figures.units["deletion_auc"] == "percent, printed as a fraction"

    def test_notes_name_tables_and_columns_that_exist(self) -> None:
        for source in SOURCES.values():
            for table, column, note in source.notes:
                assert table in ("", *source.tables)
                assert column in ("", *source.columns)
                assert note.endswith(".")


class TestAgainstTheRegister:
    """The data cannot import the plugins, so names in it are held to them here."""

    def test_readings_are_scores_of_metrics_in_the_same_direction(self) -> None:
        for source in SOURCES.values():
            for column in source.columns.values():
                for reading in column.readings:
                    metric = registry.get("metric", reading.metric)
                    assert reading.score in metric.facts.scores
                    assert metric.facts.scores[reading.score] == column.direction, (source.name, column.name)
                    assert set(reading.params) <= set(metric.parameters)
                    metric.check(reading.params)

    def test_the_published_reading_comes_first(self) -> None:
        for source in SOURCES.values():
            for column in source.columns.values():
                assert not [r for r in column.readings[1:] if not r.another]
                assert not column.readings or not column.readings[0].another

    def test_methods_are_explainers(self) -> None:
        known = {plugin.name for plugin in registry.plugins("explainer")}
        named = {m.explainer for source in SOURCES.values() for m in source.methods.values() if m.explainer}
        assert named <= known
        for name in named & known:
            expected = "null" if name == "random" else "method"  # SCAN prints what random maps score
            assert registry.get("explainer", name).facts.role == expected

    def test_metrics_of_the_mapping_exist_where_a_score_answers(self) -> None:
        for source in SOURCES.values():
            for column in source.columns.values():
                if column.metric == "energy-pointing-game":
                    assert base_score(column.readings[0].score) == "energy_pg"
                assert {reading.metric for reading in column.readings} <= {column.metric}


MANIFEST = {
    "metrics": [
        {"name": "drop", "params": {"mute": "soft", "score": "probability", "space": "pixel"}},
        {
            "name": "drop",
            "variant": "mine",
            "params": {"mute": "half", "score": "probability", "space": "pixel"},
        },
    ]
}


class TestTitles:
    def test_a_variant_is_known_by_its_parameters_not_by_its_label(self) -> None:
        half, soft = SOURCES["score-cam-2020"].columns["average_drop"].readings
        assert half.title(MANIFEST) == "average_drop@mine"
        assert soft.title(MANIFEST) == "average_drop"

    def test_what_was_not_asked_for_has_no_name(self) -> None:
        assert SOURCES["scorecampp-2024"].columns["increase"].readings[0].title(MANIFEST) is None
        assert SOURCES["scan-2026"].columns["auc_d"].readings[0].title(MANIFEST) is None


class TestNames:
    def test_the_same_architecture(self) -> None:
        model = SOURCES["scan-2026"].of_table("table1")[0].model
        assert model.is_architecture_of("timm/vit_base_patch16_224")
        assert model.is_architecture_of("timm/vit_base_patch16_224.augreg_in21k_ft_in1k")
        assert not model.is_architecture_of("timm/vit_base_patch16_224_miil")
        assert not model.is_architecture_of("timm/vit_tiny_patch16_224")

    def test_images_by_name(self) -> None:
        images = SOURCES["score-cam-2020"].of_table("table1")[0].images
        assert images.images == 2000
        assert images.holds("imagenet-val-sample", "imagefolder")
        assert images.holds("mine", "imagenet")
        assert not images.holds("imagenette", "imagefolder")

    def test_unknown_names_suggest(self) -> None:
        with pytest.raises(RequestError, match=r"no figures of 'scan-2062'.*did you mean 'scan-2026'"):
            publications.publication("scan-2062")
        with pytest.raises(RequestError, match="'scan-2026' has no table 'tabel1'; did you mean 'table1'"):
            SOURCES["scan-2026"].of_table("tabel1")


class TestDamaged:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return Path(shutil.copytree(FOLDER, tmp_path / "published"))

    @pytest.mark.parametrize(
        ("file", "before", "after", "message"),
        [
            ("mapping", "source,column", "source,colum", "mapping.csv has the columns source, colum,"),
            ("mapping", "higher,certain", "up,certain", "line 2: direction is 'up'; expected higher or"),
            ("mapping", "auc_d,perturbation", "auc,perturbation", "readings.csv, line 2: column 'auc_d'"),
            ("mapping", "scan-2026,win", "scan-2062,win", "line 7: source 'scan-2062' is described nowhere"),
            ("scan-2026", ",36.87,percent", ",36.8?,percent", "value is '36.8\\?'; expected a number"),
            ("scan-2026", "imagenet,vit-b16,rise", "imagenet,vit-b16,rice", "'rice' is described nowhere"),
            ("scan-2026", ",68.26,percent", ",68.26", "line 5: expected 9 fields"),
            ("scan-2026", "rollout,,auc_d", "raw-attention,,auc_d", "'raw-attention' has a value in this"),
            ("readings", ",cost,{}", ",cost,[]", "params is '\\[\\]'; expected a JSON object"),
            ("readings", ",win,,increase,drop", ",win,,,drop", "line 16: 'win' needs a score, or a reading"),
            (
                "readings",
                "scan-2026,win,,increase,drop",
                "scan-2026,drop,,increase,drop",
                "name scores for 'win' or",
            ),
            ("methods", "scan-2026,scan,scan,", "scan-2026,scan,,", "'scan' needs an explainer, or a note"),
            ("datasets", ",2000,", ",many,", "images is 'many'; expected a number"),
        ],
    )
    def test_the_place_is_named(self, folder: Path, file: str, before: str, after: str, message: str) -> None:
        path = folder / f"{file}.csv"
        text = path.read_text(encoding="utf-8")
        assert before in text
        path.write_text(text.replace(before, after, 1), encoding="utf-8")
        with pytest.raises(FaithmapError, match=message):
            publications.read_publications(folder)

    def test_a_missing_file(self, folder: Path) -> None:
        (folder / "models.csv").unlink()
        with pytest.raises(FaithmapError, match=r"models\.csv of the published figures cannot be read"):
            publications.read_publications(folder)
