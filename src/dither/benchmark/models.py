"""The models that are measured, a builder each, and their sizes.

Every contender gets the same model: inputs go in by position, all of them tensors with the examples on axis 0, position
tables are fixed or looked up, nothing is dropped at random. Stock Opacus and `vmap` need that; dither does not.
Weights are moved off the zero initialisation, where half of a backward pass multiplies zeros.

Legend: B examples, T tokens (image cells), D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dither.capture.compiled import compile
from dither.errors import ConfigurationError

SEED = 0
_MOVED = 0.02
"""Standard deviation of what is added to every trainable weight."""


@dataclass(frozen=True)
class Sizes:
    """How large a model and its micro-batch are.

    Attributes:
        width: features of a token.
        depth: blocks.
        tokens: T, a square number for images.
        batch: B, examples in a micro-batch.
        views: rows of each example (noise draws of an image), over which its loss is the mean.
    """

    width: int
    depth: int
    tokens: int
    batch: int
    views: int = 1

    @property
    def heads(self) -> int:
        """Attention heads, of 64 features."""
        return max(1, self.width // 64)

    @property
    def side(self) -> int:
        """Side of the square of T cells."""
        side = math.isqrt(self.tokens)
        if side * side != self.tokens:
            raise ConfigurationError(f"tokens={self.tokens} is not a square", fix="choose a square, as 64 or 256")
        return side

    def __str__(self) -> str:
        """As a table says it."""
        said = f"width {self.width}, depth {self.depth}, T {self.tokens}, batch {self.batch}"
        return said if self.views == 1 else f"{said}, {self.views} views"


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of the model's forward, by position, and what the losses compare its output with; axis 0 is B * views."""

    inputs: tuple[Tensor, ...]
    target: Tensor


@dataclass(frozen=True)
class Workload:
    """A model and its data, the same at every call.

    Attributes:
        name: in the registry.
        sizes: of model and micro-batch.
        make: builds the model.
        draw: one micro-batch of B * views rows.
        row_losses: (output, target) to one loss per row.
        compiled: whether the plain step and dither's have their blocks compiled.
    """

    name: str
    sizes: Sizes
    make: Callable[[], nn.Module]
    draw: Callable[[], MicroBatch]
    row_losses: Callable[[Tensor, Tensor], Tensor]
    compiled: bool = False

    def build(self) -> nn.Module:
        """The model, with the same weights each time, away from the zero initialisation."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * _MOVED)
        return model

    def build_to_train(self) -> nn.Module:
        """The model, its blocks compiled by `dither.compile` if that is asked for.

        Raises:
            ConfigurationError: they are to be compiled, and the model has no list of blocks.
        """
        model = self.build()
        if self.compiled:
            blocks = getattr(model, "blocks", None)
            if not isinstance(blocks, nn.ModuleList):
                raise ConfigurationError(f"{self.name} has no blocks to compile", fix="measure the DiTs only")
            for block in blocks:
                compile(block)
        return model

    def batches(self, count: int) -> list[MicroBatch]:
        """Micro-batches, different from each other and the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED + 1)
            return [self.draw() for _ in range(count)]

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """One loss per example: the mean of its rows'."""
        rows = self.row_losses(output, target)
        return rows if self.sizes.views == 1 else rows.unflatten(0, (-1, self.sizes.views)).mean(1)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row."""
    return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each row's next tokens: logits (B, T, vocabulary), ids (B, T)."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def _rows(sizes: Sizes, draw: Callable[[int], Tensor]) -> Tensor:
    """Something of an example that its views share."""
    return draw(sizes.batch).repeat_interleave(sizes.views, 0)


def dit(sizes: Sizes) -> Workload:
    """Dither's DiT on 4-channel latents, 1000 classes, fixed position table."""
    from dither.diffusion import DiT

    side = 2 * sizes.side  # of the image, in patches of two by two

    def make() -> nn.Module:
        return DiT(
            input_size=side,
            patch_size=2,
            hidden_size=sizes.width,
            depth=sizes.depth,
            num_heads=sizes.heads,
            class_dropout_prob=0.0,
            learn_sigma=False,
        )

    def draw() -> MicroBatch:
        x_0 = _rows(sizes, lambda count: torch.randn(count, 4, side, side))
        noise, t = torch.randn_like(x_0), torch.randint(1000, (sizes.batch * sizes.views,))
        y = _rows(sizes, lambda count: torch.randint(1000, (count,)))
        return MicroBatch((x_0 + noise, t, y), noise)

    return Workload("dit", sizes, make, draw, squared_error)


