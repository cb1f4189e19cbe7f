"""One forward pass, watched operation by operation, in which every operation follows a relevance rule.

A `Tracer` is a torch function mode: it sees the calls that a network makes, so that the network is neither
rewritten nor copied. Weighted layers, activations, norms and attention are connected to their inputs by
the rules of `_relevance_rules`; what is linear is left to autograd; batch norm is folded into the
convolution before it; fused attention is taken apart on the way. An operation that is not known is refused
by name, so that a map is never silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode, resolve_name

from faithmap._relevance_rules import (
    INPUT_KINDS,
    Layer,
    Rule,
    Sources,
    identity,
    propagate,
    rescaled_sum,
    stabilised,
)
from faithmap.errors import RequestError


@dataclass(frozen=True)
class Rules:
    """Which rule each kind of operation follows.

    Args:
        linear: fully connected layers.
        conv: convolutions, with the batch norm behind them.
        first: the layer that reads the image; None: as others of its kind.
        attention: linear layers within an attention module; None: as other linear layers.
        norm: layer norm: "fixed" (its deviation is a constant, its mean is linear) or "identity"
            (relevance passes entry by entry).
        softmax: "taylor" (x_i (R_i - s_i sum_j R_j), Achtibat et al. 2024, prop. 3.1), "identity"
            (Chefer et al. 2021), or None: networks with attention are refused.
        epsilon: stabiliser of products of two activations.
        rescale: sums of two activations are rescaled (Chefer et al. 2021, sec. 3.2).
    """

    linear: Rule
    conv: Rule
    first: Rule | None = None
    attention: Rule | None = None
    norm: str = "fixed"
    softmax: str | None = None
    epsilon: float = 0.0
    rescale: bool = False

    def __post_init__(self) -> None:
        for name, rule in (("linear", self.linear), ("conv", self.conv), ("attention", self.attention)):
            if rule is not None and rule.kind in INPUT_KINDS:
                raise RequestError(
                    f"relevance rule '{rule.kind}' is for the layer that reads the image; got it for {name}, "
                    "expected epsilon, alpha-beta or gamma"
                )


class Unsupported(RequestError):  # noqa: N818 - it is a reason, shown as one
    """The network holds an operation for which there is no rule."""


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


#: Linear in what they read, or choosing among it (maximum, slices): autograd's own gradient is the rule.
_LINEAR = _names("""
    sub sub_ subtract __sub__ __rsub__ rsub neg __neg__ reshape view view_as reshape_as flatten unflatten
    permute transpose transpose_ swapaxes swapdims moveaxis movedim t T mT squeeze unsqueeze expand expand_as
    repeat contiguous clone cat concat concatenate stack split chunk unbind __getitem__ __iter__ select narrow
    index_select gather roll flip mean sum avg_pool2d adaptive_avg_pool2d max_pool2d max_pool2d_with_indices
    adaptive_max_pool2d pad interpolate pixel_shuffle pixel_unshuffle dropout dropout2d relu relu_
