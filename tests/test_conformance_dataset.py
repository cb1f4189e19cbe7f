"""The kit's checks of datasets: for each a dataset that breaks one promise, and is told which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from faithmap import conformance, registry
from faithmap.errors import DataError, RequestError
from faithmap.records import Sample, SampleList

Listing = Callable[[], Any]
CALLS: list[int] = []


pytestmark = pytest.mark.usefixtures("own_plugins")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Forget what a test calls."""
    yield
    CALLS.clear()


def sample(index: int) -> Sample:
    """Noise of 40 x 60 pixels with a mask and its box."""
    image = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(index))
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[10:30, 15 + index : 40 + index] = True
    box = torch.tensor([[15.0 + index, 10.0, 40.0 + index, 30.0]])
    return Sample(f"image-{index}", lambda: image, index % 2, lambda: box, lambda: mask)


def good() -> list[Sample]:
    """Eight samples that keep every promise."""
    return [sample(index) for index in range(8)]


def changed(**fields: Any) -> Listing:
    """The good samples with other fields."""
    return lambda: [replace(one, **fields) for one in good()]


def checked(listing: Listing, **facts: Any) -> tuple[conformance.Result, ...]:
    """The kit on a dataset, with facts of a well-behaved one but for those given."""

    def planted() -> Any:
        """A dataset that a test plants."""
        return listing()

    facts = {
        "version": 1,
        "source": "a test",
        "license": "CC0-1.0",
        "revision": "1",
        "gives": {"label", "box", "mask"},
    } | facts
    registry.dataset(name="planted", **facts)(planted)
    return conformance.check_dataset(planted)


def failing(results: tuple[conformance.Result, ...]) -> dict[str, str]:
    return {result.check: result.message for result in results if result.status == "failed"}


def test_a_good_dataset_passes_everything() -> None:
    results = checked(good)
    assert {result.status for result in results} == {"passed"}, results
    assert [result.check for result in results] == conformance.check_names("dataset")


def raising() -> list[Sample]:
    raise FileNotFoundError("no such folder")


def shuffled() -> list[Sample]:
    CALLS.append(1)
    return good()[:: -1 if len(CALLS) > 1 else 1]


def drawn() -> list[Sample]:
    return [replace(one, image=lambda: torch.rand(3, 40, 60)) for one in good()]


def unreadable() -> torch.Tensor:
    raise DataError("the file is cut off")


MASK = torch.zeros(40, 60, dtype=torch.bool)
CORNER = MASK.clone()
CORNER[:5, :5] = True

BROKEN: list[tuple[str, Listing, dict[str, Any], str]] = [
    ("check_facts", good, {"license": ""}, "CC BY 4.0"),
    ("check_facts", good, {"gives": {"label", "boxes"}}, "gives names 'boxes'"),
    ("check_listing", raising, {}, "RequestError"),
    ("check_listing", list, {}, "no samples are listed"),
    ("check_listing", lambda: [{"id": "a"}], {}, "Yield Sample("),
    ("check_revision", good, {"revision": ""}, "a date, tag or hash"),
    ("check_ids", changed(id="one"), {}, "'one' is given twice"),
    ("check_ids", lambda: [replace(one, id=f"/data/{one.id}") for one in good()], {}, "below the root"),
    ("check_ids", lambda: [replace(one, id=i) for i, one in enumerate(good())], {}, "Name each image"),
    ("check_labels", changed(label="moth"), {}, "Count the classes from 0"),
    ("check_labels", changed(mask=None), {}, "no sample has a mask"),
    ("check_deterministic", shuffled, {}, "Sort what a folder gives"),
    ("check_deterministic", drawn, {}, "Seed what is drawn by the image"),
    ("check_images", changed(image=255 * torch.ones(3, 40, 60)), {}, "Divide bytes by 255"),
    ("check_images", changed(image=unreadable), {}, "the file is cut off"),
    ("check_truths", changed(boxes=torch.tensor([[10.0, 15.0, 30.0, 80.0]])), {}, "columns first"),
    ("check_truths", changed(boxes=torch.tensor([[0.2, 0.2, 0.6, 0.8]])), {}, "pixels, not shares"),
    ("check_truths", changed(boxes=torch.tensor([15.0, 10.0, 40.0, 30.0])), {}, "(K, 4)"),
    ("check_truths", changed(mask=MASK), {}, "is empty"),
    ("check_truths", changed(void=torch.ones(40, 60)), {}, "leaves open what a pixel belongs to"),
    ("check_truths", changed(mask=CORNER), {}, "Mask and boxes are both of the labelled object"),
]


@pytest.mark.parametrize(
    ("check", "listing", "facts", "advice"),
    [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(BROKEN)],
)
def test_a_broken_promise_is_told_by_its_check_alone(
    check: str, listing: Listing, facts: dict[str, Any], advice: str
) -> None:
    found = failing(checked(listing, **facts))
    assert set(found) == {check}, found
    assert advice in found[check]


def test_a_void_of_another_size_is_told() -> None:
    found = failing(checked(changed(void=torch.zeros(30, 60))))
    assert set(found) == {"check_images", "check_truths"}
    assert "Give void= only beside mask=" in found["check_truths"]


def test_a_mask_of_another_size_is_told() -> None:
    found = failing(checked(changed(mask=torch.ones(20, 30, dtype=torch.bool))))
    assert "the core moves it with every resize" in found["check_truths"]


def test_every_check_has_a_dataset_that_breaks_it() -> None:
    assert {case[0] for case in BROKEN} == set(conformance.check_names("dataset"))


def test_a_revision_may_come_with_the_samples() -> None:
    assert failing(checked(lambda: SampleList(good(), revision="abc"), revision="")) == {}


def test_one_image_that_cannot_be_read_costs_itself_alone() -> None:
    assert failing(checked(lambda: [*good(), replace(sample(9), id="cut", image=unreadable)])) == {}


def test_what_is_not_at_hand_is_skipped_and_can_be_named(tmp_path: Path) -> None:
    def elsewhere() -> list[Sample]:
        raise RequestError("no such folder; give root=")

    results = checked(elsewhere)
    assert {result.check for result in results if result.status == "passed"} == {"check_facts"}
    assert {result.status for result in results if result.check != "check_facts"} == {"skipped"}
    found = conformance.check_dataset("shapes[n=9]", params={"split": "val"})
    assert all(result.status == "passed" for result in found)


def test_truths_are_no_duty() -> None:
    results = checked(changed(boxes=None, mask=None), gives={"label"})
    assert {r.check for r in results if r.status == "skipped"} == {"check_truths"}
