"""The order of removal, the fills and the masked forward passes."""

from __future__ import annotations

import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import slow_metrics as slow
from faithmap import perturb
from faithmap.errors import RequestError

SIDE = 12


@st.composite
def fields(draw: st.DrawFn, levels: int) -> Tensor:
    """A map of 2 to 6 pixels a side with at most `levels` values: plateaus, and zeros of either sign."""
    height, width = draw(st.integers(2, 6)), draw(st.integers(2, 6))
    values = draw(st.lists(st.integers(-levels, levels), min_size=height * width, max_size=height * width))
    return torch.tensor(values, dtype=torch.float32).view(height, width) / 4 * -1.0


@settings(max_examples=60, deadline=None)
@given(fields(levels=3), st.integers(0, 5), st.booleans())
def test_ranks_are_the_lexicographic_order(values: Tensor, seed: int, coarse: bool) -> None:
    ties = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed))
    if coarse:  # ties within the tie field fall back to the pixel's index
        ties = (ties * 2).round()
    ranks = perturb.removal_ranks(values[None], ties[None])[0]
    assert ranks.argsort().tolist() == slow.removal_order(values, ties)
    both = perturb.removal_ranks_both(values[None], ties[None])[:, 0]
    assert torch.equal(both[0], ranks)
    assert both[1].argsort().tolist() == slow.removal_order(-values, ties)
    shared = perturb.removal_ranks_both(values[None], ties[None], perturb.tie_order(ties[None]))
    assert torch.equal(shared[:, 0], both)


def test_ranks_of_a_batch_are_those_of_its_images() -> None:
    maps, ties = torch.randn(3, 8, 9).round(), torch.rand(3, 8, 9)
    both = perturb.removal_ranks_both(maps, ties)
    assert both.dtype == torch.int32
    for i in range(3):
        assert torch.equal(both[:, i : i + 1], perturb.removal_ranks_both(maps[i : i + 1], ties[i : i + 1]))


def test_ties_do_not_depend_on_memory_order() -> None:
    maps = torch.randint(-1, 2, (2, 7, 5)).float()
    ties = torch.rand(2, 7, 5)
    turned = maps.transpose(1, 2).contiguous().transpose(1, 2)
    strided = torch.stack([maps, maps + 1], -1)[..., 0]
    expected = perturb.removal_ranks(maps, ties)
    assert torch.equal(perturb.removal_ranks(turned, ties), expected)
    assert torch.equal(perturb.removal_ranks(strided, ties), expected)


def test_a_constant_map_is_ordered_by_the_tie_field_alone() -> None:
    ties = torch.rand(1, 4, 4)
    both = perturb.removal_ranks_both(torch.zeros(1, 4, 4), ties)
    assert torch.equal(both[0], both[1])
    assert torch.equal(both[0, 0].argsort(), ties.flatten().argsort(descending=True))


def test_signed_zeros_are_one_value() -> None:
    ties = torch.rand(1, 4, 4)
    signs = torch.where(torch.rand(1, 4, 4) > 0.5, -0.0, 0.0)
    assert torch.equal(perturb.removal_ranks(signs, ties), perturb.removal_ranks(torch.zeros(1, 4, 4), ties))


@given(fields(levels=2))
@settings(max_examples=30, deadline=None)
def test_tied_share_counts_values_that_occur_twice(values: Tensor) -> None:
    listed = (values + 0.0).flatten().tolist()
    expected = sum(listed.count(value) > 1 for value in listed) / len(listed)
    assert perturb.tied_share(values[None]).item() == pytest.approx(expected)


def test_step_counts_are_the_published_ones() -> None:
    published = [0, 5017, 10035, 15052, 20070, 25088, 30105, 35123, 40140, 45158]
    assert perturb.step_counts(224 * 224) == published


def test_black_and_mean_are_one_colour() -> None:
    images = slow.random_images(2, SIDE)
    black, mean = perturb.make_fill("black", images), perturb.make_fill("mean", images)
    assert black is not None
    assert black.shape == (2, 3, 1, 1)
    assert not black.any()
    assert mean is not None
    assert torch.allclose(mean[1, 2], images[1, 2].mean())


def test_blur_is_a_gaussian_of_a_tenth_of_the_side() -> None:
    images = slow.random_images(2, 40)[:, :, :30]
    blurred = perturb.make_fill("blur", images)
    assert blurred is not None
    expected = scipy.ndimage.gaussian_filter(
        images.double().numpy(), sigma=3, axes=(2, 3), mode="mirror", truncate=3
    )
    assert torch.allclose(blurred.double(), torch.from_numpy(expected), atol=1e-5)


def test_an_unknown_fill_names_the_known_ones() -> None:
    with pytest.raises(
        RequestError, match=r"unknown fill 'grey'; known are: black, mean, blur, noisy-linear"
    ):
        perturb.make_fill("grey", slow.random_images(1, SIDE))
    assert perturb.make_fill("noisy-linear", slow.random_images(1, SIDE)) is None


def _smooth(side: int, seed: int) -> Tensor:
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)


def _masks(side: int, seed: int) -> dict[str, Tensor]:
    """Kept pixels (side, side) of many shapes: single pixels, cells, the centre, the rim, a half plane."""
    generator = torch.Generator().manual_seed(seed)
    grid = F.interpolate(torch.rand(1, 1, 7, 7, generator=generator), size=(side, side), mode="bilinear")[
        0, 0
    ]
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    orders = {
        "pixels": torch.rand(side, side, generator=generator),
        "cells": grid,
        "centre": -(y**2 + x**2),
        "rim": y**2 + x**2,
        "half": x,
    }
    return {
        f"{name} {share}": order.flatten().argsort(descending=True).argsort().view(side, side)
        >= int(side**2 * share)
        for name, order in orders.items()
        for share in (0.1, 0.5, 0.9)
    }


