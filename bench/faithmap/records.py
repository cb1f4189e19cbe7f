"""The frozen records that the parts of faithmap hand to each other.

Nothing here imports torch: the command line, the registry and the leaderboard stay light.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import PIL.Image
    import torch

Kind = Literal["explainer", "metric", "dataset"]
Role = Literal["method", "control", "null"]
Status = Literal["ok", "empty", "failed", "skipped"]
Direction = Literal["higher", "lower", "none"]

#: Families of models that explainers may be defined for.
FAMILIES = ("cnn", "vit")
#: The null that calibrates every score and stands in for maps that failed.
REFERENCE_NULL = "random-grid"
#: The folder of a run's variants within the run's.
VARIANTS = "variants"
#: The score that ranks a board.
PRIMARY_SCORE = "auc_d"


def canonical_json(value: Any) -> str:
    """Write a value as JSON in the one form that keys and rows use: sorted, without spaces.

    >>> canonical_json({"b": 1, "a": (2, 0.5)})
    '{"a":[2,0.5],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def digest(*parts: Any, length: int = 16) -> str:
    """Hash values through their canonical JSON: a short hexadecimal key, equal on every machine."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:length]


#: What a line of a request says of itself: these keys never reach a plugin.
OF_THE_LINE = ("name", "label")


@dataclass(frozen=True, slots=True)
class Spec:
    """A plugin's (or model's) name, the parameters given to it, and its label on a board."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    #: The folder that relative paths among the parameters are relative to; None: the working directory.
    base: Path | None = field(default=None, compare=False)

    @property
    def title(self) -> str:
        """The label if there is one, else the registry name."""
        return self.label or self.name


@dataclass(frozen=True, slots=True)
class Facts:
    """What a plugin declares about itself beside its code."""

    kind: Kind
    name: str
    version: int
    source: str
    #: Families of models that an explainer is defined for; empty means every family.
    families: frozenset[str] = frozenset()
    #: Called with a `Model`, and with the parameters if it takes two arguments; returns None where the
    #: explainer is defined, else the reason why not.
    defined_for: Callable[..., str | None] | None = None
    class_specific: bool = True
    #: Images passed through the model per explained image: a number, or a function of the
    #: parameters and the model. None: not declared.
    forwards: float | Callable[..., float] | None = None
    backwards: float | Callable[..., float] | None = None
    #: Whether the declared counts are met exactly; False where they are upper bounds.
    exact_cost: bool = True
    #: The map is found step by step, so that rounding grows: compared by ranks, not by values.
    iterative: bool = False
    #: Small parameter values with which the conformance kit runs the plugin.
    check_params: Mapping[str, Any] = field(default_factory=dict)
    #: Explainers that are fitted first: the parameters that the fit depends on; None means all of them.
    fit_params: frozenset[str] | None = None
    #: Small options of `fit` with which the conformance kit fits the plugin.
    check_fit: Mapping[str, Any] = field(default_factory=dict)
    #: The plugin uses a library's global random state: call it one image at a time, seeded.
    per_image: bool = False
    role: Role = "method"
    #: What must be known of an image: any of "label", "box", "mask", "region" (box or mask). Metrics may
    #: also need "explainer" and "pool", which the core hands over.
    needs: frozenset[str] = frozenset()
    #: Metrics: score name -> direction.
    scores: Mapping[str, Direction] = field(default_factory=dict)
    #: Metrics: score -> the least and the largest value that it can take at the default parameters.
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    #: Metrics: score -> the per-image score that stands in where a map is empty or failed; "": none.
    fallback: Mapping[str, str] = field(default_factory=dict)
    #: Metrics: scores that describe the image alone, stored whatever became of the map.
    map_free: frozenset[str] = frozenset()
    #: Metrics: also score each method's swapped and rolled maps (protocols: nulls).
    calibrate: bool = False
    #: Metrics: scored on this many images of the run instead of all (the cost metric).
    sample: int | None = None
    #: Metrics: scored where a request names no metrics; False for one that has to be named.
    default: bool = True
    #: Datasets.
    license: str = ""
    revision: str = ""
    citation: str = ""
    gives: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a dataset with what is known of it; big fields may be lazy.

    `image`, `boxes`, `mask` and `void` are each the value itself or a function without arguments that
    gives it, or None where the image has none, called once and only when the image is due.
    """

    #: Unique within the dataset, the same on every machine and at every limit.
    id: str
    #: A path, a PIL image, or a float tensor (3, H, W) with values in [0, 1]. A file is read as a viewer
    #: shows it: turned as its EXIF says, see-through parts on white, 16 bits scaled to 8.
    image: Path | PIL.Image.Image | torch.Tensor | Callable[[], Any]
    label: int | None = None
    #: (K, 4) `x0, y0, x1, y1` in pixels of the image as it is read, all of the labelled class.
    boxes: torch.Tensor | Callable[[], torch.Tensor | None] | None = None
    #: Bool (H, W), true on the labelled object.
    mask: torch.Tensor | Callable[[], torch.Tensor | None] | None = None
    #: The label in words.
    name: str = ""
    #: Bool (H, W), true where the mask leaves open whether a pixel is on the object, such as along outlines:
    #: metrics of localisation look at the other pixels alone. Only beside a mask, and never true where it is.
    void: torch.Tensor | Callable[[], torch.Tensor | None] | None = None


class SampleList(list[Sample]):
    """What a dataset may return to say more than its decorator can: facts that depend on the files."""

    def __init__(
        self, samples: Iterable[Sample], revision: str = "", class_names: Sequence[str] | None = None
    ) -> None:
        """Keep the samples with the revision of their content and the classes' names by label."""
        super().__init__(samples)
        self.revision = revision
        self.class_names = tuple(class_names) if class_names is not None else None


@dataclass(frozen=True, slots=True)
class Row:
    """One value of one score for one image: the only thing that a run stores."""

    model: str
    dataset: str
    explainer: str
    params: str
    map_grid: str
    seed: int
    spec: str
    image_id: str
    label: int | None
    predicted: int | None
    target: int | None
    metric: str
    value: float | None
    status: Status
    reason: str = ""
    curve: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """One explainer on one model and one dataset: a line of the board, or a null's draw."""

    model: str
    dataset: str
    explainer: str
    #: Parameters as stored in the rows, a null's draw included.
    params: Mapping[str, Any]
    map_grid: str
    #: Content key of the cell's maps on the run's grid; names the folder of its rows.
    key: str
    label: str
    role: Role = "method"
    #: "swapped" or "rolled" where the maps are the method's own, moved; else None.
    null: str | None = None
    draw: int | None = None

    @property
    def params_json(self) -> str:
        """The parameters in the canonical form of the rows."""
        return canonical_json(self.params)
