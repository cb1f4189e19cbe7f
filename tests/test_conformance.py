"""The kit as it is called: results, expected failures, models, and the pytest mark."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from conftest import make_cnn, make_vit

from faithmap import conformance, registry
from faithmap.conformance import CheckError, CheckSkipped
from faithmap.errors import RequestError
from faithmap.models import Model
from faithmap.plugin import Plugin

FEW = ["check_facts", "check_maps", "check_hooks"]

PLUGIN = '''
import torch
from faithmap import explainer

@explainer(version=1, source="a test", forwards=1, backwards=1)
def leaky(model, batch):
    """Features times gradients; a hook stays behind."""
    model.layer().register_forward_hook(lambda *_: None)
    return (batch.activations() * batch.gradients()).sum(1)
'''


pytestmark = pytest.mark.usefixtures("own_plugins")


@pytest.fixture
def leaky(tmp_path: Path) -> Plugin:
    file = tmp_path / "leaky.py"
    file.write_text(PLUGIN)
    return registry.load_file(file)[0]


def test_results_are_records_in_a_fixed_order() -> None:
    results = conformance.check_explainer("gradcam", [make_cnn, make_vit], only=FEW)
    assert [(r.check, r.model) for r in results] == [
        ("check_facts", ""),
        ("check_maps", "make_cnn"),
        ("check_hooks", "make_cnn"),
        ("check_maps", "make_vit"),
        ("check_hooks", "make_vit"),
    ]
    assert all(r.ok and r.status == "passed" and r.seconds >= 0 for r in results)
    with pytest.raises(FrozenInstanceError):
        results[0].status = "failed"  # type: ignore[misc]


def test_by_default_on_a_cnn_and_a_transformer_of_the_zoo() -> None:
    results = conformance.check_explainer("centre", only=["check_maps"])
    assert [(r.model, r.status) for r in results] == [("shapes/resnet", "passed"), ("shapes/vit", "passed")]


def test_plugins_are_named_handed_over_or_decorated(leaky: Plugin) -> None:
    for target in ("leaky", leaky, leaky.target):
        (failed,) = conformance.failures(conformance.check_explainer(target, {"tiny": make_cnn}, only=FEW))
        assert (failed.kind, failed.plugin, failed.check, failed.model) == (
            "explainer",
            "leaky",
            "check_hooks",
            "tiny",
        )
        assert not failed.ok and "Remove each handle" in failed.message


def test_parameters_can_be_given() -> None:
    for target, params in (("occlusion[window=0.5,stride=0.5]", None), ("occlusion", {"window": 0.5})):
        results = conformance.check_explainer(target, [make_cnn], params=params, only=["check_cost"])
        assert [r.status for r in results] == ["passed"]
    with pytest.raises(RequestError, match="no parameter 'windw'; did you mean 'window'"):
        conformance.check_explainer("occlusion", params={"windw": 1})


def test_the_models_given_are_left_alone(leaky: Plugin) -> None:
    model = make_cnn()
    conformance.check_explainer(leaky, [model], slow=False)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_process_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    conformance.check_explainer("random", [make_cnn], slow=False)
    assert torch.equal(torch.get_rng_state(), before)


class TestExpectedFailures:
    def test_they_are_told_apart(self, leaky: Plugin) -> None:
        expected = {"check_hooks": "needs its hook"}
        results = conformance.check_explainer(leaky, {"tiny": make_cnn}, expected, only=FEW)
        assert [r.status for r in results] == ["passed", "passed", "expected failure"]
        assert conformance.failures(results) == []
        assert results[-1].message.startswith("needs its hook (changed by the call")

    def test_they_are_strict(self) -> None:
        expected = {"check_hooks": "needs its hook"}
        results = conformance.check_explainer("gradcam", {"tiny": make_cnn}, expected, only=FEW)
        (failed,) = conformance.failures(results)
        assert failed.status == "unexpectedly passed"
        assert "drop the expectation" in failed.message

    def test_they_can_hold_for_one_model(self, leaky: Plugin) -> None:
        models = {"one": make_cnn, "two": make_cnn}
        results = conformance.check_explainer(
            leaky, models, {"check_hooks[two]": "why not"}, only=["check_hooks"]
        )
        assert [r.status for r in results] == ["failed", "expected failure"]

    @pytest.mark.parametrize(
        ("expected", "message"),
        [
            ({"check_hoks": "a reason"}, "did you mean 'check_hooks'"),
            ({"check_hooks": " "}, "gives no reason for 'check_hooks'"),
            ({"check_hooks[elsewhere]": "a reason"}, "which is no check"),
        ],
    )
    def test_they_name_checks_and_reasons(self, expected: dict[str, str], message: str) -> None:
        with pytest.raises(RequestError, match=message.replace("[", r"\[")):
            conformance.check_explainer("gradcam", {"tiny": make_cnn}, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conformance.check_explainer("gradcan"), "did you mean 'gradcam'"),
        (lambda: conformance.check_explainer("gradcam", only=["hooks"]), "did you mean 'check_hooks'"),
        (lambda: conformance.check_explainer(make_cnn), "make_cnn is no registered explainer; decorate it"),
        (lambda: conformance.check_metric(registry.get("explainer", "gradcam")), "use check_metric"),
        (lambda: conformance.check_explainer("gradcam", "shapes/vit"), "expected a list of them"),
        (
            lambda: conformance.check_explainer("gradcam", [make_cnn, make_cnn]),
            "two models of the kit are named",
        ),
        (lambda: conformance.cases("explainers", "gradcam"), "did you mean 'explainer'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_requests_are_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RequestError, match=message):
        call()


def test_a_factory_must_make_a_model() -> None:
    results = conformance.check_explainer(
        "gradcam", {"odd": lambda: torch.nn.Linear(1, 1)}, only=["check_maps"]
    )  # type: ignore[dict-item]
    assert "expected a faithmap.Model" in results[0].message


class TestCases:
    def test_they_have_ids_and_load_nothing_before_they_run(self) -> None:
        def never() -> Model:
            raise AssertionError("made before a check asked for it")

        made = conformance.cases("explainer", "gradcam", {"later": never}, slow=False)
        assert [case.id for case in made[:2]] == ["gradcam-check_facts", "gradcam-later-check_maps"]
        assert "check_memory" not in {case.name for case in made}
        assert made[0].run() == ""

    def test_they_raise_what_was_found(self, leaky: Plugin) -> None:
        (case,) = conformance.cases("explainer", leaky, {"tiny": make_cnn}, only=["check_hooks"])
        with pytest.raises(CheckError, match="Remove each handle"):
            case.run()
        (case,) = conformance.cases("explainer", "centre", {"tiny": make_cnn}, only=["check_interruption"])
        with pytest.raises(CheckSkipped, match="passes no image"):
            case.run()

    def test_facts_that_raise_are_told(self) -> None:
        def count(model: object, params: object) -> float:
            raise KeyError("steps")

        @registry.explainer(version=1, source="a test", forwards=count, backwards=0)
        def odd(model: Model, batch: object) -> torch.Tensor:
            """The images' brightness."""
            return batch.images.mean(1)  # type: ignore[attr-defined,no-any-return]

        (found,) = conformance.check_explainer(odd, {"tiny": make_cnn}, only=["check_cost"])
        assert found.status == "failed"
        assert "KeyError" in found.message and "functions of the plugin" in found.message