@pytest.mark.parametrize("side", [32, 45])
@pytest.mark.parametrize("kind", ["smooth", "white noise"])
def test_noisy_linear_is_close_to_the_exact_solution(side: int, kind: str) -> None:
    image = _smooth(side, seed=side) if kind == "smooth" else slow.random_images(1, side)
    masks = _masks(side, seed=3)
    keep = torch.stack(list(masks.values())).unsqueeze(1)
    filled = perturb.noisy_linear(image.expand(len(keep), -1, -1, -1), keep, torch.zeros(()))
    for name, one, result in zip(masks, keep, filled, strict=True):
        error = (result - slow.noisy_linear_exact(image[0], one[0])).abs().max().item()
        assert error < (0.01 if kind == "smooth" else 0.03), name


def test_noisy_linear_keeps_what_stays_and_clips_the_rest() -> None:
    images = slow.random_images(2, 15)
    keep = torch.rand(2, 1, 15, 15) > 0.6
    filled = perturb.noisy_linear(images, keep, 5 * torch.randn(2, 3, 15, 15))
    stays = keep.expand_as(images)
    assert torch.equal(filled[stays], images[stays])
    assert filled.min() >= 0
    assert filled.max() <= 1


def test_noisy_linear_reproduces_a_plain_colour_at_any_size() -> None:
    for height, width in ((1, 1), (2, 3), (5, 4), (17, 33)):
        images = torch.full((1, 3, height, width), 0.3)
        keep = torch.zeros(1, 1, height, width, dtype=torch.bool)
        keep[..., 0, 0] = True
        assert torch.allclose(perturb.noisy_linear(images, keep, torch.zeros(())), images, atol=1e-5)


def test_noisy_linear_fills_the_mean_colour_where_nothing_stays() -> None:
    images = slow.random_images(1, 20)
    filled = perturb.noisy_linear(images, torch.zeros(1, 1, 20, 20, dtype=torch.bool), torch.zeros(()))
    assert torch.allclose(filled, images.mean((2, 3), keepdim=True).expand_as(images))


@pytest.mark.parametrize("fill", ["black", "mean", "blur"])
def test_masked_logits_are_those_of_images_masked_by_hand(fill: str) -> None:
    model = slow.model_of(slow.Glance(), SIDE)
    images, maps, ties = (
        slow.random_images(3, SIDE),
        torch.randn(3, SIDE, SIDE).round(),
        torch.rand(3, SIDE, SIDE),
    )
    colours = perturb.make_fill(fill, images)
    assert colours is not None
    counts = [5, 70, 144]
    logits = perturb.masked_logits(model, images, perturb.removal_ranks_both(maps, ties), counts, colours)
    assert logits.shape == (2, 3, 3, 4)
    for i in range(3):
        for r, signed in enumerate((maps[i], -maps[i])):
            order = slow.removal_order(signed, ties[i])
            for k, count in enumerate(counts):
                masked = slow.without(images[i], order[:count], colours[i].expand(3, SIDE, SIDE))
                assert torch.allclose(logits[r, i, k], model(masked[None])[0], atol=1e-5)


@pytest.mark.parametrize("fill", perturb.FILL_NAMES)
def test_chunks_do_not_matter(cnn: perturb.Model, fill: str) -> None:
    images = slow.random_images(3, 32)
    ranks = perturb.removal_ranks_both(torch.randn(3, 32, 32), torch.rand(3, 32, 32))
    colours, noise = perturb.make_fill(fill, images), 0.01 * torch.randn(3, 3, 32, 32)
    whole = perturb.masked_logits(cnn, images, ranks, [100, 512, 900], colours, noise)
    for chunk in (1, 4, 7, 18):
        parts = perturb.masked_logits(cnn, images, ranks, [100, 512, 900], colours, noise, chunk=chunk)
        assert torch.allclose(parts, whole, atol=1e-5)


def test_masked_passes_leave_no_graph_and_count_their_images(cnn: perturb.Model) -> None:
    images = slow.random_images(2, 32)
    ranks = perturb.removal_ranks_both(torch.randn(2, 32, 32), torch.rand(2, 32, 32))
    with cnn.counting() as meter:
        logits = perturb.masked_logits(cnn, images, ranks, [10, 20], images)
    assert not logits.requires_grad
    assert (meter.forwards, meter.backwards) == (8, 0)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_blend_keeps_the_memory_order(order: torch.memory_format) -> None:
    images = slow.random_images(4, SIDE).contiguous(memory_format=order)
    keep = torch.rand(4, 1, SIDE, SIDE) > 0.5
    for fill in (torch.full((4, 3, 1, 1), 0.25), slow.random_images(4, SIDE, seed=9)):
        blended = perturb.blend(images, keep, fill)
        assert torch.equal(blended, torch.where(keep, images, fill))
        assert blended.is_contiguous(memory_format=order)
    assert torch.equal(
        perturb.blend(images, keep, None), perturb.blend(images, keep, torch.zeros(4, 3, 1, 1))
    )


def test_chunk_size_depends_on_the_size_of_the_images_alone(cnn: perturb.Model) -> None:
    assert perturb.chunk_size(cnn, (224, 224)) == 16
    assert perturb.chunk_size(cnn, (448, 448)) == 8
    assert perturb.chunk_size(cnn) == perturb.chunk_size(cnn, cnn.input_size) == 512
