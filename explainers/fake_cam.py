"""Control: Fake-CAM (Poppi et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(
    version=1, source="Poppi et al. 2021 (arXiv:2104.10252), Fake-CAM",
    class_specific=False, forwards=0, backwards=0, role="control",
)  # fmt: skip
def fake_cam(model: Model, batch: Batch) -> Maps:
    """Ones, but for a single zero in the upper left corner: it unmasks scores that reward brightness.

    Shape (B, H, W); range {0, 1}.

    Args:
        model: not used.
        batch: images; only their size counts.
    """
    maps = batch.images.new_ones(len(batch), *batch.size)
    maps[:, 0, 0] = 0
    return maps
