"""What the two streams of a bottleneck come to, in nats: the bounds that gates are judged by.

With Y, whether the class is the one explained, and p(Y | z) the sigmoid of the log-odds that the tail gives
a stream z (see `faithmap.streams`):

- I(Z_d; Y) >= H(Y) - E[-log p(Y | z_d)] (Barber and Agakov 2003): the cross-entropy says what the
  discriminative stream has lost of the class, beside that of the untouched features and of noise alone.
- I(Z_d; A) <= E KL(z_d given A || noise): the information that gates let pass.
- I(Z_n; Y) <= E KL(p(Y | z_n) || pi), for any prior pi: what the noise stream tells of the class. The
  training's term is this KL the other way round, and only where the stream speaks for the class.

Expectations over images are left to whoever averages; what stands here is of single images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from faithmap.cuts import Tail
from faithmap.streams import Features, Gates, noisy_odds, signed_pairs


@dataclass(frozen=True)
class StreamReport:
    """What some gates come to for each of n images; all (n,), in nats."""

    #: E[-log p(Y = 1 | z_d)]: the cross-entropy of the discriminative stream.
    kept: Tensor
    #: -log p(Y = 1 | A): that of the untouched features.
    clean: Tensor
    #: E[-log p(Y = 1 | eps)]: that of noise alone.
    noise: Tensor
    #: KL of z_d given A from the noise, summed over all features: the bound of I(Z_d; A). The loss has its
    #: mean over them.
    information: Tensor
    #: E KL(p(Y | z_n) || pi): the bound of I(Z_n; Y).
    bound: Tensor
    #: The part of that bound that comes of draws which speak for the class: evidence that the noise stream
    #: still has, such as what goes round the gates. The rest speaks against the class and is let pass.
    leak: Tensor


def belief_divergence(score: Tensor, prior: Tensor) -> Tensor:
    """KL( p || pi ) in nats of two binary variables given by their log-odds, p by the first."""
    p = score.sigmoid()
    value = p * (F.logsigmoid(score) - F.logsigmoid(prior))
    return value + (1 - p) * (F.logsigmoid(-score) - F.logsigmoid(-prior))


def stream_report(
    tail: Tail,
    features: Features,
    gates: Gates,
    generators: Sequence[torch.Generator],
    *,
    samples: int = 64,
    chunk: int = 256,
) -> StreamReport:
    """What the gates of n images come to, image by image (InfoCAM, reconstruction: bounds a to c).

    Noise alone uses the draws of the discriminative stream, so that the two meet where all gates are shut; pi
    is the sigmoid of its mean log-odds. Takes 3 samples + 1 passes of the tail an image, none with a
    gradient.

    Args:
        tail: gives logits.
        features: of n images.
        gates: theirs.
        generators: one an image; noise (2, samples / 2, ...) is drawn from each, that of the
            discriminative stream first.
        samples: draws of each stream, an even number: half of them are the others' negatives.
        chunk: copies in one pass.
    """
    drawn = signed_pairs(generators, (2, samples // 2, *tail.shape), features.values)
    alone = tail.summarise(features.mean, features.std)
    centres, spreads = gates.streams(features)
    scores = []
    with torch.no_grad():
        for stream in range(2):
            mixed = tail.summarise(centres[:, stream], spreads[:, stream])
            scores.append(noisy_odds(tail, *mixed, drawn[:, stream], features.targets, chunk))
        blind = noisy_odds(tail, *alone, drawn[:, 0], features.targets, chunk)
        centre, _ = tail.summarise(features.values, torch.zeros_like(features.values))
        still = torch.zeros_like(drawn[:, 0, :1])
        seen = noisy_odds(tail, centre, torch.zeros_like(centre), still, features.targets, chunk)
    prior = blind.mean(1, keepdim=True)
    told = belief_divergence(scores[1], prior)
    return StreamReport(
        kept=F.softplus(-scores[0]).mean(1),
        clean=F.softplus(-seen).mean(1),
        noise=F.softplus(-blind).mean(1),
        information=gates.nats(features).sum((1, 2)),
        bound=told.mean(1),
        leak=(told * (scores[1] > prior)).mean(1),
    )


def joined(reports: Iterable[StreamReport]) -> StreamReport:
    """The reports of parts of a batch as one."""
    parts = list(reports)
    return StreamReport(
        **{
            each.name: torch.cat([getattr(part, each.name) for part in parts])
            for each in fields(StreamReport)
        }
    )
