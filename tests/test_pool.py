"""The images beside those of a batch: who is asked, how often, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hues import HEIGHT, WIDTH, hue_images, hue_model

import slow_metrics_again as slow
from faithmap import pool as pools
from faithmap.data import choose, part_of
from faithmap.models import Model
from faithmap.pool import Pool
from faithmap.records import Sample


def samples(count: int = 30, broken: int = -1, wrong: int = -1) -> list[Sample]:
    images, labels = hue_images(count)
    return [
        Sample(
            f"hue-{i}",
            Path("nowhere.png") if i == broken else images[i],
            int(labels[i] + 1) % 5 if i == wrong else int(labels[i]),
        )
        for i in range(count)
    ]


@pytest.fixture
def hues() -> Model:
    return hue_model()


def test_members_are_the_first_of_the_image_s_own_part_in_the_run_s_order(hues: Model) -> None:
    everything = samples()
    pool = Pool(everything, hues)
    for sample in everything[:8]:
        part = part_of(sample.id)
        expected = choose(everything, part, None)
        assert pool.members(sample.id, 99) == expected
        assert pool.members(sample.id, 3) == expected[:3]
        assert {part_of(member.id) for member in pool.members(sample.id, 99)} == {part}


def test_images_without_a_label_are_no_members(hues: Model) -> None:
    images, _ = hue_images(2)
    bare = Pool([Sample("a", images[0]), Sample("b", images[1], 1)], hues, split=lambda _: "")
    assert [member.id for member in bare.members("a", 9)] == ["b"]
    assert Pool([Sample("a", images[0])], hues).members("a", 9) == ()


def test_an_image_is_classified_once_and_read_once_while_there_is_room(hues: Model) -> None:
    loads: list[str] = []
    images, labels = hue_images(6)

    def lazily(i: int) -> Sample:
        return Sample(f"hue-{i}", lambda: loads.append(f"hue-{i}") or images[i], int(labels[i]))

    everything = [lazily(i) for i in range(6)]
    pool = Pool(everything, hues, split=lambda _: "")
    with hues.counting() as meter:
        said = [pool.opinion(sample) for _ in range(2) for sample in everything]
    assert meter.forwards == 6 and len(loads) == 6
    assert [opinion.predicted for opinion in said[:6] if opinion] == labels[:6].tolist()
    chances = hues(images).softmax(1).gather(1, labels[:, None])[:, 0].tolist()
    assert [opinion.confidence for opinion in said[:6] if opinion] == pytest.approx(chances, abs=1e-6)


def test_kept_images_are_bounded_and_read_again(hues: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "KEPT_BYTES", 3 * 3 * HEIGHT * WIDTH * 4)
    everything = samples(6)
    pool = Pool(everything, hues, split=lambda _: "")
    first = pool.image(everything[0])
    assert first is not None
    for sample in everything:
        pool.image(sample)
    assert len(pool._images) == 3
    again = pool.image(everything[0])
    assert again is not None and torch.equal(first, again)
    pool.release()
    assert not pool._images


def test_partners_are_of_other_classes_right_and_sure_and_follow_from_the_ids(hues: Model) -> None:
    everything = samples(broken=7, wrong=3)
    pool = Pool(everything, hues, split=lambda _: "")
    known = []
    for sample in everything:
        said = pool.opinion(sample)
        assert (said is None) == (sample.id == "hue-7")
        if said is not None:
            assert sample.label is not None
            known.append((sample.id, sample.label, said.predicted, said.confidence))
    bar = sorted(entry[3] for entry in known)[10]
    for sample in everything[:6]:
        assert sample.label is not None
        found = [other.id for other in pool.partners(sample.id, sample.label, 3, bar, 99)]
        assert found == slow.partners(sample.id, sample.label, known, bar)
        assert "hue-7" not in found and "hue-3" not in found and sample.id not in found
    # Whoever asks, in whichever order: the same.
    other = Pool(everything[::-1], hues, split=lambda _: "")
    for sample in everything[5::-1]:
        assert sample.label is not None
        once = [o.id for o in pool.partners(sample.id, sample.label, 3, bar, 99)]
        assert [o.id for o in other.partners(sample.id, sample.label, 3, bar, 99)] == once


def test_there_may_be_too_few(hues: Model) -> None:
    pool = Pool(samples(), hues, split=lambda _: "")
    assert len(pool.partners("hue-0", 0, 9, 0.5, 99)) == 4
    assert pool.partners("hue-0", 0, 3, 1.0, 99) == ()
    assert len(pool.partners("hue-0", 0, 3, 0.5, 3)) <= 3


def test_sizes_are_tried_once_and_not_counted() -> None:
    for fixed, taken in ((False, True), (True, False)):
        model = hue_model(fixed)
        pool = Pool(samples(), model)
        with model.counting() as meter:
            assert pool.takes((2 * HEIGHT, 2 * WIDTH)) is taken
            assert pool.takes((HEIGHT, WIDTH))
        assert meter.forwards == 0


def test_a_lack_of_memory_is_no_answer() -> None:
    model = hue_model()

    def out_of_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no")

    model.module.forward = out_of_memory  # type: ignore[method-assign, assignment]
    with pytest.raises(torch.OutOfMemoryError):
        Pool(samples(), model).takes((HEIGHT, WIDTH))
