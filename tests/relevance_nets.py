"""Small networks for the tests of relevance propagation, and what the slow rewrites need of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faithmap.models import Model

#: Normalisation that is exact in any precision.
MEAN, STD = 0.375, 0.25
#: The bounds of a normalised pixel.
LOW, HIGH = -1.5, 2.5


def wrap(network: nn.Module, side: int = 8, **facts: Any) -> Model:
    return Model(network, mean=MEAN, std=STD, input_size=side, **facts)


def images_of(model: Model, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 3, *model.input_size, generator=generator, dtype=model.mean.dtype)


def logits_of(model: Model, images: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(images).gather(1, targets.view(-1, 1))[:, 0]
    return logits.to(images.dtype)


class TwoLayers(nn.Module):
    """A convolution and a linear layer, with biases; 2 x 4 x 4 = 32 hidden neurons at 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.conv(images)).flatten(1))
        return logits


class OneBlock(nn.Module):
    """A vision transformer of one block, two heads and four patches, every bias other than zero."""

    num_prefix_tokens, global_pool = 1, "token"

    def __init__(self, dim: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 5, dim))
        self.blocks = nn.ModuleList([Block(dim)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, images: Tensor) -> Tensor:
        embedded = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), embedded], dim=1) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens)[:, 0])
        return logits


class Block(nn.Module):
    fused = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.attn.num_heads = 2  # type: ignore[assignment]
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def attend(self, inputs: Tensor) -> Tensor:
        batch, count, dim = inputs.shape
        query, key, value = (
            self.attn["qkv"](inputs).reshape(batch, count, 3, 2, dim // 2).permute(2, 0, 3, 1, 4).unbind(0)
        )
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            weights = ((query * (dim // 2) ** -0.5) @ key.transpose(-2, -1)).softmax(dim=-1)
            mixed = weights @ value
        projected: Tensor = self.attn["proj"](mixed.transpose(1, 2).reshape(batch, count, dim))
        return projected

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attend(self.norm1(tokens))
        return tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))


def one_block(seed: int = 0) -> Model:
    torch.manual_seed(seed)

    def fold(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), tokens.shape[2], 2, 2)

    return wrap(OneBlock(), family="vit", target_layer="blocks.0.norm1", reshape=fold).double()


def weights_of(model: Model) -> dict[str, np.ndarray]:
    """A model's weights by their last two names."""
    return {
        name.removeprefix("blocks.0.").removeprefix("attn."): value.detach().double().numpy()
        for name, value in model.module.named_parameters()
    }


class Residual(nn.Module):
    """All that CNNs are made of, working in place where they do; no bias anywhere."""

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.in_place = in_place
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.act, self.act6 = nn.ReLU(inplace=in_place), nn.ReLU6(inplace=in_place)
        self.head = nn.Linear(6, 4, bias=False)
        for norm in (self.bn, self.bn1):
            nn.init.uniform_(norm.weight, 0.5, 2)
            norm.running_var.uniform_(0.1, 1)  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        kept = F.max_pool2d(self.act(self.bn(self.stem(images))), 3, 2, 1)
        x = self.act6(3 * self.bn1(self.conv1(kept)))
        x = self.conv2(x)
        if self.in_place:
            x += kept
        else:
            x = x + kept
        x = torch.cat([F.avg_pool2d(self.act(x), 2), F.avg_pool2d(kept, 2)[:, :0]], 1)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def residual(seed: int = 0, in_place: bool = True) -> Model:
    torch.manual_seed(seed)
    return wrap(Residual(in_place).double(), side=16).double()
