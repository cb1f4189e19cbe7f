"""The commands besides `run`, as typed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import PIL.Image
import pytest
from rich.console import Console
from torch import Tensor

import faithmap
from faithmap import cli, registry
from faithmap.batch import Batch
from faithmap.config import load_config
from faithmap.models import Model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run on the embedded data with a network of random weights."""
    folder = tmp_path_factory.mktemp("cli")
    config = load_config({"run": {"limit": 8, "batch_size": 4, "own_nulls": []}}).with_lists(
        models=["shapes/resnet[pretrained=false]"],
        explainers=["gradcam", "centre"],
        metrics=["perturbation", "drop"],
    )
    return faithmap.run(config, out=folder / "run").path


def test_the_help_and_the_version_load_no_torch() -> None:
    for words in (["--help"], ["run", "--help"], ["--version"]):
        code = (
            f"import sys\nfrom faithmap import cli\ncli.main({words!r})\nassert 'torch' not in sys.modules\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.parametrize("kind", ["explainers", "fits", "metrics", "datasets", "models", "presets"])
def test_lists_are_generated(kind: str, typed, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    code, shown = typed("list", kind)
    assert code == 0
    assert typed("list", kind, "--json")[0] == 0
    entries = json.loads(capsys.readouterr().out)
    assert entries
    for entry in entries:
        assert entry["name"] in shown
    if kind in ("explainers", "metrics", "datasets"):
        names = {plugin.name for plugin in registry.plugins(kind[:-1])}  # type: ignore[arg-type]
        assert names == {entry["name"] for entry in entries}
    if kind == "fits":
        options = {entry["name"]: set(entry["params"]) for entry in entries}
        assert options["scan"] >= {"epochs", "rate"} and options.keys() == {"infocam", "scan"}
    if kind == "metrics":
        named = [entry["name"] for entry in entries if not entry["default"]]
        assert "insertion-deletion" in named and "perturbation" not in named
        assert shown.split().count("Has") == len(named)  # "Has to be named.", wherever the line breaks


@pytest.mark.usefixtures("own_plugins")
def test_the_list_of_explainers_carries_their_facts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "careless.py"
    file.write_text(
        "from faithmap import explainer\n"
        "@explainer(version=1, source='nobody', forwards=lambda model, params: 1 / 0, backwards=2)\n"
        'def careless(model, batch):\n    """No map."""\n'
    )
    assert cli.main(["list", "explainers", "--json", "--plugin", str(file)]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    rise, fullgrad, oracle, careless = (found[n] for n in ("rise", "fullgrad", "oracle", "careless"))
    both = ("shapes/resnet", "shapes/vit")
    assert rise["forwards"] == dict.fromkeys(both, 8000) and rise["backwards"] == dict.fromkeys(both, 0)
    assert (
        rise["exact_cost"] and rise["class_specific"] and not rise["iterative"] and rise["role"] == "method"
    )
    assert rise["params"]["n_masks"] == 8000 and rise["check_params"] == {"n_masks": 64}
    assert rise["documentation"].startswith(rise["summary"].split(" with ")[0])
    assert fullgrad["families"] == ["cnn"] and fullgrad["forwards"] == {
        "shapes/resnet": 1,
        "shapes/vit": None,
    }
    assert fullgrad["undefined"] == {"shapes/vit": "defined for cnn, not for vit"}
    assert oracle["undefined"] == {} and oracle["needs"] == ["region"] and oracle["role"] == "control"
    assert careless["backwards"] == dict.fromkeys(both, None)
    assert "ZeroDivisionError" in careless["undefined"]["shapes/vit"]


def test_the_list_of_explainers_fits_a_terminal() -> None:
    from faithmap import listing

    stream = io.StringIO()
    listing.show("explainers", False, Console(file=stream, width=80), Console(file=io.StringIO()))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for plugin in registry.plugins("explainer"):
        assert any(line.split(" ")[0] == plugin.name for line in lines), f"{plugin.name} is cut"


def test_a_list_of_nothing_known(typed) -> None:  # type: ignore[no-untyped-def]
    code, shown = typed("list", "explainer")
    assert code == 2
    assert "did you mean 'explainers'" in shown


def test_status_of_a_finished_run(finished: Path, typed) -> None:  # type: ignore[no-untyped-def]
    code, shown = typed("status", finished)
    assert code == 0
    assert "complete" in shown and "unfinished" not in shown
    assert "gradcam" in shown


def test_status_of_a_run_that_lacks_units(finished: Path, tmp_path: Path, typed) -> None:  # type: ignore[no-untyped-def]
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    next((copy / "rows").rglob("*.parquet")).unlink()
    code, shown = typed("status", copy)
    assert code == 0
    assert "unfinished" in shown


def test_the_leaderboard_is_rebuilt_without_torch(finished: Path, tmp_path: Path) -> None:
    before = {name: (finished / name).read_bytes() for name in ("leaderboard.csv", "leaderboard.md")}
    for name in before:
        (finished / name).unlink()
    code = (
        "import sys\nfrom faithmap import cli\n"
        f"assert cli.main(['leaderboard', {str(finished)!r}]) == 0\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {name: (finished / name).read_bytes() for name in before} == before


def test_a_board_written_elsewhere_can_be_rebuilt_there(finished: Path, tmp_path: Path, typed) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "published"
    assert typed("leaderboard", finished, "--out", out)[0] == 0
    first = (out / "leaderboard.csv").read_bytes()
    assert first == (finished / "leaderboard.csv").read_bytes()
    (out / "leaderboard.csv").unlink()
    assert typed("leaderboard", out)[0] == 0
    assert "a published board" in typed("status", out)[1]
    assert (out / "leaderboard.csv").read_bytes() == first


def test_boards_of_nothing(tmp_path: Path, typed) -> None:  # type: ignore[no-untyped-def]
    for command in ("leaderboard", "status"):
        code, shown = typed(command, tmp_path)
        assert code == 2
        assert "holds no run" in shown


def test_explain_draws_a_figure(photo: Path, typed) -> None:  # type: ignore[no-untyped-def]
    out = photo.with_name("maps.png")
    words = ("--model", "shapes/resnet", "--explainers", "gradcam,saliency,centre", "--out", out)
    code, shown = typed("explain", photo, *words)
    assert code == 0, shown
    with PIL.Image.open(out) as figure:
        assert figure.width > 2 * figure.height > 100


@pytest.mark.usefixtures("own_plugins")
def test_explain_draws_what_it_can(photo: Path, typed) -> None:  # type: ignore[no-untyped-def]
    """One method that is not defined, and one whose code raises, cost their own panels."""

    @registry.explainer(version=1, source="a test", name="planted")
    def planted(model: Model, batch: Batch) -> Tensor:
        """Raises."""
        raise ValueError("not today")

    out = photo.with_name("maps.png")
    words = ("--model", "shapes/resnet", "--out", out, "--explainers")
    code, shown = typed("explain", photo, *words, "oracle,gradcam,planted,centre")
    assert code == 1, shown
    assert shown.count("not drawn: explainer") == 2 and "oracle" in shown and "not today" in shown
    with PIL.Image.open(out) as figure:
        assert 2 * figure.height < figure.width < 4 * figure.height, "the image and two maps"
    out.unlink()
    code, shown = typed("explain", photo, *words, "planted")
    assert code == 1 and "not today" in shown and not out.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--target", "8"), "--target 8 is out of range; the model has 8 classes"),
        (("--explainers", "gradcan"), "did you mean 'gradcam'"),
        (("--explainers", "oracle"), "explainer 'oracle': needs"),
        (("--explainers", ""), "--explainers is empty"),
        (("--model", "shapes/resnt"), "did you mean 'resnet'"),
        (("--out", "maps.gif"), "no suffix of a figure"),
        (("--out", "nowhere/maps.png"), "does not exist"),
    ],
)
def test_explain_refuses_in_one_sentence(photo: Path, typed, words: tuple[str, ...], sentence: str) -> None:  # type: ignore[no-untyped-def]
    base = {"--model": "shapes/resnet", "--out": str(photo.with_name("maps.png"))}
    given = {**base, **dict(zip(words[::2], words[1::2], strict=True))}
    code, shown = typed("explain", photo, *[part for pair in given.items() for part in pair])
    assert code == 2, shown
    assert sentence in shown
    code, shown = typed("explain", photo.with_name("none.jpg"), "--model", "shapes/resnet", "--out", "x.png")
    assert code == 2
    assert "no such image" in shown


def test_explain_of_a_broken_image_is_a_sentence(tmp_path: Path, typed) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG nothing follows")
    code, shown = typed("explain", broken, "--model", "shapes/resnet", "--out", tmp_path / "x.png")
    assert code == 2
    assert "image 'broken.png' cannot be read" in shown


def test_the_doctor_names_versions_and_states(typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    code, shown = typed("doctor")
    assert code == 0, shown
    for word in ("faithmap", "torch", "torchvision", "cpu", "explainers", "hub cache"):
        assert word in shown


class TestCompare:
    BOARD = Path(__file__).parents[1] / "results" / "imagenet-val-sample"

    def test_a_board_beside_one_table(self, typed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        code, shown = typed("compare", self.BOARD, "--with", "scan-2026:table2", "--out", tmp_path / "a.md")
        assert code == 0
        assert "scan-2026:table2 auc_d, ResNet50V2" in shown and "score-cam-2020" not in shown
        assert f"wrote {tmp_path / 'a.md'}" in shown
        page = (tmp_path / "a.md").read_text(encoding="utf-8")
        assert page.startswith("# Beside the papers' tables\n") and "score-cam-2020" not in page

    def test_nothing_in_common(self, finished: Path, typed) -> None:  # type: ignore[no-untyped-def]
        code, shown = typed("compare", finished)
        assert code == 0
        assert "nothing to compare: no published table shares three methods and a score" in shown
        assert "--with SOURCE:TABLE" in shown
        code, shown = typed("compare", finished, "--with", "scan-2026:table2")
        assert code == 0
        assert "scan-2026:table2, ResNet50V2 on ImageNet, not with shapes/resnet" in shown
        assert "no method in both (none)" in shown

    def test_wrong_requests_are_one_sentence(self, finished: Path, typed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        for words, message in (
            ([tmp_path], "holds no run"),
            ([finished, "--with", "scan"], "no figures of 'scan' are kept here"),
            ([finished, "--with", "scan-2026:table11"], "'scan-2026' has no table 'table11'"),
            ([finished, "--out", tmp_path / "page.html"], "give a file that ends in .md"),
            ([finished, "--out", finished / "manifest.json" / "page.md"], "name another file"),
        ):
            code, shown = typed("compare", *words)
            assert code == 2
            assert message in shown
            assert shown.splitlines()[-1].startswith("faithmap: ")

    def test_a_line_of_the_run_against_all_others(self, typed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        for suffix, start in (
            (".md", "# AUC-D, label: differences from `gradcam`\n"),
            (".csv", "model,dataset,"),
        ):
            file = tmp_path / f"pairs{suffix}"
            words = ("--against", "gradcam", "--score", "auc_d_label", "--out", file)
            code, shown = typed("compare", self.BOARD, *words)
            assert code == 0, shown
            assert "differences from gradcam" in shown and f"wrote {file}" in shown
            assert file.read_text(encoding="utf-8").startswith(start)
        written = pd.read_csv(tmp_path / "pairs.csv")
        board = pd.read_csv(self.BOARD / "leaderboard.csv")
        means = board.set_index(["model", "explainer"])["auc_d_label"]
        for line in written.to_dict("records"):
            model = line["model"]
            assert line["difference"] == pytest.approx(
                means[model, line["explainer"]] - means[model, "gradcam"], abs=2e-3
            )

    def test_lines_of_each_method_against_its_first(self, typed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        file, runs = tmp_path / "pairs.csv", self.BOARD.parent / "infocam-open-points"
        code, shown = typed("compare", runs, "--within", "--out", file)
        assert code == 0, shown
        assert "differences from infocam" in shown and f"wrote {file}" in shown
        written = pd.read_csv(file)
        assert set(written["against"]) == {"infocam"} and written["explainer"].nunique() == 17
        assert not {"iba", "gradcam", "random"} & set(written["explainer"])
        code, shown = typed("compare", self.BOARD, "--within")
        assert code == 2 and "no method of the run has two lines with auc_d" in shown

    def test_wrong_requests_of_a_line_are_one_sentence(self, typed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        for words, message in (
            (["--score", "auc_d"], "--score goes with --against or --within"),
            (["--against", "gradcam", "--with", "scan-2026"], "give one of them"),
            (["--against", "gradcam", "--within"], "give one of them"),
            (["--within", "--with", "scan-2026"], "give one of them"),
            (["--within", "--score", "win"], "no score 'win' of single images"),
            (["--against", "gradcan"], "did you mean 'gradcam'"),
            (["--against", "gradcam", "--score", "peak_mb"], "'peak_mb' is a cost"),
            (["--against", "gradcam", "--out", tmp_path / "page.txt"], "ends in .md, for a page, or in .csv"),
        ):
            code, shown = typed("compare", self.BOARD, *words)
            assert code == 2
            assert message in shown and shown.splitlines()[-1].startswith("faithmap: ")
