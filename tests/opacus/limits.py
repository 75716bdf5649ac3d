"""What Opacus's hooks and ghost clipping do on models that are not a stack of its layers, and what dither does.

Each row of the table is a function here; `test_limits.py` runs it. `python tests/opacus/limits.py` measures every row
and prints docs/opacus-limits.md. Categories, not figures, are what the tests hold Opacus to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from limits_row import Make, Row
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

B = 4
EXACT, SILENT, NAMED = "exact", "silently wrong", "exact or a named error"


@dataclass(frozen=True)
class Limit:
    """A row: its name, how to make it, and the category of each outcome in hooks and in ghost mode."""

    name: str
    make: Make
    opacus: tuple[str, str]
    dither: tuple[str, str]


LIMITS: list[Limit] = []


def limit(name: str, opacus: tuple[str, str], dither: tuple[str, str] = (EXACT, EXACT)) -> Callable[[Make], Make]:
    """Register a row."""

    def register(make: Make) -> Make:
        LIMITS.append(Limit(name, make, opacus, dither))
        return make

    return register


def error(name: str) -> str:
    """The category of an error of this type."""
    return f"error: {name}"


class Net(nn.Module):
    """Named modules and parameters, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def normal(*shape: int) -> Tensor:
    return 2 * torch.randn(shape)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def squares(output: Tensor) -> Tensor:
    """A loss per example: the sum of squares."""
    return output.square().flatten(1).sum(1)


def of_output(model: nn.Module, *inputs: Any) -> Tensor:
    """The sum of squares of the model's output."""
    return squares(model(*inputs))


# --- what a forward may take ---------------------------------------------------------------------


@limit("Linear on 4-D input", (EXACT, error("AttributeError")))
def four_axes() -> Row:
    return Row(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), (normal(B, 2, 3, 5),), of_output)


@limit("Linear on 4-D input after a step on 3-D", (EXACT, SILENT))
def four_axes_after_three() -> Row:
    return Row(nn.Linear(5, 3), (normal(B, 2, 3, 5),), of_output, earlier=[(0.1 * normal(B, 3, 5),)])


@limit("parameter on the top module, several inputs", (error("TypeError"), error("TypeError")))
def top_parameter() -> Row:
    model = Net(lambda m, x, t: m.layer(x + m.shift * t[:, None]), layer=nn.Linear(5, 3), shift=weight(5))
    return Row(model, (normal(B, 5), normal(B)), of_output)


@limit("keywords only into a module that owns parameters", (error("IndexError"), error("IndexError")))
def keywords_only() -> Row:
    film = Net(lambda m, x, t: x * m.scale + t[:, None], scale=weight(5))
    model = Net(lambda m, x, t: m.layer(m.film(x=x, t=t)), film=film, layer=nn.Linear(5, 3))
    return Row(model, (normal(B, 5), normal(B)), of_output)


@limit("optional second tensor input", (SILENT, SILENT))
def optional_input() -> Row:
    add = Net(lambda m, x, z=None: x * m.a + (0 if z is None else z * m.b), a=weight(5), b=weight(5))
    model = Net(lambda m, x, z: m.layer(m.add(x, z)), add=add, layer=nn.Linear(5, 3))
    return Row(model, (normal(B, 5), 5 * normal(B, 5)), of_output)


@limit("int, bool and None arguments", (error("AttributeError"), error("AttributeError")))
def plain_arguments() -> Row:
    power = Net(lambda m, x, n, negate, mask: (-x if negate else x) ** n * m.scale, scale=weight(5))
    model = Net(lambda m, x: m.layer(m.power(x, 2, True, None)), power=power, layer=nn.Linear(5, 3))
    return Row(model, (normal(B, 5),), of_output)


@limit("batch_first=False", (EXACT, EXACT))
def time_first() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum((0, 2))

    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return Row(model, (normal(6, B, 5),), losses, options={"batch_first": False}, axes=(1,))


@limit("empty batch", (EXACT, EXACT))
def empty_batch() -> Row:
    return Row(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), (normal(0, 5),), of_output)


# --- how parameters may be used ------------------------------------------------------------------


