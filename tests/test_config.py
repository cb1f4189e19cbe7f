"""Requests: TOML, presets, dictionaries and flags, and the sentences that bad ones earn."""

from __future__ import annotations

from pathlib import Path

import pytest

from faithmap.config import load_config, located, parse_spec, preset_names, split_list
from faithmap.errors import RequestError
from faithmap.records import Spec


def test_the_default_is_the_quickstart_preset() -> None:
    config = load_config()
    assert config.name == "quickstart"
    assert [spec.name for spec in config.models] == ["shapes/resnet", "shapes/vit"]
    assert len(config.explainers) >= 12


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert config.models and config.datasets and config.explainers


def test_sections_left_out_take_the_values_of_quickstart(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[run]\nlimit = 3\n\n[[explainers]]\nname = "saliency"\n')
    config, default = load_config(file), load_config()
    assert config.name == "mine"
    assert config.run.limit == 3
    assert config.run.seed == default.run.seed
    assert config.models == default.models
    assert [spec.name for spec in config.explainers] == ["saliency"]


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "mine.toml"
    file.write_text(
        '[[models]]\nname = "net.py:build"\nweights = "w.safetensors"\n\n'
        '[[datasets]]\nname = "imagefolder"\nroot = "../photos"\n'
    )
    config = load_config(file)
    name, params = located(config.models[0])
    assert Path(name.rpartition(":")[0]) == tmp_path / "sub" / "net.py"
    assert Path(params["weights"]) == tmp_path / "sub" / "w.safetensors"
    assert Path(located(config.datasets[0])[1]["root"]).resolve() == tmp_path / "photos"
    # What the manifest keeps is what was written: no path of the machine.
    assert config.model_dump(mode="json")["datasets"] == [{"name": "imagefolder", "root": "../photos"}]


def test_variables_in_paths_are_filled_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHOTOS", str(tmp_path))
    spec = Spec("imagefolder", {"root": "$PHOTOS/all"})
    assert located(spec)[1]["root"] == str(tmp_path / "all")
    monkeypatch.delenv("PHOTOS")
    with pytest.raises(RequestError, match=r"\$PHOTOS/all names a variable that is not set"):
        located(spec)


def test_flags_replace_lists_and_settings() -> None:
    config = load_config().with_lists(explainers=["rise[masks=10]", "gradcam"]).with_run(limit=5, seed=None)
    assert config.explainers[0] == Spec("rise", {"masks": 10})
    assert config.run.limit == 5
    assert config.run.seed == 0


def test_models_and_datasets_of_the_request_keep_their_parameters(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[[models]]\nname = "timm/resnet18"\nweights = "a.safetensors"\n'
        '[[models]]\nname = "timm/resnet18"\nlabel = "other"\npretrained = false\n'
        '[[datasets]]\nname = "imagefolder"\nroot = "photos"\n'
        '[[explainers]]\nname = "rise"\nn_masks = 10\n'
    )
    config = load_config(file).with_lists(
        models=["other", "timm/resnet34"], datasets=["imagefolder"], explainers=["rise"]
    )
    assert config.models == (
        Spec("timm/resnet18", {"pretrained": False}, "other"),
        Spec("timm/resnet34"),
    )
    assert config.datasets[0].params == {"root": "photos"} and config.datasets[0].base == tmp_path
    assert config.explainers == (Spec("rise"),)


def test_a_name_used_twice_is_labelled_by_its_parameters() -> None:
    config = load_config().with_lists(explainers=["occlusion[window=0.1]", "occlusion[window=0.2]"])
    assert [spec.title for spec in config.explainers] == ["occlusion[window=0.1]", "occlusion[window=0.2]"]


def test_a_label_means_the_line_of_the_request() -> None:
    source = {
        "explainers": [
            {"name": "scan", "alpha": 2.0},
            {"name": "scan", "label": "scan (no blur, alpha 1)", "blur": 0.0, "alpha": 1.0},
            {"name": "gradcam", "label": "saliency"},
        ],
        "metrics": [{"name": "drop", "label": "half", "mute": "half"}],
    }
    config = load_config(source).with_lists(
        explainers=split_list("scan (no blur, alpha 1), scan, saliency"), metrics=["half"]
    )
    assert config.explainers == (
        Spec("scan", {"blur": 0.0, "alpha": 1.0}, "scan (no blur, alpha 1)"),
        Spec("scan"),  # a name that is no label: as it is written, with its defaults
        Spec("gradcam", {}, "saliency"),
    )
    assert config.metrics == (Spec("drop", {"mute": "half"}, "half"),)


def test_a_label_that_no_line_has_is_told_by_the_labels_there_are() -> None:
    config = load_config({"explainers": [{"name": "scan", "label": "scan (no blur)", "blur": 0.0}, "rise"]})
    with pytest.raises(RequestError, match=r"no line .* 'scan \(no blu\)'; did you mean 'scan \(no blur\)'"):
        config.with_lists(explainers=["scan (no blu)"])
    file = "my method.py:explain"  # names of files may have spaces
    assert config.with_lists(explainers=[file]).explainers == (Spec(file),)
    made = Spec("scan", {"alpha": 2.0}, "a label of its own")  # which is no name, and is taken as it is
    assert config.with_lists(explainers=[made]).explainers == (made,)


@pytest.mark.parametrize(
    ("text", "params"),
    [
        ("a[k=1]", {"k": 1}),
        ("a[k=0.5,flag=true]", {"k": 0.5, "flag": True}),
        ("a[path=some/file.csv]", {"path": "some/file.csv"}),
        ("a", {}),
    ],
)
def test_parameters_on_the_command_line(text: str, params: dict[str, object]) -> None:
    assert parse_spec(text) == Spec("a", params)


def test_commas_within_brackets_do_not_split() -> None:
    assert split_list("a[k=1,l=2],b , ,c") == ["a[k=1,l=2]", "b", "c"]
    spec = "timm/net[weights=/o'brien/w.safetensors,mean=[0.4, 0.5,0.6],kwargs={pad_type = 'a,b', n=[1,2]}]"
    assert split_list(f"{spec},x[say=it's,k=1],y") == [spec, "x[say=it's,k=1]", "y"]
    assert parse_spec(spec).params == {
        "weights": "/o'brien/w.safetensors", "mean": [0.4, 0.5, 0.6],
        "kwargs": {"pad_type": "a,b", "n": [1, 2]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"run": {"limit": 0}}, ["limit", "0", "at least 1"]),
        ({"run": {"limit": -3}}, ["limit", "-3"]),
        ({"run": {"sed": 1}}, ["'sed'", "'seed'"]),
        ({"explainer": []}, ["'explainer'", "'explainers'"]),
        ({"run": {"part": "test"}}, ["part", "'test'", "eval, dev, all"]),
        ({"run": {"target": "best"}}, ["predicted, label, second"]),
        ({"run": {"precision": "fp8"}}, ["fp32, bf16"]),
        ({"run": {"device": "gpu"}}, ["'gpu'", "cuda"]),
        ({"run": {"map_grid": 1}}, ["map_grid", "2 cells"]),
        ({"run": {"map_grid": "big"}}, ["map_grid", "'big'"]),
        ({"run": {"batch_size": 0}}, ["batch_size", "0"]),
        ({"run": {"seed": -1}}, ["seed", "-1"]),
        ({"run": 3}, ["[run]"]),
        ({"models": [{"weights": "x"}]}, ["[[models]]", "no name"]),
        ({"models": "timm/resnet18"}, ["models"]),
        ({"explainers": [{"name": "gradcam"}, {"name": "gradcam"}]}, ["'gradcam'", "twice"]),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(content: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        load_config(content)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'quickstart'"):
        load_config("quickstrt")


def test_files_that_are_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\nlimit = 3")
    with pytest.raises(RequestError, match="not valid TOML"):
        load_config(broken)
