"""The page of all explainers: made from the register, current, and true to what is counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from faithmap import reference, registry
from faithmap.costs import Passes, ask, counted
from faithmap.errors import RequestError
from faithmap.fitting import wants_fit
from faithmap.models import Model
from faithmap.plugin import FITTED, Plugin

PAGE = Path(__file__).resolve().parents[1] / "docs" / "explainers.md"
COMMAND = "run `python -m faithmap.reference docs/explainers.md` (with `--count` for a few of them)"
#: Explainers of more passes than this are left to the command.
CHEAP = 6

in_checkout = pytest.mark.skipif(not PAGE.is_file(), reason="the page is in the checkout")

YOURS = '''
from faithmap import explainer

def passes(model, params):
    return params["width"] * model.input_size[0]

@explainer(version=3, source="nobody (arXiv:2001.00001)", families={"cnn"}, forwards=passes, backwards=0)
def yours(model, batch, *, width: int = 2):
    """One map.

    A_k | B_k times *two*.

    Args:
        model: the model.
        batch: images.
        width: of the map | in cells.
    """

@explainer(name="learned", version=1, source="nobody", forwards=1, backwards=0)
class Learned:
    """A map that is learned."""

    def fit(self, model, data, session):
        """Learns."""

@explainer(version=1, source="nobody", forwards=lambda model, params: 1 / 0, backwards=0)
def broken(model, batch):
    """No map."""
'''


def built_in() -> list[Plugin]:
    return [plugin for plugin in registry.plugins("explainer") if plugin.built_in]


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return reference.load_models()


@pytest.fixture
def yours(tmp_path: Path, own_plugins: None) -> Path:
    """A file with explainers of somebody else, forgotten afterwards."""
    file = tmp_path / "yours.py"
    file.write_text(YOURS, encoding="utf-8")
    return file


def without_measured_numbers(text: str) -> str:
    """A page without the numbers in methods' reasons, which another machine rounds differently."""
    return re.sub(r"^- Not on .*$", lambda line: re.sub(r"-?\d+\.\d+", "#", line[0]), text, flags=re.M)


@in_checkout
class TestThePage:
    def test_it_is_current(self, models: dict[str, Model]) -> None:
        text = PAGE.read_text(encoding="utf-8")
        made = reference.page(built_in(), models, reference.counts_on(text))
        assert without_measured_numbers(made) == without_measured_numbers(text), COMMAND

    def test_its_counts_are_as_declared(self, models: dict[str, Model]) -> None:
        counts = reference.counts_on(PAGE.read_text(encoding="utf-8"))
        assert set(counts) == {plugin.name for plugin in built_in()}, COMMAND
        for plugin in built_in():
            for name in reference.MODELS:
                said, found = ask(plugin, models[name]), counts[plugin.name].get(name)
                uncounted = bool(said.reason) or wants_fit(plugin, plugin.check({}))
                assert uncounted == (found is None), f"{plugin.name} on {name}: {COMMAND}"
                if found is None:
                    continue
                pairs = ((found.forwards, said.passes.forwards), (found.backwards, said.passes.backwards))
                for number, stated in pairs:
                    assert number is not None and stated is not None
                    agrees = number == stated if plugin.facts.exact_cost else number <= stated
                    assert agrees, f"{plugin.name} on {name}: {number} counted, {stated} declared"

    @pytest.mark.parametrize("name", reference.MODELS)
    def test_cheap_explainers_are_counted_again(self, name: str, models: dict[str, Model]) -> None:
        counts = reference.counts_on(PAGE.read_text(encoding="utf-8"))
        batch, tried = reference.example(models[name]), 0
        for plugin in built_in():
            said = ask(plugin, models[name])
            passes = (said.passes.forwards or 0) + (said.passes.backwards or 0)
            if said.reason or wants_fit(plugin, plugin.check({})) or passes > CHEAP:
                continue
            assert counted(plugin, models[name], batch) == counts[plugin.name][name], plugin.name
            tried += 1
        assert tried > 15

    def test_every_explainer_is_told_of(self) -> None:
        text = PAGE.read_text(encoding="utf-8")
        headings = re.findall(r"^### (\S+)$", text, flags=re.M)
        assert sorted(headings) == sorted(plugin.name for plugin in built_in())
        for plugin in built_in():
            assert plugin.facts.source in re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)


