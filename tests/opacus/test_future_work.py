"""What the document left for later: keyword arguments, control of randomness, checks of the loss's shape."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from seed_cases import (
    clipped_sum,
    dit,
    dit_batch,
    dit_losses,
    example_error,
    median_norm,
    named,
    one_at_a_time,
    per_example_mse,
    replayed,
    seeded,
    within,
)
from torch import nn

import oracle
from dither.errors import CoupledExamplesError, LossShapeError

pytestmark = pytest.mark.usefixtures("installed")


def private(model, criterion, bound=1.0, reduction="mean"):
    """Wrapped module and loss under flash clipping."""
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=bound, loss_reduction=reduction)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(wrapped.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=4,
        loss_reduction=reduction,
    )
    return wrapped, DPLossFastGradientClipping(wrapped, optimizer, criterion, reduction)


def agrees(build, losses, *batch, state):
    """Both wrappers against the reference: the same losses on the unwrapped model, from the same generator state."""
    truth = replayed(build(), losses, *batch, state=state)
    wrapped = GradSampleModule(build())
    torch.set_rng_state(state)
    losses(wrapped, *batch).mean().backward()
    within("per-example gradients", example_error(named(wrapped, "grad_sample"), truth))

    bound = median_norm(truth)
    flash, loss = private(build(), lambda losses: losses, bound)
    torch.set_rng_state(state)
    loss(losses(flash, *batch)).backward()
    within("clipped sum", oracle.relative_error(named(flash, "grad"), clipped_sum(truth, bound)))
    return truth


# --- keyword arguments -----------------------------------------------------------------------


class Conditional(nn.Module):
    """Takes everything that a forward may take; every argument but the first is optional."""

    def __init__(self):
        super().__init__()
        self.data, self.time = nn.Linear(6, 8), nn.Linear(1, 8)
        self.label, self.extra, self.out = nn.Embedding(5, 8), nn.Linear(3, 8), nn.Linear(8, 4)
        self.style = nn.ParameterDict({"plain": nn.Parameter(torch.ones(8)), "bold": nn.Parameter(torch.ones(8) * 2)})

    def forward(
        self, x, t=None, /, y=None, *context, mask=None, repeats=1, residual=False, style="plain", options=None
    ):
        h = self.data(x)
        if t is not None:
            h = h + self.time(t[:, None])
        if y is not None:
            h = h + self.label(y)
        for each in (*context, *(options or {}).get("context", ())):
            h = h + self.extra(each)
        if mask is not None:
            h = h * mask[:, None]
        for _ in range(repeats):
            h = torch.tanh(h * self.style[style]) + (h if residual else 0)
        return {"prediction": self.out(h), "hidden": (h, None)}


def conditional():
    torch.manual_seed(0)
    return Conditional()


CALLS = {
    "positional": lambda m, x, t, y, c, mask: m(x, t, y),
    "keyword": lambda m, x, t, y, c, mask: m(x, y=y, mask=mask),
    "mixed": lambda m, x, t, y, c, mask: m(x, t, y=y, residual=True),
    "optional left out": lambda m, x, t, y, c, mask: m(x),
    "None": lambda m, x, t, y, c, mask: m(x, None, y=None, mask=None, options=None),
    "int and bool": lambda m, x, t, y, c, mask: m(x, t, repeats=3, residual=True),
    "str": lambda m, x, t, y, c, mask: m(x, y=y, style="bold"),
    "dict": lambda m, x, t, y, c, mask: m(x, options={"context": [c, c.flip(1)], "name": "text"}),
    "*args": lambda m, x, t, y, c, mask: m(x, t, y, c, c.flip(1), mask=mask),
    "twice": lambda m, x, t, y, c, mask: {"prediction": m(x, t)["prediction"] * m(x, y=y)["prediction"]},
}


@pytest.mark.parametrize("call", CALLS)
def test_keyword_arguments(call):
    generator = torch.Generator().manual_seed(1)
    x, context, target = (torch.randn(7, n, generator=generator) for n in (6, 3, 4))
    t, y = torch.rand(7, generator=generator), torch.randint(5, (7,), generator=generator)
    mask = torch.rand(7, generator=generator) > 0.3

    def losses(model, *inputs):
        return per_example_mse(CALLS[call](model, *inputs)["prediction"], target)

    agrees(conditional, losses, x, t, y, context, mask, state=seeded(0))


@pytest.mark.parametrize(
    "losses",
    [
        lambda m, x, t, y, z: per_example_mse(m(x=x, t=t, y=y), z),
        lambda m, x, t, y, z: per_example_mse(m(y=y, t=t, x=x), z),
        lambda m, x, t, y, z: per_example_mse(m(x, y=y, t=t, drop_label=torch.arange(len(x)) % 2 == 0), z),
        lambda m, x, t, y, z: per_example_mse(m(x, t, y, drop_label=None), z),
    ],
    ids=["keyword", "another order", "mixed", "None"],
)
def test_keyword_arguments_of_a_dit(losses):
    agrees(lambda: dit(class_dropout_prob=0.5), losses, *dit_batch(6), state=seeded(0))


# --- control of randomness -------------------------------------------------------------------


class Droppy(nn.Module):
    """Dropout of entries, of channels, of attention weights, and noise added to the input."""

    def __init__(self):
        super().__init__()
        self.conv, self.channels = nn.Conv1d(4, 16, 3, padding=1), nn.Dropout1d(0.3)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        h = self.channels(self.conv(x + 0.1 * torch.randn_like(x))).transpose(1, 2)
        return self.out(F.dropout(self.layer(h), 0.2, self.training)).mean(1)


def droppy():
    torch.manual_seed(0)
    return Droppy()


def droppy_losses(model, x):
    return model(x).square().mean(1)


RANDOM = {
    "dropout": (droppy, droppy_losses, (torch.randn(5, 4, 9, generator=torch.Generator().manual_seed(1)),)),
    "label dropping": (lambda: dit(class_dropout_prob=0.5), dit_losses, dit_batch(8)),
}


@pytest.mark.parametrize("case", RANDOM)
def test_masks_are_those_of_the_forward(case):
    """The gradients are those of the masks that the seed draws for the batch, and other seeds give others."""
    build, losses, batch = RANDOM[case]
    truths = [agrees(build, losses, *batch, state=seeded(seed)) for seed in (0, 1)]
    assert oracle.relative_error(*truths) > 1e-3


@pytest.mark.parametrize("case", RANDOM)
def test_no_randomness_of_its_own(case):
    """After forward and backward the generator is where the unwrapped model leaves it."""
    build, losses, batch = RANDOM[case]
    state, model = seeded(3), build()
    torch.set_rng_state(state)
    losses(model, *batch).mean().backward()
    after = torch.get_rng_state()
    wrapped, (flash, loss) = GradSampleModule(build()), private(build(), lambda losses: losses)
    for backward in (
        lambda: losses(wrapped, *batch).mean().backward(),
        lambda: loss(losses(flash, *batch)).backward(),
    ):
        torch.set_rng_state(state)
        backward()
        assert torch.equal(torch.get_rng_state(), after)


def test_a_dropped_label_trains_the_row_of_no_label():
    model = dit(class_dropout_prob=0.5)
    images, timesteps, labels, target = dit_batch(8)
    seeded(0)
    dropped = torch.rand(8) < 0.5
    assert 0 < dropped.sum() < 8
    wrapped = GradSampleModule(model)
    seeded(0)
    F.mse_loss(wrapped(images, timesteps, labels), target).backward()
    rows = model.y_embedder.embedding_table.weight.grad_sample.abs().sum(2)  # (B, classes + 1)
    assert torch.equal(rows.argmax(1), torch.where(dropped, 7, labels))
    assert torch.equal((rows > 0).sum(1), torch.ones(8, dtype=torch.int64))


# --- shape of the loss -----------------------------------------------------------------------


def without_reduction(value):
    """A criterion that returns what it is told to, whatever its reduction."""
    return lambda prediction, target: value(F.mse_loss(prediction, target, reduction="none"))


WRONG = {
    "(B, C, H, W)": (lambda loss: loss, "shape (4, 3, 16, 16)"),
    "(B, T)": (lambda loss: loss.flatten(1), "shape (4, 768)"),
    "scalar": (lambda loss: loss.mean(), "shape ()"),
    "float": (lambda loss: float(loss.detach().mean()), "float"),
    "B - 1": (lambda loss: loss.flatten(1).mean(1)[1:], "shape (3,)"),
    "C, not B": (lambda loss: loss.mean((0, 2, 3)), "shape (3,)"),
    "B T": (lambda loss: loss.mean((1, 3)).flatten(), "shape (64,)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_loss_is_refused_with_the_two_lines_that_mend_it(wrong):
    value, shape = WRONG[wrong]
    model, (images, timesteps, labels, target) = dit(), dit_batch(4)
    wrapped, loss = private(model, without_reduction(value))
    with pytest.raises(LossShapeError) as refusal:
        loss(wrapped(images, timesteps, labels), target).backward()
    print(refusal.value)
    assert shape in refusal.value.what
    assert isinstance(refusal.value, ValueError)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    lines = [line for line in refusal.value.fix.splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    names = {"F": F, "criterion": without_reduction(lambda loss: loss)}
    exec("\n".join(["def mended(prediction, target):", *lines]).replace("(...)", "(prediction, target)"), names)
    assert torch.equal(names["mended"](images, target), per_example_mse(images, target))


def test_a_loss_for_each_channel_is_refused_though_there_are_as_many_as_examples():
    wrapped, loss = private(dit(), without_reduction(lambda loss: loss.mean((0, 2, 3))))
    images, timesteps, labels, target = dit_batch(3)
    output = loss(wrapped(images, timesteps, labels), target)
    with pytest.raises(CoupledExamplesError, match="example"):
        output.backward()


def test_a_loss_of_one_column_is_one_per_example():
    images, timesteps, labels, target = batch = dit_batch(4)
    truth = one_at_a_time(dit(), dit_losses, *batch)
    bound = median_norm(truth)
    wrapped, loss = private(dit(), without_reduction(lambda loss: loss.flatten(1).mean(1, keepdim=True)), bound)
    loss(wrapped(images, timesteps, labels), target).backward()
    within("clipped sum", oracle.relative_error(named(wrapped, "grad"), clipped_sum(truth, bound)))


def own_criterion(prediction, target, reduction="mean"):
    """A user's function with torch's convention."""
    loss = (prediction - target).abs() ** 1.5
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]


def cross_entropy(prediction, target, reduction="mean"):
    """Of every pixel's channels; classes on axis 1, one label a pixel."""
    return F.cross_entropy(prediction, target.argmax(1), reduction=reduction)