THIRD = """
import faithmap.registry
from conftest import make_cnn
from faithmap import conformance

faithmap.registry.load_file("leaky.py")

@conformance.parametrized(
    "explainer", ["leaky", "gradcam"], models={"tiny": make_cnn}, only=["check_maps", "check_hooks"],
    expected_failures={"leaky": {"check_hooks": "its hook stays"}},
)
def test_mine(case: conformance.Case) -> None:
    case.run()

@conformance.parametrized(
    "explainer", ["leaky", "centre"], models={"tiny": make_cnn},
    only=["check_hooks", "check_interruption"],
    expected_failures={"centre": {"check_hooks": "outdated"}},
)
def test_more(case: conformance.Case) -> None:
    case.run()
"""


def test_the_mark_gives_an_id_for_each_plugin_model_and_check(tmp_path: Path) -> None:
    (tmp_path / "leaky.py").write_text(PLUGIN)
    (tmp_path / "test_mine.py").write_text(THIRD)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "test_mine.py"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}  # where `make_cnn` is
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    found = dict(
        line.split("::")[1].split(" ")[:2]
        for line in done.stdout.splitlines()
        if line.startswith("test_mine.py::")
    )
    assert found == {
        "test_mine[leaky-tiny-check_maps]": "PASSED",
        "test_mine[leaky-tiny-check_hooks]": "XFAIL",
        "test_mine[gradcam-tiny-check_maps]": "PASSED",
        "test_mine[gradcam-tiny-check_hooks]": "PASSED",
        "test_more[leaky-tiny-check_hooks]": "FAILED",
        "test_more[leaky-tiny-check_interruption]": "PASSED",
        "test_more[centre-tiny-check_hooks]": "FAILED",
        "test_more[centre-tiny-check_interruption]": "SKIPPED",
    }, done.stdout
    assert "[XPASS(strict)] outdated" in done.stdout


def test_the_kit_needs_no_pytest() -> None:
    code = (
        "import sys\nsys.modules['pytest'] = None\n"
        "from faithmap import conformance\n"
        "results = conformance.check_metric('drop')\n"
        "assert results and not conformance.failures(results)\n"
        "try:\n    conformance.parametrized('metric')\n"
        "except conformance.RequestError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install pytest" in done.stdout
