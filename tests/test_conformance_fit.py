"""The checks of fitted explainers: for each a method that breaks one promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_cnn, make_vit

from faithmap import conformance, registry
from faithmap.models import Model

pytestmark = pytest.mark.usefixtures("toy_fitted", "home")


def test_the_kit_fits_and_passes() -> None:
    results = conformance.check_explainer("toy-fitted", {"cnn": make_cnn, "vit": make_vit}, slow=False)
    assert not [result for result in results if result.status == "failed"]
    passed = {result.check for result in results if result.status == "passed"}
    assert {"check_fit", "check_resume", "check_maps", "check_batch"} <= passed


class Deaf:
    """A method that keeps checkpoints and never looks at them."""

    def fit(self, model: Model, data: Any, session: Any) -> dict[str, torch.Tensor]:
        """Counts."""
        for step in range(1, 7):
            session.report(step, 6, {"loss": 1 / step})
            session.checkpoint({"step": step}.copy)
        return {"value": torch.ones(())}

    def load(self, model: Model, tensors: dict[str, torch.Tensor]) -> None:
        """Nothing to keep."""

    def __call__(self, model: Model, batch: Any) -> torch.Tensor:
        """Brightness."""
        return batch.images.mean(1)


class Forgetful:
    """A method whose checkpoint lacks its momentum."""

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def fit(self, model: Model, data: Any, session: Any) -> dict[str, torch.Tensor]:
        """Momentum towards one."""
        value, momentum, start = torch.zeros(()), torch.zeros(()), 0
        if state := session.resume():
            value, start = state["value"], state["step"]
        for step in range(start + 1, 7):
            momentum = 0.9 * momentum + (1 - value)
            value = value + 0.1 * momentum
            session.report(step, 6, {"loss": float(1 - value)})
            session.checkpoint({"value": value, "step": step}.copy)
        return {"value": value}

    def load(self, model: Model, tensors: dict[str, torch.Tensor]) -> None:
        """Keep the value."""
        self.value = tensors["value"]

    def __call__(self, model: Model, batch: Any) -> torch.Tensor:
        """Brightness."""
        return batch.images.mean(1) * self.value


class Restless(Forgetful):
    """A method that trains the model."""

    def fit(self, model: Model, data: Any, session: Any) -> dict[str, torch.Tensor]:
        """A weight is changed."""
        with torch.no_grad():
            next(model.module.parameters()).add_(1.0)
        return {"value": torch.ones(())}

    def __call__(self, model: Model, batch: Any) -> torch.Tensor:
        """Brightness."""
        return batch.images.mean(1)


class Random(Restless):
    """A method that draws from the global state."""

    def fit(self, model: Model, data: Any, session: Any) -> dict[str, torch.Tensor]:
        """Not seeded by the session."""
        return {"value": torch.rand((), generator=STREAM)}

    def __call__(self, model: Model, batch: Any) -> torch.Tensor:
        """Brightness."""
        return batch.images.mean(1)


STREAM = torch.Generator()


@pytest.mark.parametrize(
    ("method", "check", "words"),
    [
        (Forgetful, "check_resume", "the same curve"),
        (Deaf, "check_resume", "begins at its first step again"),
        (Restless, "check_fit", "after the fit, weights"),
        (Random, "check_fit", "two fits with the same seed differ"),
    ],
)
def test_the_kit_finds_a_bad_fit(method: type, check: str, words: str) -> None:
    facts = {"forwards": 0, "backwards": 0, "class_specific": False}
    registry.explainer(version=1, source="a test", name=f"planted-{method.__name__}", **facts)(method)
    results = conformance.check_explainer(f"planted-{method.__name__}", {"cnn": make_cnn}, slow=False)
    found = {result.check: result.message for result in results if result.status == "failed"}
    assert set(found) == {check}, found
    assert words in found[check]


class Clear:
    """A method that gives the images back as they were."""

    def __call__(self, model: Model, batch: Any) -> torch.Tensor:
        """Brightness."""
        return batch.images.mean(1)

    def reconstruct(self, model: Model, batch: Any) -> torch.Tensor:
        """The images."""
        return batch.images.clone()


class Loud(Clear):
    """A method whose reconstruction leaves the range."""

    def reconstruct(self, model: Model, batch: Any) -> torch.Tensor:
        """Twice the images."""
        return 2 * batch.images + 0.1


class Sociable(Clear):
    """A method that looks at the whole batch."""

    def reconstruct(self, model: Model, batch: Any) -> torch.Tensor:
        """The batch's mean image, for all."""
        return batch.images.mean(0, keepdim=True).expand_as(batch.images)


class Moody(Clear):
    """A method that draws from its own stream."""

    def reconstruct(self, model: Model, batch: Any) -> torch.Tensor:
        """Noise."""
        return torch.rand(batch.images.shape, generator=STREAM)


class Untidy(Clear):
    """A method that writes to what it is given."""

    def reconstruct(self, model: Model, batch: Any) -> torch.Tensor:
        """The images, brightened in place."""
        return batch.images.mul_(0.5).clone()


class Broken(Clear):
    """A method that fails."""

    def reconstruct(self, model: Model, batch: Any) -> torch.Tensor:
        """Never."""
        raise ValueError("no colours")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Clear, ""),
        (Loud, "returned values from"),
        (Sociable, "in a batch of 3 and alone"),
        (Moody, "two calls of its reconstruct"),
        (Untidy, "its reconstruct changes inputs (images)"),
        (Broken, "its reconstruct raises ValueError: no colours"),
    ],
)
def test_reconstructions_are_tried(method: type, words: str) -> None:
    facts = {"forwards": 0, "backwards": 0, "class_specific": False}
    registry.explainer(version=1, source="a test", name=f"planted-{method.__name__}", **facts)(method)
    results = conformance.check_explainer(f"planted-{method.__name__}", {"cnn": make_cnn}, slow=False)
    found = {result.check: result.message for result in results if result.status == "failed"}
    assert "check_reconstruct" in {result.check for result in results}
    assert set(found) == ({"check_reconstruct"} if words else set()), found
    assert words in found.get("check_reconstruct", "")