class WeightedLoss(nn.Module):
    """A user's loss object with torch's convention."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, prediction, target):
        return own_criterion(2.0 * prediction, target, self.reduction)


CRITERIA = {
    "nn.MSELoss": nn.MSELoss,
    "nn.L1Loss": nn.L1Loss,
    "nn.HuberLoss": nn.HuberLoss,
    "own object": WeightedLoss,
    "F.mse_loss": lambda reduction: F.mse_loss,
    "F.smooth_l1_loss": lambda reduction: F.smooth_l1_loss,
    "own function": lambda reduction: own_criterion,
    "labels of pixels": lambda reduction: cross_entropy,
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CRITERIA)
def test_losses_with_a_reduction_are_reduced_example_by_example(name, reduction):
    """The reference calls the criterion, with its reduction, on one example at a time."""
    images, timesteps, labels, target = batch = dit_batch(4)
    criterion = CRITERIA[name](reduction=reduction)

    said = {} if isinstance(criterion, nn.Module) else {"reduction": reduction}

    def alone(model, images, timesteps, labels, target):
        return criterion(model(images, timesteps, labels), target, **said)[None]

    truth = one_at_a_time(dit(), alone, *batch)
    bound = median_norm(truth)
    wrapped, loss = private(dit(), with_reduction(criterion, reduction), bound, reduction)
    value = loss(wrapped(images, timesteps, labels), target)
    assert value.loss_per_sample.shape == (4,)
    value.backward()
    within("clipped sum", oracle.relative_error(named(wrapped, "grad"), clipped_sum(truth, bound)))


def with_reduction(criterion, reduction):
    """The criterion as Opacus demands it: a function has the attribute too, which is "mean" unless it is set."""
    if isinstance(criterion, nn.Module) or reduction == "mean":
        return criterion
    other = partial(criterion)
    other.reduction = reduction
    return other


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_labels_do_not_count(reduction):
    """Each example's mean is over its own pixels that are not ignored."""
    images, timesteps, labels, target = dit_batch(4)
    criterion, pixels = nn.CrossEntropyLoss(ignore_index=0, reduction=reduction), target.argmax(1)
    ignored = (pixels == 0).flatten(1).sum(1)
    assert len(ignored.unique()) > 1

    def alone(model, images, timesteps, labels, pixels):
        return criterion(model(images, timesteps, labels), pixels)[None]

    truth = one_at_a_time(dit(), alone, images, timesteps, labels, pixels)
    bound = median_norm(truth)
    wrapped, loss = private(dit(), criterion, bound, reduction)
    loss(wrapped(images, timesteps, labels), pixels).backward()
    within("clipped sum", oracle.relative_error(named(wrapped, "grad"), clipped_sum(truth, bound)))