""")
#: Elementwise: relevance passes unchanged.
_ACTIVATIONS = _names("gelu silu relu6 hardtanh hardswish leaky_relu elu celu selu mish tanh")
_ADD = _names("add add_ __add__ __radd__ __iadd__")
_MULTIPLY = _names("mul mul_ multiply __mul__ __rmul__ __imul__")
_DIVIDE = _names("div div_ divide true_divide __truediv__ __itruediv__")
_MATMUL = _names("matmul bmm __matmul__")
#: They write into a tensor or cut it from the graph, where relevance would be lost unseen.
_LOSING = _names("detach detach_ data __setitem__ copy_ index_put_ set_ fill_ masked_fill_")
#: Their results are brought back to the precision of the pass.
_CASTING = _names("to type type_as float double half bfloat16")
#: Operations on the image itself that its companions go through alike.
_CARRIED = _names("pad contiguous clone to float double reshape view flatten unflatten permute transpose")


class Tracer(TorchFunctionMode):
    """Watches one forward pass and connects its operations by rules.

    Args:
        rules: the rules; None leaves every operation to autograd, and only attention is read.
        sources: the image as the network takes it, and its companions.
        attention_weights: weights of linear layers within attention modules.
    """

    def __init__(
        self, rules: Rules | None, sources: Sources, attention_weights: Iterable[Tensor] = ()
    ) -> None:
        super().__init__()
        self.rules = rules
        #: Every softmax over tokens (B, heads, N, N), in the order of the blocks.
        self.attention: list[Tensor] = []
        self.read_image = False
        self._dtype = sources.image.dtype
        self._device = sources.image.device.type
        self._attention_weights = {weight.data_ptr() for weight in attention_weights}
        #: Whether the operation at hand reads one of them.
        self._in_attention = False
        #: What is still the image, if padded or reshaped, with the version that tells work in place.
        self._images = [(sources, sources.image._version)]
        self._convolutions: list[_Convolution] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of every operation."""
        args = tuple(_map(_detached, list(args)))
        kwargs = {key: _map(_detached, value) for key, value in (kwargs or {}).items()}
        if not _depends((args, kwargs)):
            return func(*args, **kwargs)
        self._in_attention = False
        args = tuple(_map(self._cast, list(args)))
        kwargs = {key: _map(self._cast, value) for key, value in kwargs.items()}
        name = _name(func)
        with torch.autocast(self._device, enabled=False):
            if name == "scaled_dot_product_attention":
                return self._attend(*args, **kwargs)
            if name == "softmax":
                return self._softmax(func, *args, **kwargs)
            return func(*args, **kwargs) if self.rules is None else self._by_rule(name, func, args, kwargs)

    def _by_rule(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handler = _HANDLERS.get(name)
        if handler is not None:
            return handler(self, func, *args, **kwargs)
        if name in _LOSING or "out" in kwargs:
            raise Unsupported(f"no relevance rule for '{name}', which cuts or overwrites activations")
        result = func(*args, **kwargs)
        if _depends(result):
            if name in _CASTING:
                result = result.to(self._dtype)
            elif name not in _LINEAR:
                raise Unsupported(f"no relevance rule for the operation '{name}'")
        if name in _CARRIED:
            self._carry(func, args, kwargs, result)
        return result

    def _cast(self, tensor: Tensor) -> Tensor:
        """Constants in the precision of the pass; what depends on the image is in it already."""
        if tensor.requires_grad or not tensor.is_floating_point():
            return tensor
        # Noticed here: a cast weight is another tensor.
        self._in_attention |= tensor.data_ptr() in self._attention_weights
        return tensor.to(self._dtype)

    def _sources(self, tensor: Tensor) -> Sources | None:
        for sources, version in self._images:
            if sources.image is tensor and tensor._version == version:
                return sources
        return None

    def _carry(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        sources = self._sources(args[0])
        if sources is None or result is sources.image:
            return
        others = [func(tensor, *args[1:], **kwargs) for tensor in sources.tensors()[1:]]
        self._images.append((Sources(result, *others), result._version))

    def linear(self, func: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A fully connected layer."""
        assert self.rules is not None
        rule = self.rules.linear
        if self.rules.attention is not None and self._in_attention:
            rule = self.rules.attention
        layer = Layer(F.linear, lambda gradient, weight, _shape: gradient @ weight)
        return self._weighted(rule, layer, inputs, weight, bias, bias)

    def conv2d(
        self,
        func: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """A convolution; it is remembered, for a batch norm may follow that is folded into it."""
        assert self.rules is not None
        if padding == "valid":
            padding = 0
        if isinstance(padding, str):
            raise Unsupported(f"no relevance rule for a convolution with padding '{padding}'")
        geometry = (stride, padding, dilation, groups)
        layer = Layer(
            lambda inputs, weight: F.conv2d(inputs, weight, None, *geometry),
            lambda gradient, weight, shape: conv2d_input(shape, weight, gradient, *geometry),
        )
        planes = None if bias is None else bias.view(-1, 1, 1)
        output = self._weighted(self.rules.conv, layer, inputs, weight, bias, planes)
        self._convolutions.append(_Convolution(output, output._version, layer, inputs, weight, planes))
        return output

    def _weighted(
        self,
        rule: Rule,
        layer: Layer,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        planes: Tensor | None,
    ) -> Tensor:
        if _depends(weight) or _depends(bias):
            raise Unsupported("no relevance rule for a layer whose weights depend on the image")
        with torch.no_grad():
            output = layer.forward(inputs, weight)
            if planes is not None:
                output = output + planes
        return self._connect(rule, layer, output, inputs, weight, planes)

    def _connect(
        self, rule: Rule, layer: Layer, output: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        assert self.rules is not None
        sources = self._sources(inputs)
        if sources is not None and self.rules.first is not None:
            self.read_image = True
            return propagate(self.rules.first, layer, output, sources, weight, bias)
        return propagate(rule, layer, output, inputs, weight, bias)

    def batch_norm(
        self,
        func: Any,
        inputs: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """A batch norm: part of the convolution before it, or a linear layer with one weight a channel."""
        assert self.rules is not None
        if training or running_mean is None or running_var is None:
            raise Unsupported("no relevance rule for a batch norm without running statistics")
        scale = (running_var + eps).rsqrt() * (1.0 if weight is None else weight)
        shift = (0.0 if bias is None else bias) - running_mean * scale
        found = self._convolution_of(inputs)
        if found is None:
            planes = (-1, *[1] * (inputs.ndim - 2))
            return inputs * scale.view(planes) + shift.view(planes)
        with torch.no_grad():
            output = inputs * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        folded = 0.0 if found.bias is None else found.bias * scale.view(-1, 1, 1)
        return self._connect(
            self.rules.conv, found.layer, output, found.inputs,
            found.weight * scale.view(-1, 1, 1, 1), folded + shift.view(-1, 1, 1),
        )  # fmt: skip

    def _convolution_of(self, tensor: Tensor) -> _Convolution | None:
        """The convolution that made a tensor which nothing has changed in place since."""
        found = None
        for known in self._convolutions:
            if known.output is tensor and known.version == tensor._version:
                found = known
        # A batch norm follows its convolution at once: older ones need not be kept alive.
        self._convolutions.clear()
        return found

    def layer_norm(
        self,
        func: Any,
        inputs: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """A layer norm, by the rules' reading."""
        assert self.rules is not None
        if self.rules.norm == "identity":
            with torch.no_grad():
                output = F.layer_norm(inputs, tuple(normalized_shape), weight, bias, eps)
            return identity(inputs, output)
        axes = tuple(range(-len(normalized_shape), 0))
        centred = inputs - inputs.mean(axes, keepdim=True)
        scale = (centred.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
        output = centred * (scale if weight is None else scale * weight)
        return output if bias is None else output + bias

    def activation(self, func: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """An elementwise activation with f(0) = 0."""
        with torch.no_grad():
            # On a copy: it may be asked to work in place.
            output = func(inputs.detach().clone(), *args, **kwargs)
            if bool(func(torch.zeros(1, dtype=inputs.dtype, device=inputs.device), *args, **kwargs) != 0):
                raise Unsupported(f"no relevance rule for '{_name(func)}' with a value at zero")
        return identity(inputs, output)

    def add(self, func: Any, first: Any, second: Any, **kwargs: Any) -> Tensor:
        """A sum: shares are autograd's; of two activations rescaled where the rules say so."""
        assert self.rules is not None
        if not (self.rules.rescale and _depends(first) and _depends(second)):
            result: Tensor = func(first, second, **kwargs)
            return result
        if first.shape != second.shape or kwargs or _name(func) == "add_":
            raise Unsupported("no relevance rule for a sum of activations in place or of unlike shapes")
        return rescaled_sum(first, second)

    def multiply(self, func: Any, first: Any, second: Any, **kwargs: Any) -> Tensor:
        """A product with a constant is linear."""
        if _depends(first) and _depends(second):
            raise Unsupported("no relevance rule for the product of two activations (gating)")
        result: Tensor = func(first, second, **kwargs)
        return result

    def divide(self, func: Any, first: Any, second: Any, **kwargs: Any) -> Tensor:
        """A quotient by a constant is linear."""
        if _depends(second):
            raise Unsupported("no relevance rule for a division by an activation")
        result: Tensor = func(first, second, **kwargs)
        return result

    def matmul(self, func: Any, first: Tensor, second: Tensor) -> Tensor:
        """The product of two matrices of activations, half of the relevance to each."""
        assert self.rules is not None
        if self.rules.softmax is None or not (_depends(first) and _depends(second)):
            raise Unsupported("no relevance rule for a product of matrices outside a transformer's attention")
        return self._half(torch.matmul(first, second))

    def _half(self, product: Tensor) -> Tensor:
        if self.rules is not None:
            with torch.no_grad():
                share = 0.5 * stabilised(product, self.rules.epsilon) if self.rules.epsilon else 0.5
            product.register_hook(lambda ratios: ratios * share)
        return product

    def _softmax(self, func: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.rules is None or self.rules.softmax == "taylor":
            output: Tensor = func(inputs, *args, **kwargs)  # its own gradient is the rule
        elif self.rules.softmax == "identity":
            with torch.no_grad():
                output = func(inputs, *args, **kwargs)
            output = identity(inputs, output)
        else:
            raise Unsupported("no relevance rule for attention in a network that is no transformer")
        if output.ndim == 4 and output.shape[2] == output.shape[3]:
            self.attention.append(output)
        return output

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **others: Any,
    ) -> Tensor:
        """Fused attention, taken apart so that its softmax can be seen."""
        if attn_mask is not None or is_causal or dropout_p or any(others.values()):
            raise Unsupported("no relevance rule for attention that is masked, causal or grouped")
        if not (_depends(query) and _depends(key) and _depends(value)):
            raise Unsupported("no relevance rule for attention with queries, keys or values that are fixed")
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        products = self._half((query * factor) @ key.transpose(-2, -1))
        weights = self._softmax(torch.softmax, products, -1)
        return self._half(weights @ value)


@dataclass(frozen=True)
class _Convolution:
    """A convolution that has just run, kept until a batch norm asks for it."""

    output: Tensor
    version: int
    layer: Layer
    inputs: Tensor
    weight: Tensor
    bias: Tensor | None


_HANDLERS: dict[str, Callable[..., Tensor]] = {
    "linear": Tracer.linear, "conv2d": Tracer.conv2d, "batch_norm": Tracer.batch_norm,
    "layer_norm": Tracer.layer_norm,
    **dict.fromkeys(_ACTIVATIONS, Tracer.activation), **dict.fromkeys(_ADD, Tracer.add),
    **dict.fromkeys(_MULTIPLY, Tracer.multiply), **dict.fromkeys(_DIVIDE, Tracer.divide),
    **dict.fromkeys(_MATMUL, Tracer.matmul),
}  # fmt: skip


@cache
def _name(func: Any) -> str:
    """The plain name of an operation, whether a function, a method or an attribute of tensors."""
    parts = (resolve_name(func) or getattr(func, "__name__", repr(func))).split(".")
    return str(parts[-2] if parts[-1] == "__get__" and len(parts) > 1 else parts[-1])


def _detached(tensor: Tensor) -> Tensor:
    """Parameters and other leaves count as constants, whether frozen or not."""
    return tensor.detach() if tensor.requires_grad and tensor.is_leaf else tensor


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the tensors in lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_map(change, item) for item in value)
    return value


def _depends(value: Any) -> bool:
    """Whether a value holds a tensor that depends on the image."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(_depends(item) for item in value.values())
    return isinstance(value, list | tuple) and any(_depends(item) for item in value)