@limit("tied weights", (EXACT, error("NotImplementedError")))
def tied() -> Row:
    model = Net(lambda m, i: m.head(m.table(i)), table=nn.Embedding(7, 5), head=nn.Linear(5, 7, bias=False))
    model.head.weight = model.table.weight
    return Row(model, (torch.randint(7, (B, 3)),), of_output)


@limit("tied weights, one use in a custom module", (EXACT, SILENT))
def tied_custom() -> Row:
    table = nn.Embedding(7, 5)
    head = Net(lambda m, x: F.linear(x, m.weight), weight=table.weight)
    return Row(Net(lambda m, i: m.head(m.table(i)), table=table, head=head), (torch.randint(7, (B, 3)),), of_output)


@limit("module call plus F.linear on the same weight", (SILENT, SILENT))
def functional_use() -> Row:
    model = Net(lambda m, x: m.layer(x) + 3 * F.linear(x.tanh(), m.layer.weight), layer=nn.Linear(5, 3))
    return Row(model, (normal(B, 5),), of_output)


@limit("dropout inside a custom module", (error("RuntimeError"), error("RuntimeError")))
def dropout() -> Row:
    block = Net(lambda m, x: F.dropout(x * m.scale, 0.5, m.training), scale=weight(5))
    return Row(nn.Sequential(block, nn.Linear(5, 3)), (normal(B, 5),), of_output, random=True)


@limit("wrapped in eval mode, then train()", (SILENT, SILENT))
def eval_then_train() -> Row:
    block = Net(lambda m, x: F.dropout(x * m.scale, 0.5, m.training), scale=weight(5))
    model = nn.Sequential(block, nn.Linear(5, 3))
    return Row(model, (normal(B, 5),), of_output, before=nn.Module.eval, after=nn.Module.train, random=True)


@limit("parameter unused on a later step", (error("ValueError"), SILENT))
def unused_later() -> Row:
    model = Net(lambda m, x, both: m.a(x) + (m.b(x) if both else 0), a=nn.Linear(5, 3), b=nn.Linear(5, 3))
    return Row(model, (normal(B, 5), False), of_output, earlier=[(10 * normal(B, 5), True)])


@limit("tuple output of a module that owns parameters", (error("TypeError"), error("TypeError")))
def tuple_output() -> Row:
    split = Net(lambda m, x: (x * m.a, x * m.b), a=weight(5), b=weight(5))
    model = Net(lambda m, x: m.layer(torch.cat(m.split(x), 1)), split=split, layer=nn.Linear(10, 3))
    return Row(model, (normal(B, 5),), of_output)


@limit("dict output of a module that owns parameters", (error("ValueError"), error("AttributeError")))
def dict_output() -> Row:
    split = Net(lambda m, x: {"a": x * m.a, "b": x * m.b}, a=weight(5), b=weight(5))
    model = Net(lambda m, x: m.layer(torch.cat(list(m.split(x).values()), 1)), split=split, layer=nn.Linear(10, 3))
    return Row(model, (normal(B, 5),), of_output)


@limit("several outputs of the model, one loss", (EXACT, EXACT))
def several_outputs() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        mean, scale = model(x)
        return squares(mean) + squares(scale)

    def forward(model: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model.body(x).tanh()
        return model.mean(hidden), model.scale(hidden)

    return Row(Net(forward, body=nn.Linear(5, 6), mean=nn.Linear(6, 3), scale=nn.Linear(6, 2)), (normal(B, 5),), losses)


@limit("parameter unfrozen after wrapping", (error("ValueError"), SILENT))
def unfrozen() -> Row:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return Row(
        model,
        (normal(B, 5),),
        of_output,
        before=lambda m: m[0].requires_grad_(False),
        after=lambda m: m[0].requires_grad_(True),
    )


@limit("layer added after wrapping", (error("ValueError"), SILENT))
def added() -> Row:
    model, layer = nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 3)
    return Row(model, (normal(B, 5),), of_output, after=lambda m: m.append(layer))


@limit("activation checkpointing, non-reentrant", (error("ValueError"), error("NotImplementedError")))
def checkpointed() -> Row:
    model = Net(
        lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)),
        body=nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6)),
        head=nn.Linear(6, 3),
    )
    return Row(model, (normal(B, 5),), of_output)


