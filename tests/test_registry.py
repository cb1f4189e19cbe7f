"""Registration, discovery and the check of parameters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from faithmap import registry
from faithmap.errors import PluginError, RequestError
from faithmap.parameters import annotated_types

pytestmark = pytest.mark.usefixtures("own_plugins")


def test_every_room_loads() -> None:
    for kind in registry.KINDS:
        assert registry.broken(kind) == {}
        assert registry.plugins(kind)


def test_one_file_of_the_rooms_holds_one_plugin() -> None:
    for kind in registry.KINDS:
        files = [plugin.file for plugin in registry.plugins(kind) if plugin.origin == "built in"]
        assert len(files) == len(set(files)) == len(registry.room_files(kind))


def test_every_plugin_declares_its_source_and_says_what_it_is() -> None:
    for kind in registry.KINDS:
        for plugin in registry.plugins(kind):
            assert plugin.facts.source, plugin.name
            assert plugin.facts.version >= 1
            assert len(plugin.summary) > 10, plugin.name
            assert len(plugin.file_sha256()) == 64
            for name, default in plugin.parameters.items():
                assert kind == "dataset" or default is not registry.inspect.Parameter.empty, (
                    plugin.name,
                    name,
                )


def test_the_name_is_the_functions_with_hyphens() -> None:
    @registry.explainer(version=1, source="here")
    def my_own_method(model: object, batch: object) -> None:
        """A method of one's own."""

    assert registry.get("explainer", "my-own-method").target is my_own_method


DOUBLE = """
from faithmap import explainer

@explainer(version=1, source="a test")
def gradcam(model, batch):
    \"\"\"Brightness under a known name.\"\"\"
    return batch.images.mean(1)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "faithmap", "run", "--plugin", "mine.py", "--explainers", "gradcam", "--dry-run"],
        ["-c", "import mine; from faithmap import registry; registry.get('explainer', 'layercam')"],
    ],
    ids=["named by a flag", "imported before"],
)
def test_a_built_in_plugin_is_not_replaced(words: list[str], tmp_path: Path) -> None:
    """Whichever is registered first; in a process of its own, where nothing is found yet."""
    (tmp_path / "mine.py").write_text(DOUBLE)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode
    assert "two explainers are named 'gradcam'" in done.stderr
    assert "mine.py" in done.stderr and "give one of them another name" in done.stderr


class Entry:
    """An entry point as importlib.metadata gives it."""

    dist = None

    def __init__(self, name: str, loaded: object) -> None:
        self.name, self.value, self._loaded = name, f"theirs:{name}", loaded

    def load(self) -> object:
        if isinstance(self._loaded, BaseException):
            raise self._loaded
        return self._loaded


def test_entry_points_that_give_no_plugin_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def undecorated(model: object, batch: object) -> None:
        """Not decorated."""

    made = [
        Entry("my-method", ImportError("no such part")), Entry("leaving", SystemExit(3)),
        Entry("quiet", undecorated), Entry("empty", registry),
        Entry("fine", registry.get("explainer", "gradcam").target),
    ]  # fmt: skip
    monkeypatch.setattr(registry, "entry_points", lambda group: made)
    monkeypatch.setattr(registry, "_broken", {kind: {} for kind in registry.KINDS})
    registry._load_entry_points("explainer")
    assert registry.broken("explainer") == {
        "my-method": "entry point theirs:my-method: ImportError: no such part",
        "quiet": "entry point theirs:quiet: PluginError: it is no explainer; decorate it with "
        "@faithmap.explainer(...)",
        "empty": "entry point theirs:empty: PluginError: it is no explainer; decorate it with "
        "@faithmap.explainer(...)",
        "leaving": "entry point theirs:leaving: SystemExit: 3",
    }
    for name in ("my-method", "my_method"):
        with pytest.raises(RequestError, match="could not be loaded: entry point theirs:my-method"):
            registry.get("explainer", name)


def test_a_file_that_leaves_the_process_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(RequestError, match="could not be imported: SystemExit: 3"):
        registry.load_file(tmp_path / "leaving.py")


@pytest.mark.parametrize("kind", registry.KINDS)
def test_a_decorator_without_facts_says_what_to_write(kind: str) -> None:
    with pytest.raises(
        PluginError, match=rf"@{kind} above 'mine' says nothing of it; write @{kind}\(version=1"
    ):

        @getattr(registry, kind)
        def mine(model: object, batch: object) -> None:
            """Without facts."""


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (["model"], "'model' is a column of every board"),
        (["win"], "'win' is a column of every board"),
        (["fit_seconds_high"], "'fit_seconds_high' is a column of every board"),
        (["rank_low"], "'rank_low' is a column of every board"),
        (["auc_d"], "'auc_d' is a column of the score 'auc_d' of metric 'perturbation'"),
        (["area_high"], "'area_high' is a column of the score 'area' of metric 'drop'"),
        (["auc_d_label_z"], "'auc_d_label_z' is a column of the score 'auc_d@label'"),
        (["gain", "gain_z_low"], "'gain_z_low' is a column of the score 'gain', which is declared too"),
    ],
)
def test_scores_have_columns_of_their_own(scores: list[str], reason: str) -> None:
    with pytest.raises(PluginError, match=f"metric 'mine': its score {reason}"):

        @registry.metric(version=1, source="here", scores=dict.fromkeys(scores, "higher"))
        def mine(model: object, batch: object, maps: object) -> None:
            """A metric of one's own."""