@pytest.mark.parametrize("plugin", built_in(), ids=lambda plugin: plugin.name)
def test_every_parameter_is_explained(plugin: Plugin) -> None:
    known = reference.read_docstring(plugin.documentation)
    assert set(plugin.parameters) - {FITTED} <= set(known.arguments)
    assert set(known.arguments) <= {*plugin.parameters, "model", "batch"}


class TestDocstrings:
    def test_parts(self) -> None:
        text = (
            "Summary.\n\nText over\ntwo lines:\n- one\n  item\n- another\n\nArgs:\n    model: it.\n"
            "    a, b: two:\n        of them.\n\n    c: three.\n\nRaises:\n    Error: never.\n"
        )
        found = reference.read_docstring(text)
        assert found.paragraphs == ("Summary.", "Text over two lines:\n- one item\n- another")
        assert found.arguments == {"model": "it.", "a": "two: of them.", "b": "two: of them.", "c": "three."}

    def test_nothing_but_a_summary(self) -> None:
        assert reference.read_docstring("One\nline.") == reference.Documentation(("One line.",), {})

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("w_k = sum_k x^2", "w_k = sum_k x^2"),
            ("A_ and _B", r"A\_ and \_B"),
            ("a * b < c $ d", r"a \* b \< c \$ d"),
            ("[0, 1] but [a](b)", r"[0, 1] but [a\](b)"),
            ("`a_ * b` * c", r"`a_ * b` \* c"),
        ],
    )
    def test_escapes(self, text: str, shown: str) -> None:
        assert reference.escaped(text) == shown

    def test_links(self) -> None:
        assert reference.linked("A 2020 (arXiv:2012.09838), eq. 1") == (
            "A 2020 ([arXiv:2012.09838](https://arxiv.org/abs/2012.09838)), eq. 1"
        )
        assert (
            reference.linked("B (doi:10.1/x-1_2); C") == "B ([doi:10.1/x-1_2](https://doi.org/10.1/x-1_2)); C"
        )

    def test_anchors_of_names_that_differ_by_signs(self) -> None:
        assert reference._anchors(["gradcam", "Gradcam++", "a-b_c"]) == {
            "gradcam": "gradcam", "Gradcam++": "gradcam-1", "a-b_c": "a-b_c",
        }  # fmt: skip


class TestYours:
    def test_the_page_takes_in_a_file(self, yours: Path, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text(
            "| [saliency](#saliency) | x | yes | all | 1 + 1 | 7 + 1 | 1 + 1 | 8 + 1 |\n", encoding="utf-8"
        )
        assert reference.main([str(page), "--plugin", str(yours), "--count", "centre, gradcam, learned"]) == 0
        text = page.read_text(encoding="utf-8")
        assert re.search(
            r"^\| \[yours\]\(#yours\) .* \| yes \| CNN \| 192 \+ 0 \| – \| – \| – \|$", text, flags=re.M
        )
        assert "| `width` | `2` | of the map \\| in cells. |" in text
        assert "\n\nA_k | B_k times \\*two\\*.\n\n" in text
        assert "From `yours.py`." in text and "Must be fitted" in text
        counts = reference.counts_on(text)
        assert counts["centre"] == dict.fromkeys(reference.MODELS, Passes(0, 0))
        assert counts["gradcam"] == dict.fromkeys(reference.MODELS, Passes(1, 1))
        assert counts["saliency"]["shapes/vit"] == Passes(8, 1)  # kept, as it was not asked for
        assert counts["broken"] == counts["learned"] == counts["xgradcam"] == {}

    def test_an_unknown_name_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="did you mean 'gradcam'"):
            reference.main([str(tmp_path / "page.md"), "--count", "gradcan"])