@limit("activation checkpointing, reentrant, of the first layers", (EXACT, EXACT))
def checkpointed_first() -> Row:
    def forward(model: Net, x: Tensor) -> Tensor:
        return model.head(checkpoint(model.body, x.requires_grad_(), use_reentrant=True))

    def plainly(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model.head(model.body(x)))

    body = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    return Row(Net(forward, body=body, head=nn.Linear(6, 3)), (normal(B, 5),), of_output, reference=plainly)


@limit("activation checkpointing, reentrant", (EXACT, EXACT))
def checkpointed_reentrant() -> Row:
    model = Net(
        lambda m, x: m.head(checkpoint(m.body, m.stem(x), use_reentrant=True)),
        stem=nn.Linear(5, 5),
        body=nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6)),
        head=nn.Linear(6, 3),
    )

    def plainly(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model.head(model.body(model.stem(x))))

    return Row(model, (normal(B, 5),), of_output, reference=plainly)


# --- layers --------------------------------------------------------------------------------------


@limit("convolution on channels_last input", (SILENT, SILENT))
def channels_last() -> Row:
    images = normal(B, 3, 5, 5).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3))
    return Row(model, (images,), of_output)


@limit("convolution with circular padding", (SILENT, SILENT))
def circular() -> Row:
    return Row(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (normal(B, 3, 5, 5),), of_output)


@limit("convolution with padding='same', even kernel", (EXACT, EXACT))
def same_padding() -> Row:
    return Row(nn.Conv2d(3, 4, 4, padding="same"), (normal(B, 3, 5, 5),), of_output)


@limit("grouped convolution with dilation and stride", (EXACT, EXACT))
def dilated() -> Row:
    layer = nn.Conv2d(4, 6, 3, padding=2, dilation=2, stride=2, groups=2)
    return Row(layer, (normal(B, 4, 7, 7),), of_output)


@limit("transposed convolution", (EXACT, EXACT))
def transposed() -> Row:
    return Row(nn.ConvTranspose2d(3, 4, 3, stride=2), (normal(B, 3, 5, 5),), of_output)


@limit("EmbeddingBag with offsets", (SILENT, SILENT))
def bags() -> Row:
    ids, offsets = torch.randint(9, (12,)), torch.tensor([0, 2, 5, 9])
    return Row(nn.EmbeddingBag(9, 4, mode="mean"), (ids, offsets), of_output, axes=(None, 0), random=True)


@limit("EmbeddingBag on (B, T) ids", (error("ValueError"), error("ValueError")))
def bags_of_rows() -> Row:
    return Row(nn.EmbeddingBag(9, 4, mode="sum"), (torch.randint(9, (B, 3)),), of_output)


@limit(
    "nn.MultiheadAttention, weights returned",
    (error("TypeError"), error("TypeError")),
)
def attention() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model(x, x, x)[0])

    return Row(nn.MultiheadAttention(8, 2, batch_first=True), (normal(B, 5, 8),), losses)


@limit("nn.MultiheadAttention, need_weights=False", (error("TypeError"), error("TypeError")))
def attention_alone() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model(x, x, x, need_weights=False)[0])

    return Row(nn.MultiheadAttention(8, 2, batch_first=True), (normal(B, 5, 8),), losses)


@limit("nn.TransformerEncoderLayer, unmodified", (error("TypeError"), error("TypeError")))
def encoder_layer() -> Row:
    return Row(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), (normal(B, 5, 8),), of_output)


@limit("nn.LSTM, unmodified", (error("RuntimeError"), error("RuntimeError")))
def recurrent() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model(x)[0])

    return Row(nn.LSTM(5, 4, batch_first=True), (normal(B, 6, 5),), losses)


@limit("buffer on a trainable layer", (error("NotImplementedError"), error("NotImplementedError")))
def buffer() -> Row:
    block = Net(lambda m, x: x * m.scale + m.table, scale=weight(5))
    block.register_buffer("table", normal(3, 5))
    return Row(nn.Sequential(block, nn.Linear(5, 3)), (normal(B, 3, 5),), of_output)


@limit("weight_norm parametrization", (EXACT, EXACT))
def weight_norm() -> Row:
    return Row(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))), (normal(B, 5),), of_output)


_NO_STATISTICS = error("NotImplementedError")


