"""Control: the labelled object itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faithmap import explainer

if TYPE_CHECKING:
    from faithmap.batch import Batch, Maps
    from faithmap.models import Model


@explainer(
    version=1, source="control: the data set's own masks, else boxes",
    class_specific=False, forwards=0, backwards=0, role="control", needs={"region"},
)  # fmt: skip
def oracle(model: Model, batch: Batch) -> Maps:
    """One on the labelled object, zero elsewhere: its mask, else the union of its boxes.

    Where people see the object, which need not be where the model looks. Shape (B, H, W); range
    {0, 1}.

    Args:
        model: not used.
        batch: images with masks or boxes.

    Raises:
        RequestError: the images come with neither.
    """
    from faithmap.errors import RequestError

    region = batch.region()
    if region is None:
        raise RequestError("oracle: the images come with neither masks nor boxes; give either")
    return region.float()
