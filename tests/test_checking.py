"""`faithmap check` and `faithmap new`, as typed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Typed

from faithmap import checking, conformance, registry, scaffold
from faithmap.errors import RequestError

BAD = '''
from faithmap import dataset, explainer

@explainer(version=1, source="a test", forwards=0, backwards=0)
def of-brightness(model, batch):
    """The images' brightness."""
    return batch.images.mean(1)

@dataset(version=1, source="a test", license="CC0-1.0", revision="1")
def nothing():
    """No images."""
    return []
'''.replace("of-brightness", "of_brightness")


@pytest.fixture(autouse=True)
def restored(own_plugins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder of one's own, and forget what a test registers."""
    monkeypatch.chdir(tmp_path)
    broken = {kind: dict(registry._broken[kind]) for kind in registry.KINDS}
    yield
    registry._broken.update(broken)


class TestCheck:
    def test_one_plugin_gets_a_table(self, typed: Typed) -> None:
        code, shown = typed("check", "centre", "--quick", "--models", "shapes/resnet")
        assert code == 0, shown
        lines = shown.splitlines()
        assert lines[0].strip() == "explainer centre"
        assert lines[1].split() == ["check", "shapes/resnet"]
        for name in conformance.check_names("explainer"):
            assert (name in shown) == (
                name not in ("check_tried", "check_memory", "check_fit", "check_resume", "check_reconstruct")
            )
        assert "skipped check_interruption on shapes/resnet: passes no image" in shown
        assert "1 plugin, 17 passed, 1 skipped" in lines[-1]

    def test_only_some_checks(self, typed: Typed) -> None:
        asked = ("--only", "check_maps,check_batch", "--models", "shapes/resnet")
        code, shown = typed("check", "centre", *asked)
        assert code == 0 and "1 plugin, 2 passed" in shown.splitlines()[-1], shown
        code, shown = typed("check", "pointing-game", "--only", "check_maps")
        assert code == 2 and "the checks check_maps are not for 'pointing-game'" in shown
        code, shown = typed("check", "centre", "--only", "check_map")
        assert code == 2 and "there is no check 'check_map'; did you mean 'check_maps'" in shown

    def test_a_file_is_checked_whole(self, typed: Typed, tmp_path: Path) -> None:
        (tmp_path / "bad.py").write_text(BAD)
        code, shown = typed("check", "bad.py", "--quick", "--models", "shapes/resnet")
        assert code == 1
        assert "explainer of-brightness, check_target on shapes/resnet: maps are the same whatever" in shown
        assert "dataset nothing, check_listing: no samples are listed" in shown
        assert "2 plugins" in shown

    def test_all_takes_the_whole_register(self, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
        few = {("explainer", "centre"), ("metric", "drop"), ("dataset", "shapes")}
        for key in [key for key in registry._plugins if key not in few]:
            del registry._plugins[key]
        code, shown = typed("check", "all", "--quick", "--models", "shapes/resnet")
        assert code == 0, shown
        assert [line.split()[:3] for line in shown.splitlines()[:3]] == [
            ["explainer", "centre", "passed"],
            ["metric", "drop", "passed"],
            ["dataset", "shapes", "passed"],
        ]
        monkeypatch.setitem(registry._broken, "metric", {"mine": "SyntaxError: [no] way"})
        code, shown = typed("check", "all", "--quick", "--models", "shapes/resnet")
        assert code == 1
        assert "not loaded: metric mine: SyntaxError: [no] way" in shown

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("gradcan",), "did you mean 'gradcam'"),
            (("missing.py",), "no such file"),
            (("occlusion[windw=1]",), "did you mean 'window'"),
            (("gradcam", "--models", "shapes/resnt"), "did you mean 'resnet'"),
            (("gradcam", "--models", ","), "--models is empty"),
        ],
    )
    def test_wrong_requests_are_refused(self, typed: Typed, words: tuple[str, ...], sentence: str) -> None:
        code, shown = typed("check", *words)
        assert code == 2, shown
        assert sentence in shown

    def test_a_plugin_that_does_not_load_says_why(
        self, typed: Typed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(registry._broken, "metric", {"my-metric": "SyntaxError: no"})
        code, shown = typed("check", "my-metric")
        assert code == 2
        assert "metric 'my-metric' could not be loaded: SyntaxError: no" in shown

    def test_statuses_have_words(self) -> None:
        result = conformance.Result("metric", "drop", "check_ties", "", "unexpectedly passed", "drop it")
        assert "1 unexpectedly passed" in checking.summary(registry.get("metric", "drop"), [result])


class TestNew:
    @pytest.mark.parametrize("kind", ["explainer", "metric", "dataset"])
    def test_what_it_writes_passes_as_it_stands(self, typed: Typed, kind: str, tmp_path: Path) -> None:
        code, shown = typed("new", kind, "my-own-thing")
        assert code == 0 and "wrote my_own_thing.py" in shown
        text = (tmp_path / "my_own_thing.py").read_text()
        assert "$" not in text and len(text.splitlines()) < 65
        code, shown = typed("check", "my_own_thing.py", "--quick")
        assert code == 0, shown
        assert "0 failed" not in shown and "skipped" not in shown
        (plugin,) = registry.load_file("my_own_thing.py")
        assert (plugin.facts.kind, plugin.name) == (kind, "my-own-thing")

    @pytest.mark.parametrize("kind", ["explainer", "metric", "dataset"])
    def test_what_it_writes_is_clean(self, typed: Typed, kind: str) -> None:
        typed("new", kind, "my-own-thing")
        rules = ["--select", "A,B,E,F,I,N,PT,RUF,SIM,UP,W", "--line-length", "110"]
        for words in (
            ["check", *rules],
            ["format", "--check"],
            ["format", "--check", "--line-length", "110"],
        ):
            command = [sys.executable, "-m", "ruff", *words, "--isolated", "--no-cache", "my_own_thing.py"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr

    def test_it_never_overwrites(self, typed: Typed, tmp_path: Path) -> None:
        (tmp_path / "my_own_thing.py").write_text("mine\n")
        code, shown = typed("new", "metric", "my-own-thing")
        assert code == 2
        assert "my_own_thing.py is there already and is left as it is" in shown
        assert (tmp_path / "my_own_thing.py").read_text() == "mine\n"

    @pytest.mark.parametrize(
        ("kind", "name", "sentence"),
        [
            ("explainers", "my-own", "did you mean 'explainer'"),
            ("explainer", "gradcam", "there is an explainer 'gradcam' already"),
            ("metric", "drop", "there is a metric 'drop' already"),
            (
                "explainer",
                "My Method",
                "small letters, digits and single hyphens, a letter first, such as my-method",
            ),
            ("explainer", "2nd", "a letter first"),
            ("explainer", "class", "is a word of Python"),
            (
                "dataset",
                "torch",
                "would hide the Python module of that name; choose another, such as my-torch",
            ),
            ("dataset", "random", "would hide the Python module"),
            (
                "metric",
                "round",
                "'round' means something else in the file; choose another name, such as my-round",
            ),
            ("dataset", "range", "means something else in the file"),
            ("dataset", "partial", "means something else in the file"),
            ("metric", "removal-ranks", "means something else in the file"),
            ("metric", "status", "the score of metric 'status': 'status' is a column of every board"),
            ("metric", "auc-d", "'auc_d' is a column of the score 'auc_d' of metric 'perturbation'"),
        ],
    )
    def test_names_that_will_not_do(
        self, typed: Typed, kind: str, name: str, sentence: str, tmp_path: Path
    ) -> None:
        code, shown = typed("new", kind, name)
        assert code == 2
        assert sentence in shown
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_written_to(self, tmp_path: Path) -> None:
        gone = tmp_path / "gone"
        with pytest.raises(RequestError, match=r"cannot write .*; go to another folder"):
            scaffold.write("metric", "my-own-thing", gone)
