"""Attention maps of vision transformers and their gradients, which several explainers of a batch share.

timm's attention builds no map while it is fused, and hands none out when it is not. For one forward pass
fusion is switched off; a hook on the dropout behind each softmax keeps the map, and a watch on torch's
softmax keeps the scores that went in. No code of the models is repeated, so relative positions,
rotations and norms of queries and keys are all in the scores. The graph begins at the first map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from faithmap.errors import RequestError
from faithmap.models import Model, accounted_for

#: Why the attention of a network cannot be read, or None, by network.
_REASONS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
#: The three spellings of softmax; `nn.Softmax` calls the last.
_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


def unreadable(model: Model) -> str | None:
    """Why the attention maps of a model cannot be read; None where they can.

    The build of the network is looked at first; only where that fits, one uncounted pass of a blank image
    makes sure of the maps. The answer is kept.
    """
    module = model.module
    if module not in _REASONS:
        _REASONS[module] = _misfit(module) or _failed_trial(model)
    return _REASONS[module]


def mix(row: Tensor, matrix: Tensor) -> Tensor:
    """One step from a block to the one before it: rows (B, N) times matrices (B, N, N)."""
    return torch.bmm(row.unsqueeze(1), matrix).squeeze(1)


class Attention:
    """One pass over a batch that keeps the attention of every block; gradients come on demand.

    The forward pass records a graph, which is kept: however many explainers ask, and for whatever class,
    there is one forward pass, and one backward pass a class and kind of gradient. Memory grows with the
    batch, as for any gradient with respect to the image.

    Args:
        model: the model.
        images: (B, 3, H, W) in [0, 1], on the model's device.

    Raises:
        RequestError: the attention of the model cannot be read; `unreadable` says so beforehand.
    """

    def __init__(self, model: Model, images: Tensor) -> None:
        reason = _misfit(model.module)
        if reason:
            raise RequestError(f"model '{model.name}': {reason}")
        size = (int(images.shape[2]), int(images.shape[3]))
        self._tokens = _find_tokens(model.module, size, images.device)
        self._trace = _run(model.module, lambda: model(images), self._tokens)
        self._gradients: dict[tuple[str, bool], list[Tensor]] = {}

    @property
    def maps(self) -> list[Tensor]:
        """Attention (B, heads, N, N) of each block, the first block first; each row adds up to one."""
        return [_wide(attention.detach()) for attention in self._trace.maps]

    @property
    def scores(self) -> list[Tensor]:
        """What each block's softmax took in, (B, heads, R, N): scaled products, of the rows read alone."""
        return [_wide(scores) for scores in self._trace.scores]

    @property
    def read(self) -> Tensor:
        """(N,): the share of each token in what the head of the network reads; adds up to one.

        The class token where it alone is read. DeiT's distilled networks average the logits of class
        and distillation token: half each. Otherwise the tokens that are pooled, all alike.
        """
        return self._tokens.read

    def gradients(self, targets: Tensor) -> list[Tensor]:
        """Gradients (B, heads, N, N) of the target logits with respect to each block's map."""
        return self._backward(targets, along_skips=False)

    def skip_gradients(self, targets: Tensor) -> list[Tensor]:
        """Gradients (B, heads, R, N), of the rows read, that reach each map past all later attention.

        They come down the skip connections and through the MLPs alone: what a block's attention takes in is
        held constant. Without attention nothing mixes tokens, so all other rows are zero where the
        head reads tokens one by one.
        """
        return self._backward(targets, along_skips=True)

    def start(self) -> Tensor:
        """(B, N): the shares in `read`, once an image; what a product over the blocks begins with."""
        first = _wide(self._trace.maps[0][:, 0, 0].detach())
        return self.read.to(first.dtype).expand(len(first), -1)

    def fold(self, tokens: Tensor) -> Tensor:
        """Bring a value a token (B, N) to the grid of patches (B, h, w); prefix tokens are left out."""
        return tokens[:, self._tokens.prefix :].reshape(len(tokens), *self._tokens.grid)

    def _backward(self, targets: Tensor, along_skips: bool) -> list[Tensor]:
        key = (",".join(str(int(target)) for target in targets), along_skips)
        if key not in self._gradients:
            trace = self._trace
            with torch.enable_grad():  # whoever asks may have switched gradients off
                chosen = trace.logits.gather(1, targets.view(-1, 1)).sum()
            trace.switch.on = along_skips
            try:
                gradients = torch.autograd.grad(chosen, trace.maps, retain_graph=True)
            finally:
                trace.switch.on = False
            rows = self._tokens.rows
            self._gradients[key] = [_wide(g[:, :, rows] if along_skips else g) for g in gradients]
        return self._gradients[key]


def _wide(values: Tensor) -> Tensor:
    """Reduced precision ends here: sums and products over blocks are taken in float32."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


@dataclass(frozen=True)
class _Tokens:
    """How the tokens of a network lie: the prefix, then the grid of patches; and which the head reads."""

    prefix: int
    grid: tuple[int, int]
    read: Tensor

    @property
    def rows(self) -> Tensor:
        return self.read.nonzero().flatten()


@dataclass
class _Switch:
    """While on, no gradient passes into what attention takes in.

    An object of its own: the graph holds it, and would keep alive whatever it belonged to.
    """

    on: bool = False

    def __call__(self, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self.on else None


@dataclass
class _Trace:
    """What hooks gather in one forward pass; `maps` and `logits` belong to its graph."""

    maps: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    switch: _Switch = field(default_factory=_Switch)


class _SoftmaxWatch(TorchFunctionMode):
    """Remembers what the last softmax took and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: Tensor | None = None
        self.output: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SOFTMAX:
            self.scores, self.output = args[0] if args else kwargs["input"], result
        return result


