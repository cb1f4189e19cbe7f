"""SCAN's analysis networks: from masked features back to the image, with a map of self-confidence.

SCAN (arXiv:2603.06523), section 3. A CNN's features go up a ladder of residual modules and transposed
convolutions, a transformer's tokens first pass four attention blocks. Either doubles the feature grid
until it is as large as the image and ends in four channels: confidence, then red, green and blue.
The paper gives the outline alone; channels and counts are those of the authors' PyTorch code, with
8,257,668 parameters for 2048 x 7 x 7 features and 31,080,164 for the tokens of a ViT-B/16.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faithmap.errors import RequestError
from faithmap.gradient_masks import Layout, Masked, layout_of
from faithmap.models import Model
from faithmap.perturb import chunk_size

#: Channels of the convolutional ladder on the grid that is 2^n times coarser than the image. The code has
#: them up to n = 5; coarser grids begin with 512 as well.
LADDER = (64, 128, 192, 256, 384, 512)
#: Attention blocks before a transformer's tokens are folded, and channels of a head.
BLOCKS, HEAD = 4, 64
#: Channels behind the last transposed convolution over tokens; each one before has twice as many.
TOKEN_CHANNELS = 32
#: Confidence, and three colours.
OUTPUTS = 4
#: The published width is for images of 224 pixels. Below so many pixels a side the default is less.
SMALL, SMALL_WIDTH = 128, 0.25


def doublings(size: tuple[int, int], grid: tuple[int, int]) -> int:
    """How often a grid (h, w) must be doubled to become the image (H, W).

    Raises:
        RequestError: it is not a power of two, or not the same along both axes.
    """
    count = round(math.log2(size[0] / grid[0])) if min(*size, *grid) > 0 else -1
    if count < 0 or size != (grid[0] << count, grid[1] << count):
        raise RequestError(
            f"the decoder doubles features of {grid[0]} x {grid[1]} until they fill the image, which has "
            f"{size[0]} x {size[1]} pixels; expected a power of two times the features along both axes. "
            "Give images of such a size, or name another layer"
        )
    return count


def misfit(model: Model, layer: str | None = None) -> str | None:
    """Why no decoder fits a layer's feature grid, or there is no such layer; None where one does.

    For `defined_for`.

    Args:
        model: the model.
        layer: its name; by default the one that is analysed, whose grid is the model's.
    """
    try:
        doublings(model.input_size, model.grid if layer is None else layout_of(model, layer).grid)
    except RequestError as error:
        return str(error)
    return None


def default_width(layout: Layout) -> float:
    """What multiplies the channels unless a width is given: 1 as published, 0.25 for small images."""
    return SMALL_WIDTH if max(layout.size) < SMALL else 1.0


def scaled(channels: int, width: float) -> int:
    """A narrower layer's number of channels, even and at least 4; `channels` itself at a width of 1."""
    return max(4, 2 * round(channels * width / 2)) if width != 1 else channels


