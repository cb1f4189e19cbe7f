"""faithmap: which heat map can you trust, on this model and this data, at what cost?

The public names are imported on first use, so that `import faithmap` itself stays light: it loads
neither torch nor any plugin.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faithmap._torchvision import install

if TYPE_CHECKING:
    from faithmap.api import explain, reconstruct, score
    from faithmap.batch import Batch, Maps, Scored, Values
    from faithmap.config import Config
    from faithmap.errors import FaithmapError
    from faithmap.models import Model, load_model
    from faithmap.records import Sample
    from faithmap.registry import dataset, explainer, metric
    from faithmap.runner import Run, run

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Config",
    "FaithmapError",
    "Maps",
    "Model",
    "Run",
    "Sample",
    "Scored",
    "Values",
    "__version__",
    "dataset",
    "explain",
    "explainer",
    "load_model",
    "metric",
    "reconstruct",
    "run",
    "score",
]

# No module of the package may bear one of these names: once imported, it would take the name's place.
_HOMES = {
    "Batch": "batch",
    "Config": "config",
    "FaithmapError": "errors",
    "Maps": "batch",
    "Model": "models",
    "Run": "runner",
    "Sample": "records",
    "Scored": "batch",
    "Values": "batch",
    "dataset": "registry",
    "explain": "api",
    "explainer": "registry",
    "load_model": "models",
    "metric": "registry",
    "reconstruct": "api",
    "run": "runner",
    "score": "api",
}

# In a checkout the rooms of plugins lie beside bench/, in an installed wheel inside the package.
_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "bench" / "faithmap").is_dir():
    __path__.append(str(_checkout))

install()


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'faithmap' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"faithmap.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