class _ByPosition(nn.Module):
    """A model of another library: tensors in by position, its first output."""

    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self._call = inner, call

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output of `call(inner, *inputs)`."""
        output: Tensor = self._call(self.inner, *inputs)[0]
        return output


def unet(sizes: Sizes) -> Workload:
    """Diffusers' UNet2DConditionModel: two resolutions, cross-attention to 16 text tokens at the coarser one."""
    import diffusers

    text = 16

    def make() -> nn.Module:
        inner = diffusers.UNet2DConditionModel(
            sample_size=sizes.side,
            block_out_channels=(sizes.width, 2 * sizes.width),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=sizes.depth,
            cross_attention_dim=sizes.width,
            attention_head_dim=(sizes.heads, 2 * sizes.heads),  # diffusers' name for the number of heads
        )
        return _ByPosition(inner, lambda m, x, t, words: m(x, t, words, return_dict=False))

    def draw() -> MicroBatch:
        x_0 = _rows(sizes, lambda count: torch.randn(count, 4, sizes.side, sizes.side))
        noise, t = torch.randn_like(x_0), torch.randint(1000, (sizes.batch * sizes.views,))
        words = _rows(sizes, lambda count: torch.randn(count, text, sizes.width))
        return MicroBatch((x_0 + noise, t, words), noise)

    return Workload("unet", sizes, make, draw, squared_error)


def gpt2(sizes: Sizes) -> Workload:
    """Transformers' GPT-2, its output layer tied to its token table; GPT-2's vocabulary, a small one if narrow.

    Positions go in with the examples: made inside, they have a batch of one, which stock Opacus cannot take. The causal
    mask is given, because transformers looks at the positions to make it, which `vmap` cannot.
    """
    import transformers

    vocabulary = 50257 if sizes.width >= 256 else 101

    def make() -> nn.Module:
        config = transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=sizes.tokens,
            n_embd=sizes.width,
            n_layer=sizes.depth,
            n_head=sizes.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        causal = torch.ones(1, 1, sizes.tokens, sizes.tokens, dtype=torch.bool).tril()
        fixed = {"attention_mask": causal, "use_cache": False, "return_dict": False}
        inner = transformers.GPT2LMHeadModel(config)
        return _ByPosition(inner, lambda m, ids, at: m(input_ids=ids, position_ids=at, **fixed))

    def draw() -> MicroBatch:
        ids = _rows(sizes, lambda count: torch.randint(vocabulary, (count, sizes.tokens)))
        positions = torch.arange(sizes.tokens).repeat(len(ids), 1)
        return MicroBatch((ids, positions), ids)

    return Workload("gpt2", sizes, make, draw, next_token)


@dataclass(frozen=True)
class Entry:
    """A model of the registry: its builder, its size, and a tiny one that takes seconds."""

    build: Callable[[Sizes], Workload]
    sizes: Sizes
    smoke: Sizes

    def workload(self, name: str, smoke: bool = False, **changed: int) -> Workload:
        """The workload under its registered name, some sizes changed."""
        sizes = replace(self.smoke if smoke else self.sizes, **changed)
        return replace(self.build(sizes), name=name)


_SMOKE = Sizes(width=64, depth=1, tokens=16, batch=3)

MODELS = {
    "dit-384": Entry(dit, Sizes(width=384, depth=4, tokens=256, batch=8), _SMOKE),
    "dit-768": Entry(dit, Sizes(width=768, depth=4, tokens=64, batch=8), replace(_SMOKE, tokens=4)),
    "dit-256": Entry(dit, Sizes(width=256, depth=6, tokens=49, batch=64), replace(_SMOKE, width=32)),
    "dit-1024": Entry(dit, Sizes(width=1024, depth=2, tokens=1024, batch=2), replace(_SMOKE, tokens=64, batch=2)),
    "unet": Entry(unet, Sizes(width=128, depth=1, tokens=256, batch=8), replace(_SMOKE, width=32)),
    "gpt2": Entry(gpt2, Sizes(width=768, depth=2, tokens=256, batch=4), _SMOKE),
}
"""By name; the sizes are those of issue 5."""


def workload(name: str, smoke: bool = False, **changed: int) -> Workload:
    """A registered model.

    Raises:
        ConfigurationError: no such model.
    """
    if name not in MODELS:
        raise ConfigurationError(f"there is no model {name!r} to measure", fix=f"choose of {', '.join(MODELS)}")
    return MODELS[name].workload(name, smoke, **changed)