def test_a_second_plugin_of_one_name_is_refused() -> None:
    with pytest.raises(PluginError, match="two explainers are named 'gradcam'"):

        @registry.explainer(version=1, source="here", name="gradcam")
        def other(model: object, batch: object) -> None:
            """Another one."""


def test_open_ended_keywords_are_refused() -> None:
    with pytest.raises(PluginError, match=r"\*\*options"):

        @registry.explainer(version=1, source="here")
        def greedy(model: object, batch: object, **options: object) -> None:
            """Takes everything."""


def test_what_a_request_says_of_the_line_is_no_parameter() -> None:
    """A line's `name` and `label` do not reach the plugin."""
    with pytest.raises(PluginError, match="dataset 'mine' has a parameter 'label'; in a request that is"):

        @registry.dataset(version=1, source="here", gives={"label"}, license="none", revision="1")
        def mine(*, label: str = "column") -> list[object]:
            """No samples."""
            return []


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'gradcam'"):
        registry.get("explainer", "gradcan")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_step": 5}, "no parameter 'n_step'; did you mean 'n_steps'"),
        ({"n_steps": "many"}, "got 'many', expected int"),
        ({"n_steps": True}, "got True, expected int"),
    ],
)
def test_parameters_are_checked(given: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        registry.get("explainer", "integrated-gradients").check(given)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("infocam", {"halves": "no"}, "'halves': got 'no', expected bool$"),
        ("infocam", {"halves": 1}, "'halves': got 1, expected bool$"),
        ("infocam", {"iterations": 2.5}, r"'iterations': got 2\.5, expected int$"),
        ("infocam", {"beta": True}, "'beta': got True, expected float$"),
        ("scan", {"width": "wide"}, "explainer 'scan', parameter 'width': got 'wide', expected float$"),
        ("scan-untrained", {"width": "wide"}, "'width': got 'wide', expected float$"),
        ("gradcam", {"layer": 3}, "'layer': got 3, expected str; in quotes, \"3\", it is one"),
    ],
)
def test_a_default_of_none_leaves_the_type_to_the_annotation(
    name: str, given: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        registry.get("explainer", name).check(given)


def test_what_an_annotation_admits() -> None:
    infocam = registry.get("explainer", "infocam")
    for given in ({"halves": False}, {"beta": 3}, {"iterations": 3, "layer": "body"}, {"halves": None}):
        assert infocam.check(given).items() >= given.items()
    shapes = registry.get("dataset", "imagefolder")
    assert shapes.check({"root": Path("photos")})["root"] == Path("photos")


ODD = '''
from __future__ import annotations
from typing import TYPE_CHECKING, Any, Literal, Optional, Union
from faithmap import explainer
if TYPE_CHECKING:
    from elsewhere import Unknown

@explainer(version=1, source="a test")
class Odd:
    """Annotations as strangers write them."""
    def __init__(self, *, bare=None, unknown: Unknown | None = None, fine: int | None = None,
                 old: Optional[Union[int, str]] = None, any: Any = None, word: Literal["a"] = None,
                 held: tuple[int, ...] | None = None, own: Odd | None = None, plain: int = 3,
                 raises: 1 / 0 = None, prose: "not a type" = None, needed: bool): ...
    def __call__(self, model, batch): ...
'''


def test_annotations_that_tell_nothing_admit_anything(tmp_path: Path) -> None:
    """What a stranger writes there may be missing, unknown here, or no type at all."""
    file = tmp_path / "odd.py"
    file.write_text(ODD)
    (plugin,) = registry.load_file(file)
    assert annotated_types(plugin.target) == {
        "fine": (int,), "old": (int, str), "word": (str,), "held": (tuple,), "needed": (bool,),
    }  # fmt: skip
    thing = object()
    free = dict.fromkeys(("bare", "unknown", "any", "own", "raises", "prose"), thing)
    assert plugin.check({**free, "needed": True}).items() >= free.items()
    with pytest.raises(RequestError, match="'needed': got 'yes', expected bool"):
        plugin.check({"needed": "yes"})
    with pytest.raises(RequestError, match=r"'old': got 2\.5, expected int or str; in quotes"):
        plugin.check({"needed": True, "old": 2.5})


def test_a_metric_may_ask_to_be_named() -> None:
    @registry.metric(version=1, source="here", scores={"late": "none"}, default=False)
    def late(model: object, batch: object, maps: object) -> None:
        """Scored only where it is named."""

    @registry.metric(version=1, source="here", scores={"plain": "none"})
    def plain(model: object, batch: object, maps: object) -> None:
        """Scored everywhere."""

    names = [plugin.name for plugin in registry.default_metrics()]
    assert "plain" in names
    assert "late" not in names
    assert registry.get("metric", "late").target is late


def test_the_metrics_of_a_request_that_names_none() -> None:
    """One more would make everybody's run longer: a new metric that is not cheap has to be named."""
    assert [plugin.name for plugin in registry.default_metrics()] == [
        "bounded-drop", "cost", "drop", "energy-pointing-game", "perturbation", "pointing-game",
    ]  # fmt: skip


def test_defaults_fill_what_is_not_given() -> None:
    plugin = registry.get("explainer", "integrated-gradients")
    assert plugin.check({"n_steps": 7})["n_steps"] == 7
    assert plugin.check({}) == plugin.parameters


PLUGIN = '''
from faithmap import explainer

@explainer(version=1, source="a test")
def checkerboard(model, batch):
    """A checkerboard of 4 x 4 cells."""
    import torch
    cells = torch.arange(16).view(4, 4)
    return ((cells // 4 + cells % 4) % 2).float().expand(len(batch), 4, 4)
'''


def test_a_file_adds_its_plugins(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    (found,) = registry.load_file(file)
    assert found.name == "checkerboard"
    assert registry.get("explainer", "checkerboard").file == file.resolve()
    assert registry.load_file(file) == [found]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "registers no plugin"),
        ("import no_such_module\n", "could not be imported: ModuleNotFoundError"),
    ],
)
def test_files_that_are_no_plugins(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "odd.py"
    file.write_text(text)
    with pytest.raises(RequestError, match=message):
        registry.load_file(file)
    with pytest.raises(RequestError, match="no such file"):
        registry.load_file(tmp_path / "none.py")
