"""Let torchvision be imported where its compiled part does not load.

On Linux the torchvision of the package index is built for CUDA. Beside a CPU build of torch its
compiled part fails to load, silently, and `import torchvision` then dies of `operator
torchvision::nms does not exist`; timm and pytorch-grad-cam die with it. Nothing that faithmap uses
needs the compiled part, only that the schemas of two operators exist. They are declared here just
before torchvision is first imported, whoever imports it, and only where the compiled part fails.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

#: Both are registered when torchvision is imported; `nms` alone is not enough for 0.28.
OPERATORS = ("nms", "qnms")

#: Operators live as long as the library object that declared them.
_library: Any = None
_outcome = ""


class _Finder(MetaPathFinder):
    """Finds torchvision as the other finders do, with a loader that mends its operators first.

    The work waits for the import itself: others look with `find_spec` whether torchvision is
    installed, and a look must not load torch.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Mending(spec.loader)
                return spec
        return None


class _Mending(Loader):
    """Steps aside for the real loader once the operators are mended."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        spec.loader = self._loader
        _mend(spec)
        return self._loader.create_module(spec)


def install() -> None:
    """Put the finder before all others, unless it is there already or torchvision is imported."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def state() -> str:
    """Say in words what became of torchvision's operators; imports torchvision if need be."""
    try:
        torchvision = importlib.import_module("torchvision")
    except Exception as error:
        return f"torchvision cannot be imported: {type(error).__name__}: {error}"
    return f"torchvision {torchvision.__version__}, {_outcome or 'imported before faithmap, left as it was'}"


def _mend(spec: ModuleSpec) -> None:
    """Declare the operators' schemas if none of torchvision's compiled files loads."""
    global _library, _outcome
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    if not sys.platform.startswith("linux"):
        # The mismatch is a matter of Linux builds; elsewhere torchvision loads its own way.
        _outcome = "native operators"
        return
    import torch

    for folder in spec.submodule_search_locations or ():
        for file in sorted(Path(folder).glob("_C*.so")):
            try:
                torch.ops.load_library(str(file))
            except OSError:
                continue
            _outcome = "native operators"
            return
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in OPERATORS:
            _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _outcome = (
        "operator schemas only: its compiled part does not load beside this build of torch; "
        "all that faithmap uses works, nms, roi_align and deform_conv2d do not"
    )
