"""Within a call float32 is float32; a user's own setting of it is as before."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import draw
from torch import Tensor

from faithmap import registry
from faithmap.batch import Batch
from faithmap.explaining import bind, explain_batch, full_float32, undefined
from faithmap.models import Model

CUDNN: Any = torch.backends.cudnn


@pytest.mark.parametrize("before", [True, False])
def test_no_fewer_digits_within(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDNN, "allow_tf32", before)
    with full_float32():
        assert not CUDNN.allow_tf32
    assert CUDNN.allow_tf32 is before
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert CUDNN.allow_tf32 is before


#: In a process of its own: PyTorch mends its older switch no more once one of the others was set.
ALONE = """
import sys
import torch
from faithmap.explaining import full_float32
torch.backends.cudnn.conv.fp32_precision = sys.argv[1]
with full_float32():
    print(torch.backends.cudnn.conv.fp32_precision)
print(torch.backends.cudnn.conv.fp32_precision)
try:
    print(torch.backends.cudnn.allow_tf32)
except RuntimeError:
    print("refused")
"""


@pytest.mark.skipif(not hasattr(CUDNN, "conv"), reason="this PyTorch has one switch for all")
@pytest.mark.parametrize(("before", "read"), [("ieee", "refused"), ("tf32", "True")])
def test_a_switch_for_convolutions_alone_is_kept(before: str, read: str) -> None:
    """Where it differs from that of recurrent networks, PyTorch refuses to read the older switch."""
    done = subprocess.run([sys.executable, "-c", ALONE, before], capture_output=True, text=True, check=True)
    within, after, older = done.stdout.split()
    assert within in ("ieee", "none") and (after, older) == (before, read)


@pytest.mark.usefixtures("own_plugins")
def test_maps_and_trials_of_a_model_are_made_within(
    model: Model, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an explainer, and its own trial of whether it is defined, find the setting to be."""
    seen: dict[str, bool] = {}

    def tried(model: Model) -> None:
        seen["trial"] = CUDNN.allow_tf32

    @registry.explainer(version=1, source="a test", name="watching", defined_for=tried)
    def watching(model: Model, batch: Batch) -> Tensor:
        """The setting, kept."""
        seen["map"] = CUDNN.allow_tf32
        return draw(len(batch), 4, 4)

    monkeypatch.setattr(CUDNN, "allow_tf32", True)
    found = registry.get("explainer", "watching")
    assert not undefined(found, model, frozenset())
    explain_batch(bind(found, {}), model, batch)
    assert seen == {"trial": False, "map": False} and CUDNN.allow_tf32