@limit("BatchNorm", (_NO_STATISTICS, _NO_STATISTICS), (_NO_STATISTICS, _NO_STATISTICS))
def batch_norm() -> Row:
    return Row(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), (normal(B, 5),), of_output)


# --- examples that depend on each other ----------------------------------------------------------

COUPLED = (error("CoupledExamplesError"), error("CoupledExamplesError"))


@limit("BatchNorm without running statistics", (error("ValueError"), error("ValueError")), COUPLED)
def batch_norm_untracked() -> Row:
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    return Row(nn.Sequential(nn.Linear(5, 6), norm, nn.Linear(6, 3)), (normal(B, 5),), of_output)


@limit("batch statistics in the model", (SILENT, SILENT), COUPLED)
def statistics_in_model() -> Row:
    def forward(model: Net, x: Tensor) -> Tensor:
        hidden = model.a(x)
        return model.b(hidden - hidden.mean(0))

    model = Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    return Row(model, (normal(B, 5),), of_output)


@limit("batch statistics in the loss", (SILENT, SILENT), COUPLED)
def statistics_in_loss() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        return squares((output - output.mean(0)) / output.std(0))

    return Row(nn.Linear(5, 3), (normal(B, 5),), losses)


@limit("in-batch negatives in the loss", (SILENT, SILENT), COUPLED)
def negatives() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        return 5 * F.cross_entropy(output @ output.t(), torch.arange(len(x)), reduction="none")

    return Row(nn.Linear(5, 3), (normal(B, 5),), losses)


@limit("one example is NaN", (SILENT, SILENT))
def not_a_number() -> Row:
    x = normal(B, 5)
    x[1] = float("nan")
    return Row(nn.Linear(5, 3), (x,), of_output, alone=True)


@limit("one example is infinite", (SILENT, SILENT))
def infinite() -> Row:
    x = normal(B, 5)
    x[1, 2] = float("inf")
    return Row(nn.Linear(5, 3), (x,), of_output, alone=True)


# --- losses --------------------------------------------------------------------------------------


@limit("scalar loss in ghost mode", (EXACT, SILENT), (EXACT, error("LossShapeError")))
def scalar_loss() -> Row:
    def criterion(model: nn.Module, x: Tensor) -> Tensor:
        return of_output(model, x).mean()

    return Row(nn.Linear(5, 3), (normal(B, 5),), of_output, criterion=criterion)


class ImageLoss(nn.MSELoss):
    """Mean squared error of the model's output, as a criterion of ghost mode."""

    def forward(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return super().forward(model(x), target)


@limit("loss of image shape (B, C, H, W) in ghost mode", (EXACT, error("RuntimeError")))
def image_loss() -> Row:
    def losses(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(model(x), target, reduction="none").flatten(1).mean(1)

    model = nn.Conv2d(3, 3, 3, padding=1)
    return Row(model, (normal(B, 3, 5, 5), normal(B, 3, 5, 5)), losses, criterion=ImageLoss())


@limit("second backward before the step", (EXACT, SILENT))
def second_backward() -> Row:
    return Row(nn.Linear(5, 3), (normal(B, 5),), of_output, earlier=[(normal(B, 5),)], accumulate=True)


AGAIN = (error("IndexError"), error("RuntimeError"))


@limit("two backward passes over one forward", AGAIN, (EXACT, error("CoverageError")))
def two_losses() -> Row:
    def backward(loss: Any) -> None:
        if isinstance(loss, Tensor):
            (loss / 2).mean().backward(retain_graph=True)
            (loss / 2).mean().backward()
        else:
            (loss / 2).backward()
            (loss / 2).backward()

    return Row(nn.Linear(5, 3), (normal(B, 5),), of_output, total=lambda losses: losses, backward=backward)


@limit("model called twice in one loss", (EXACT, error("NotImplementedError")))
def called_twice() -> Row:
    def losses(model: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        return squares(model(x) - model(z))

    return Row(nn.Linear(5, 3), (normal(B, 5), normal(B, 5)), losses)


@limit("penalty on the weights in the loss", (SILENT, SILENT), (error("CoverageError"), error("CoverageError")))
def penalty() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model(x)) + 10 * sum(p.square().sum() for p in model.parameters())

    return Row(nn.Linear(5, 3), (normal(B, 5),), losses)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from limits_table import table

    print(table(LIMITS), end="")