def _run(module: nn.Module, forward: Callable[[], Tensor], tokens: _Tokens) -> _Trace:
    """One forward pass with fusion off and hooks in place; all is as before when it ends, or fails."""
    trace, watch = _Trace(), _SoftmaxWatch()
    attentions = [block.attn for block in module.blocks]  # type: ignore[union-attr]
    before = torch.is_grad_enabled()
    with ExitStack() as stack:
        stack.callback(torch.set_grad_enabled, before)
        stack.enter_context(_unfused(attentions))
        for attention in attentions:
            keep = _keep(trace, watch, tokens, attention.num_heads)
            stack.callback(attention.attn_drop.register_forward_hook(keep).remove)
            stack.callback(attention.register_forward_pre_hook(_gate(trace.switch)).remove)
        stack.enter_context(watch)
        torch.set_grad_enabled(False)
        trace.logits = forward()
    if len(trace.maps) != len(attentions):
        raise RequestError(f"{len(trace.maps)} attention maps of {len(attentions)} blocks could be read")
    return trace


@contextmanager
def _unfused(attentions: Sequence[Any]) -> Iterator[None]:
    """Let attention build its map, for as long as the block lasts."""
    flags = [attention.fused_attn for attention in attentions]
    try:
        for attention in attentions:
            attention.fused_attn = False
        yield
    finally:
        for attention, flag in zip(attentions, flags, strict=True):
            attention.fused_attn = flag


def _keep(trace: _Trace, watch: _SoftmaxWatch, tokens: _Tokens, heads: int) -> Callable[..., Tensor]:
    """A hook on the dropout behind a softmax: keeps the map and the scores; the first starts the graph."""
    expected = (heads, len(tokens.read), len(tokens.read))

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        scores, softmax = watch.scores, watch.output
        watch.scores = watch.output = None
        if scores is None or softmax is not inputs[0]:
            raise RequestError("its attention maps are not a softmax of scores")
        if tuple(output.shape[1:]) != expected:
            # Windows, channels in place of tokens, or two maps a head of which one is subtracted.
            raise RequestError(
                f"its attention maps are {tuple(output.shape[1:])}; expected {expected}: one a head, "
                "from all tokens to all tokens"
            )
        if not trace.maps:
            torch.set_grad_enabled(True)
            output = output.detach().requires_grad_()
        trace.maps.append(output)
        trace.scores.append(scores.detach()[:, :, tokens.rows])
        return output

    return hook


def _gate(switch: _Switch) -> Callable[..., tuple[Any, ...] | None]:
    """A hook before attention: what goes in passes gradients back only while the switch is off."""

    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs[0].requires_grad:
            return None
        # A view of its own: what goes in may be the skip connection itself, which must stay open.
        entrance = inputs[0].view_as(inputs[0])
        entrance.register_hook(switch)
        return (entrance, *inputs[1:])

    return hook


def _misfit(module: nn.Module) -> str | None:
    """What in the build of a network forbids to read its attention."""
    advice = "use timm's model of the same architecture"
    if any("Swin" in type(sub).__name__ for sub in module.modules()):
        return "its attention stays within windows, so that no attention map spans the image"
    if any(isinstance(sub, nn.MultiheadAttention) for sub in module.modules()):
        return f"torch.nn.MultiheadAttention does not hand out its attention maps; {advice}"
    if hasattr(module, "config") and hasattr(module.config, "architectures"):
        return f"attention maps are read from timm's vision transformers, not from Hugging Face's; {advice}"
    blocks = getattr(module, "blocks", None)
    if (
        not isinstance(blocks, nn.Sequential | nn.ModuleList)
        or not len(blocks)
        or not hasattr(getattr(module, "patch_embed", None), "dynamic_feat_size")
        or not isinstance(getattr(module, "num_prefix_tokens", None), int)
        or not all(_is_attention(getattr(block, "attn", None)) for block in blocks)
    ):
        return (
            f"attention maps are read from timm's plain vision transformers; {type(module).__name__} is not "
            "a row of blocks with one attention over all tokens each"
        )
    return None


def _is_attention(module: object) -> bool:
    return (
        isinstance(getattr(module, "fused_attn", None), bool)
        and isinstance(getattr(module, "num_heads", None), int)
        and isinstance(getattr(module, "attn_drop", None), nn.Module)
    )


def _failed_trial(model: Model) -> str | None:
    """Why a blank image's attention cannot be read; its pass is not counted."""
    blank = torch.zeros(1, 3, *model.input_size, device=model.device)
    try:
        tokens = _find_tokens(model.module, model.input_size, blank.device)
        with accounted_for():
            _run(model.module, lambda: model.module(model.normalise(blank)), tokens)
    except RequestError as error:
        return str(error)
    return None


def _find_tokens(module: Any, size: tuple[int, int], device: torch.device) -> _Tokens:
    """The layout of a timm transformer's tokens for images of a size (H, W)."""
    height, width = module.patch_embed.dynamic_feat_size(size)
    prefix: int = module.num_prefix_tokens
    read = torch.zeros(prefix + height * width, device=device)
    if hasattr(module, "head_dist"):
        read[:2] = 0.5
    elif getattr(module, "global_pool", "token") == "token":
        read[0] = 1.0
    else:
        # EVA's attention pooling takes in every token; the others say what they take.
        everything = getattr(module, "pool_include_prefix", getattr(module, "attn_pool", None) is not None)
        pooled = read if everything else read[prefix:]
        pooled.fill_(1 / len(pooled))
    return _Tokens(prefix, (int(height), int(width)), read)
