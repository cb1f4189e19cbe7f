"""Registration, discovery and the check of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faithmap import registry
from faithmap.errors import PluginError, RequestError


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Forget what a test registers."""
    for kind in registry.KINDS:
        registry.plugins(kind)
    before = dict(registry._plugins)
    yield
    registry._plugins.clear()
    registry._plugins.update(before)


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