class Residual(nn.Module):
    """Pre-activation bottleneck: BN-ReLU-1x1 to half the channels, BN-ReLU-kxk, BN-ReLU-1x1 back, and a skip.

    Args:
        channels: of what goes in and comes out.
        kernel: side of the middle convolution.
    """

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        inner = channels // 2
        self.norm0, self.conv0 = nn.BatchNorm2d(channels), nn.Conv2d(channels, inner, 1)
        self.norm1: nn.Module = nn.BatchNorm2d(inner)
        self.conv1 = nn.Conv2d(inner, inner, kernel, padding=kernel // 2)
        self.norm2: nn.Module = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to the same shape."""
        # In place: neither a norm nor a convolution learns from what it gave, and memory is what takes time.
        y = self.conv0(F.relu(self.norm0(x), inplace=True))
        y = self.conv1(F.relu(self.norm1(y), inplace=True))
        y = self.conv2(F.relu(self.norm2(y), inplace=True))
        total: Tensor = x + y
        return total


class Doubling(nn.Module):
    """Transposed 3x3 convolution of stride 2 that doubles the grid exactly, and a ReLU; no norm."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, outputs, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to (B, outputs, 2 h, 2 w)."""
        y: Tensor = self.conv(x)
        return F.relu(y, inplace=True)


class Rung(nn.Module):
    """Two residual modules, with a skip around both if asked."""

    def __init__(self, channels: int, skip: bool) -> None:
        super().__init__()
        self.pair = nn.Sequential(Residual(channels), Residual(channels))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to the same shape."""
        y: Tensor = self.pair(x)
        return x + y if self.skip else y


class MapDecoder(nn.Module):
    """The decoder of a CNN's features (section 3.2): residual modules and doublings, up to the image's size.

    Args:
        channels: of the features.
        count: how often the grid is doubled.
        width: multiplies the channels of all layers; 1 as published.
        skips: a skip around each pair of residual modules, which the PyTorch code has and the
            TensorFlow code has not.
    """

    def __init__(self, channels: int, count: int, width: float = 1.0, skips: bool = True) -> None:
        super().__init__()
        self.count = count
        ladder = [scaled(LADDER[min(n, len(LADDER) - 1)], width) for n in range(count, -1, -1)]
        self.enter = nn.Conv2d(channels, ladder[0], 1)
        self.first = Residual(ladder[0], kernel=1)
        self.rungs = nn.ModuleList([Rung(wide, skips) for wide in ladder])
        self.doublings = nn.ModuleList([Doubling(a, b) for a, b in itertools.pairwise(ladder)])
        self.last = Residual(ladder[-1], kernel=1)
        self.leave = nn.Conv2d(ladder[-1], OUTPUTS, 1)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features (B, C, h, w) to (B, 4, H, W); the grid is theirs."""
        del grid
        x = self.first(self.enter(features))
        for n, rung in enumerate(self.rungs):
            x = rung(x)
            if n < len(self.doublings):
                x = self.doublings[n](x)
        return self.leave(self.last(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Post-norm attention block: x = LN(x + attention(x)), x = LN(x + FFN(x)), the FFN four times as wide.

    Args:
        channels: D of the tokens.
        inner: channels of all heads together, and a quarter of the FFN's; D as published.
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        # Heads of 64 channels (PyTorch code). The TensorFlow code gives each head all 768.
        self.heads = max(1, round(inner / HEAD))
        inner = self.heads * max(1, inner // self.heads)
        self.mix, self.project = nn.Linear(channels, 3 * inner), nn.Linear(inner, channels)
        self.norm0, self.norm1 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.widen, self.narrow = nn.Linear(channels, 4 * inner), nn.Linear(4 * inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) to the same shape."""
        count, tokens = x.shape[:2]
        q, k, v = self.mix(x).view(count, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm0(x + self.project(y))
        return self.norm1(x + self.narrow(F.gelu(self.widen(x))))  # type: ignore[no-any-return]


class TokenDecoder(nn.Module):
    """The decoder of a transformer's tokens (section 3.3), one for all layers: attention, then doublings.

    All tokens come in, prefix tokens among them, without positions or a projection. Behind the blocks
    the prefix is dropped and the rest folded. The codes double first and put the two residual modules
    behind it; the paper's wording has it the other way round.

    Args:
        channels: D of the tokens.
        count: how often the grid is doubled; four times for patches of 16 pixels.
        width: multiplies the channels within attention and FFN and those of the convolutions; 1 as
            published.
    """

    def __init__(self, channels: int, count: int, width: float = 1.0) -> None:
        super().__init__()
        self.count = count
        inner = scaled(channels, width)
        self.blocks = nn.ModuleList([Block(channels, inner) for _ in range(BLOCKS)])
        ladder = [channels, *(scaled(TOKEN_CHANNELS << n, width) for n in range(count - 1, -1, -1))]
        self.doublings = nn.ModuleList([Doubling(a, b) for a, b in itertools.pairwise(ladder)])
        self.rungs = nn.ModuleList([Rung(wide, skip=False) for wide in ladder[1:]])
        self.leave = nn.Conv2d(ladder[-1], OUTPUTS, 1)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, D), of which the last h w are the patches of the grid, to (B, 4, H, W)."""
        x = tokens
        for block in self.blocks:
            x = block(x)
        patches = x[:, x.shape[1] - grid[0] * grid[1] :]
        x = patches.reshape(len(x), *grid, -1).permute(0, 3, 1, 2)
        for double, rung in zip(self.doublings, self.rungs, strict=True):
            x = rung(double(x))
        return self.leave(x)  # type: ignore[no-any-return]


Decoder = MapDecoder | TokenDecoder


def build_decoder(layout: Layout, width: float | None = None, skips: bool = True) -> Decoder:
    """The decoder for a layer's features, on torch's device of the moment, freshly made.

    Args:
        layout: what the features look like.
        width: multiplies channels; `default_width` unless given.
        skips: a skip around each pair of residual modules; of a CNN's decoder alone.

    Raises:
        RequestError: the grid is not a power of two below the image, or the width not above 0.
    """
    if width is None:
        width = default_width(layout)
    if not 0 < width <= 8:
        raise RequestError(f"width: got {width:g}, expected above 0 and up to 8; 1 is the published width")
    count = doublings(layout.size, layout.grid)
    if layout.tokens:
        return TokenDecoder(layout.channels, count, width)
    return MapDecoder(layout.channels, count, width, skips)


def seeded_decoder(
    layout: Layout, width: float | None, seed: int, device: torch.device, *, skips: bool = True
) -> Decoder:
    """A decoder whose weights are a function of the seed alone; no global random state is touched.

    They are drawn on the CPU, as torch draws them by default, and laid out as convolutions like them.
    """
    with torch.device("meta"):
        decoder = build_decoder(layout, width, skips)
    decoder.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in decoder.modules():
        _initialise(module, generator)
    return decoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@torch.no_grad()
def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Torch's own initialisation of a layer, from a generator."""
    if isinstance(module, nn.BatchNorm2d):
        module.reset_parameters()  # constants
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
        if module.bias is not None:
            bound = 1 / math.sqrt(module.weight[0].numel())
            module.bias.uniform_(-bound, bound, generator=generator)


def weights_of(decoder: Decoder) -> dict[str, Tensor]:
    """Weights and running statistics, without the counters that torch keeps beside them."""
    state: dict[str, Tensor] = decoder.state_dict()
    return {name: value for name, value in state.items() if value.is_floating_point()}


@torch.no_grad()
def fold_norms(decoder: Decoder) -> None:
    """Make the norms that follow a convolution a part of it: two of three in each residual module.

    For a decoder that is done learning, in evaluation mode. What it gives stays the same but for rounding.
    """
    for module in decoder.modules():
        if isinstance(module, Residual):
            module.norm1 = _folded(module.conv0, module.norm1)
            module.norm2 = _folded(module.conv1, module.norm2)


def _folded(conv: nn.Conv2d, norm: nn.Module) -> nn.Module:
    """Scale and shift a convolution as the norm behind it does; what is left of the norm."""
    if not isinstance(norm, nn.BatchNorm2d):
        return norm
    assert norm.running_mean is not None and norm.running_var is not None and conv.bias is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    conv.weight.mul_(scale.view(-1, 1, 1, 1))
    conv.bias.sub_(norm.running_mean).mul_(scale).add_(norm.bias)
    return nn.Identity().eval()


def decode(decoder: Decoder, features: Tensor, grid: tuple[int, int], precision: str) -> Tensor:
    """The decoder's output (B, 4, H, W) in float32; its layers compute in "fp32" or "bf16"."""
    if not isinstance(decoder, TokenDecoder):
        # The order in memory in which a CPU's convolutions, and a GPU's in bf16, are fast.
        features = features.contiguous(memory_format=torch.channels_last)
    if precision == "fp32":
        output: Tensor = decoder(features, grid)
    else:
        with torch.autocast(features.device.type, torch.bfloat16):
            output = decoder(features, grid)
    return output.float()


def decode_batch(decoder: Decoder, model: Model, masked: Masked) -> Tensor:
    """The decoder's output (B, 4, H, W) for some images, float32, without a graph, in chunks.

    Raises:
        RequestError: the images are of a size for which the decoder was not made.
    """
    layout = masked.layout
    if doublings(layout.size, layout.grid) != decoder.count:
        raise RequestError(
            f"the decoder enlarges features {1 << decoder.count} times, and images of "
            f"{layout.size[0]} x {layout.size[1]} pixels have features of {layout.grid[0]} x "
            f"{layout.grid[1]}; give images of the size that it was trained for"
        )
    # Decoding holds some dozens of channels of the image's size.
    chunk = max(1, chunk_size(model, layout.size) // 4)
    with torch.no_grad():
        parts = [decode(decoder, part, layout.grid, model.precision) for part in masked.values.split(chunk)]
    return torch.cat(parts)
