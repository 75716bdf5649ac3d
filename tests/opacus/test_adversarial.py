"""Attempts to make the drop-in silently wrong: each is exact, or refused by one of dither's named errors.

T equals B in most of them, so that nothing can be told from sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import limits_table
import pytest
import torch
from limits import EXACT, NAMED, SILENT, B, Limit, Net, error, normal, of_output, squares
from limits_measure import DITHER, MODES, outcome
from limits_row import Row
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
TRIES: list[Limit] = []
UNDECLARED = ""
"""Hooks mode has only the declared batch axis to go by, and the row breaks that declaration: nothing is promised."""


def attempt(name: str, hooks: str = NAMED, ghost: str = NAMED) -> Callable[..., Any]:
    """Register a try and what must come of it in each mode."""

    def register(make: Callable[[], Row]) -> Callable[[], Row]:
        TRIES.append(Limit(name, make, ("", ""), (hooks, ghost)))
        return make

    return register


def two_layers(function: Callable[..., Any], width: int = 5) -> Net:
    return Net(function, a=nn.Linear(5, width), b=nn.Linear(width, 3))


def over_first(model: nn.Module, *inputs: Any) -> Tensor:
    """A loss per example from an output with the examples on axis 1."""
    return model(*inputs).square().sum((0, 2))


# --- examples coupled where a backward pass does not show it ---


@attempt("batch norm as the first layer")
def norm_first() -> Row:
    return Row(nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)), (normal(B, 5),), of_output)


@attempt("batch norm without parameters as the first layer")
def plain_norm_first() -> Row:
    norm = nn.BatchNorm1d(5, affine=False, track_running_stats=False)
    return Row(nn.Sequential(norm, nn.Linear(5, 3)), (normal(B, 5),), of_output)


@attempt("model called twice, the second call's outputs as negatives")
def two_views() -> Row:
    def losses(model: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        return 5 * F.cross_entropy(model(x) @ model(z).t(), torch.arange(len(x)), reduction="none")

    return Row(nn.Linear(5, 3), (normal(B, 5), normal(B, 5)), losses)


@attempt("model called twice, the second call's outputs averaged over the batch")
def second_mean() -> Row:
    return Row(nn.Linear(5, 3), (normal(B, 5), normal(B, 5)), lambda m, x, z: squares(m(x) - m(z).mean(0)))


@attempt("model called twice, the second time with the examples on axis 1", hooks=UNDECLARED)
def second_transposed() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model(x)) + over_first(model, x.transpose(0, 1).contiguous())

    model = Net(lambda m, x: m.b(m.a(2 * x).tanh()), a=nn.Linear(5, 5), b=nn.Linear(5, 3))
    return Row(model, (normal(B, B, 5),), losses)


@attempt("inputs centred by their batch mean")
def centred() -> Row:
    return Row(Net(lambda m, x: m.a(x - x.mean(0)), a=nn.Linear(5, 3)), (normal(B, 5),), of_output)


@attempt("detached batch statistics in the model", SILENT, SILENT)  # a limit that docs/from-opacus.md states
def detached() -> Row:
    def forward(model: Net, x: Tensor) -> Tensor:
        hidden = model.a(x)
        return model.b(hidden - hidden.mean(0).detach())

    return Row(two_layers(forward), (normal(B, 5),), of_output)


@attempt("coupling behind a ReLU that was closed on the first step")
def behind_relu() -> Row:
    def forward(model: Net, x: Tensor) -> Tensor:
        hidden = model.a(x)
        return model.b(hidden + torch.relu(hidden.abs().mean(0, keepdim=True) - 3))

    return Row(two_layers(forward), (30 * normal(B, 5),), of_output, earlier=[(0.01 * normal(B, 5),)])


@attempt("coupling behind a clamp that was saturated on the first step")
def behind_clamp() -> Row:
    def forward(model: Net, x: Tensor) -> Tensor:
        hidden = model.a(x)
        return model.b(hidden + hidden.mean(0, keepdim=True).clamp(-3, 3))

    return Row(two_layers(forward), (normal(B, 5),), of_output, earlier=[(1e4 * normal(B, 5),)])


def _gate(width: float) -> tuple[Any, Any]:
    """A forward whose third example depends on the second once a gate opens, and a loss of two such forwards."""

    def forward(model: Net, x: Tensor) -> Tensor:
        hidden = model.a(x)
        open_by = torch.relu(hidden[1:2].abs().sum() - width)
        return model.b(torch.cat([hidden[:2], hidden[2:3] + open_by, hidden[3:]]))

    def twice(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model(x)) + squares(model(0.001 * x))

    return forward, twice


@attempt("two examples coupled behind a gate that opens on the fourth step")
def gate_in_the_middle() -> Row:
    earlier = [(0.01 * normal(B, 5),)] * 3
    return Row(two_layers(_gate(30)[0]), (100 * normal(B, 5),), of_output, earlier=earlier)


@attempt("the same in the first of two forwards, on the fifth step")
def gate_in_one_of_two() -> Row:
    earlier = [(0.01 * normal(B, 5),)] * 4
    return Row(two_layers(_gate(30)[0]), (100 * normal(B, 5),), _gate(30)[1], earlier=earlier)


@attempt("inputs mixed before the first layer from the third step on")
def mixed_later() -> Row:
    model = Net(lambda m, x, mix: m.b(m.a(x - x.mean(0) if mix else x).tanh()), a=nn.Linear(5, 5), b=nn.Linear(5, 3))
    return Row(model, (normal(B, 5), True), of_output, earlier=[(normal(B, 5), False)] * 2)


@attempt("inputs mixed with partners' from the third step on")
def mixup_later() -> Row:
    model = Net(lambda m, x, p: m.b(m.a(x + x[p]).tanh()), a=nn.Linear(5, 5), b=nn.Linear(5, 3))
    order = torch.arange(B)
    return Row(model, (normal(B, 5), order.roll(1)), of_output, earlier=[(normal(B, 5), order)] * 2)


@attempt("examples in the middle coupled from the second step on")
def middle() -> Row:
    def forward(model: Net, x: Tensor, start: int, stop: int) -> Tensor:
        hidden = model.a(x)
        mean = hidden[start:stop].mean(0, keepdim=True)
        return model.b(torch.cat([hidden[:start], hidden[start:stop] + mean, hidden[stop:]]))

    return Row(two_layers(forward), (normal(B, 5), 1, 3), of_output, earlier=[(normal(B, 5), 1, 2)])


@attempt("loss over axis 1, from the second step on over axis 0")
def other_axis() -> Row:
    def losses(model: nn.Module, x: Tensor, axis: int) -> Tensor:
        output = model(x)
        return squares(output - output.mean(axis, keepdim=True))

    return Row(nn.Linear(5, 3), (normal(B, 5), 0), losses, earlier=[(normal(B, 5), 1)])


@attempt("partners in the loss: oneself, from the second step on another example")
def partners() -> Row:
    def losses(model: nn.Module, x: Tensor, partner: Tensor) -> Tensor:
        output = model(x)
        return (output * output[partner]).sum(1)

    earlier = [(normal(B, 5), torch.arange(B))]
    return Row(nn.Linear(5, 3), (normal(B, 5), torch.tensor([1, 2, 3, 0])), losses, earlier=earlier)


class _Coupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.mean(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.mean(0) * g + (x * g).mean(0)


@attempt("coupling inside a custom function of the loss")
def custom_coupling() -> Row:
    return Row(nn.Linear(5, 3), (normal(B, 5),), lambda m, x: _Coupling.apply(m(x)).sum(1))


@attempt("only the two largest losses count", hooks=NAMED, ghost=EXACT)
def hardest() -> Row:
    return Row(nn.Linear(5, 3), (normal(B, 5),), of_output, total=lambda losses: losses.topk(2).values.mean())


@attempt("root of the mean loss", hooks=NAMED, ghost=EXACT)
def root() -> Row:
    return Row(nn.Linear(5, 3), (normal(B, 5),), of_output, total=lambda losses: losses.mean().sqrt())


@attempt("neighbours in the batch as negatives")
def neighbours() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        return squares(output - output.roll(1, 0))

    return Row(nn.Linear(5, 3), (normal(B, 5),), losses)


@attempt("standard deviation of the batch as a feature")
def deviation_feature() -> Row:
    def forward(model: Net, x: Tensor) -> Tensor:
        hidden = model.a(x)
        return model.b(torch.cat([hidden, hidden.std(0).mean().expand(len(x), 1)], 1))

    return Row(Net(forward, a=nn.Linear(5, 5), b=nn.Linear(6, 3)), (normal(B, 5),), of_output)


@attempt("tensor hook that normalises over the batch")
def normalising_hook() -> Row:
    def forward(model: Net, x: Tensor) -> Tensor:
        hidden = model.a(x)
        hidden.register_hook(lambda g: g / g.norm())
        return model.b(hidden)

    return Row(two_layers(forward), (normal(B, 5),), of_output)


# --- where the examples lie ---


@attempt("output (T, B, d) while batch_first, first operation not on the input itself")
def time_first_output() -> Row:
    model = two_layers(lambda m, x: m.b(m.a(2 * x).tanh()).transpose(0, 1))
    return Row(model, (normal(B, B, 5),), over_first)


@attempt("output (T, B, d) while batch_first")
def time_first_plainly() -> Row:
    model = two_layers(lambda m, x: m.b(m.a(x).tanh()).transpose(0, 1))
    return Row(model, (normal(B, B, 5),), over_first)


@attempt("rows flattened batch-minor", EXACT, EXACT)
def batch_minor() -> Row:
    def forward(model: Net, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).reshape(-1, 5)
        return model.b(model.a(rows).tanh()).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)

    return Row(two_layers(forward), (normal(B, B, 5),), of_output)


@attempt("batch-minor rows as output")
def batch_minor_output() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).unflatten(0, (x.shape[1], x.shape[0])).square().sum((0, 2))

    model = two_layers(lambda m, x: m.b(m.a(x.transpose(0, 1).reshape(-1, 5)).tanh()))
    return Row(model, (normal(B, 6, 5),), losses)


@attempt("first argument (1,), returned too", EXACT, EXACT)
def single_first() -> Row:
    model = two_layers(lambda m, t, x: (m.b((m.a(x) + t).tanh()), t))
    return Row(model, (normal(1), normal(B, 5)), lambda m, t, x: squares(m(t, x)[0]), axes=(None, 0))


@attempt("prompts that are no examples, with features of their own, returned too")
def prompts() -> Row:
    def forward(model: Net, prompts: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        features = model.b(prompts)
        return model.a(x) @ features.t(), features

    def losses(model: nn.Module, prompts: Tensor, x: Tensor) -> Tensor:
        return squares(model(prompts, x)[0])

    model = Net(forward, a=nn.Linear(5, 5), b=nn.Linear(5, 5))
    return Row(model, (normal(3, 5), normal(B, 5)), losses, axes=(None, 0))


@attempt("loss from an inner tensor that is not returned, T first", EXACT, EXACT)
def inner() -> Row:
    def forward(model: Net, x: Tensor) -> Tensor:
        hidden = model.a(2 * x).tanh()
        model.kept = model.k(hidden.transpose(0, 1))
        return model.b(hidden)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        return squares(output) + getattr(model, "_module", model).kept.square().sum((0, 2))

    model = Net(forward, a=nn.Linear(5, 5), b=nn.Linear(5, 3), k=nn.Linear(5, 2))
    return Row(model, (normal(B, B, 5),), losses)


@attempt("batch of one after a batch of four", EXACT, EXACT)
def single() -> Row:
    return Row(two_layers(lambda m, x: m.b(m.a(x).tanh())), (normal(1, 6, 5),), of_output, earlier=[(normal(B, 6, 5),)])


@attempt("empty batch after a batch of four", EXACT, EXACT)
def empty() -> Row:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3))
    return Row(model, (normal(0, 2, 5, 5),), of_output, earlier=[(normal(B, 2, 5, 5),)])


@attempt("several views of an example, flattened inside", EXACT, EXACT)
def views() -> Row:
    model = two_layers(lambda m, x: m.b(m.a(x.flatten(0, 1)).tanh()).unflatten(0, (len(x), 3)).mean(1))
    return Row(model, (normal(B, 3, 5),), of_output)


@attempt("several views of an example as the wrapped module's batch")
def views_outside() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model(x.flatten(0, 1)).unflatten(0, (len(x), 3)).mean(1))

    return Row(two_layers(lambda m, x: m.b(m.a(x).tanh())), (normal(B, 3, 5),), losses)


@attempt("experts chosen for each example")
def experts() -> Row:
    def forward(model: Net, x: Tensor, which: Tensor) -> Tensor:
        output = x.new_zeros(len(x), 3)
        for index, expert in enumerate(model.experts):
            chosen = (which == index).nonzero()[:, 0]
            output = output.index_add(0, chosen, expert(x[chosen]))
        return output

    model = Net(forward, experts=nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)]))
    return Row(model, (normal(B, 5), torch.tensor([0, 1, 1, 0])), of_output)


@attempt("inner modules called one at a time", EXACT, EXACT)
def piecewise() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        inner = getattr(model, "_module", model)
        return squares(inner.b(inner.a(x).tanh().mean(1)))

    return Row(two_layers(lambda m, x: x), (normal(B, 6, 5),), losses)


# --- gradients that stay away, or come later, or are changed ---


@attempt("branch that no gradient reached on the first step", EXACT, EXACT)
def closed_branch() -> Row:
    model = Net(lambda m, x: m.b(x) + torch.relu(m.a(x) - 3), a=nn.Linear(5, 3), b=nn.Linear(5, 3))
    return Row(model, (10 * normal(B, 5),), of_output, earlier=[(0.01 * normal(B, 5),)])


@attempt("every entry of the first step's loss masked", EXACT, EXACT)
def masked_out() -> Row:
    def losses(model: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
        return squares(model(x).masked_fill(kept[:, None] == 0, 0))

    return Row(nn.Linear(5, 3), (normal(B, 5), torch.ones(B)), losses, earlier=[(normal(B, 5), torch.zeros(B))])


@attempt("tensor hook in the model that scales the gradient")
def scaling_hook() -> Row:
    def forward(model: Net, x: Tensor) -> Tensor:
        hidden = model.a(x)
        hidden.register_hook(lambda g: 3 * g)
        return model.b(hidden)

    return Row(two_layers(forward), (normal(B, 5),), of_output)


@attempt("tensor hook on the output that scales the gradient")
def scaling_output_hook() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        output.register_hook(lambda g: 3 * g)
        return squares(output)

    return Row(two_layers(lambda m, x: m.b(m.a(x))), (normal(B, 5),), losses)


@attempt("module backward hook that scales the gradient", EXACT, EXACT)
def scaling_module_hook() -> Row:
    def hook(model: nn.Module) -> None:
        model.b.register_full_backward_pre_hook(lambda module, gradients: (3 * gradients[0],))

    return Row(two_layers(lambda m, x: m.b(m.a(x))), (normal(B, 5),), of_output, before=hook)


@attempt("forward hook that replaces the output, with a parameter")
def replacing_hook() -> Row:
    def hook(model: nn.Module) -> None:
        model.register_forward_hook(lambda module, inputs, output: F.linear(output, module.b.weight.t()))

    return Row(two_layers(lambda m, x: m.b(m.a(x))), (normal(B, 5),), of_output, after=hook)


@attempt("part under no_grad", EXACT, EXACT)
def partly_no_grad() -> Row:
    def forward(model: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = model.a(x)
        return model.b(hidden)

    return Row(two_layers(forward), (normal(B, 5),), of_output)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


@attempt("parameter inside a custom function")
def custom_function() -> Row:
    model = Net(lambda m, x: _Product.apply(x, m.w) + m.a(x), a=nn.Linear(5, 3), w=nn.Parameter(torch.randn(5, 3)))
    return Row(model, (normal(B, 5),), of_output)


@attempt("a forward in eval mode inside the loss")
def eval_inside() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        model.eval()
        target = model(x)
        model.train()
        return squares(output - target)

    return Row(nn.Linear(5, 3), (normal(B, 5),), losses)


@attempt("functional_call with scaled parameters", hooks=error("ValueError"))  # Opacus's own: no grad_sample
def substituted() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        scaled = {name: 10 * p for name, p in model.named_parameters()}
        return squares(torch.func.functional_call(model, scaled, (x,)))

    return Row(nn.Linear(5, 3), (normal(B, 5),), losses, random=True)


@attempt("loss that autograd cannot differentiate twice", NAMED, EXACT)
def once() -> Row:
    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        scores, lengths = model(x).log_softmax(-1).transpose(0, 1), torch.full((len(x),), 9)
        return F.ctc_loss(scores, y, lengths, torch.full((len(x),), 3), reduction="none")

    return Row(nn.Linear(5, 6), (normal(B, 9, 5), torch.randint(1, 6, (B, 3))), losses)


@attempt("checkpoint around the wrapped module, non-reentrant")
def checkpoint_around() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return squares(checkpoint(model, x, use_reentrant=False))

    return Row(two_layers(lambda m, x: m.b(m.a(x).tanh())), (normal(B, 5),), losses)


@attempt("checkpoint around the wrapped module, reentrant")
def checkpoint_around_reentrant() -> Row:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return squares(checkpoint(model, x.requires_grad_(), use_reentrant=True))

    model = two_layers(lambda m, x: m.b(m.a(x).tanh()))
    return Row(model, (normal(B, 5),), losses, reference=of_output)


PAIRS = [(limit, mode) for limit in TRIES for mode in MODES if limit.dither[MODES.index(mode)] != UNDECLARED]


@pytest.mark.parametrize(("attempted", "mode"), PAIRS, ids=lambda part: getattr(part, "name", part))
def test_attempt(attempted: Limit, mode: str) -> None:
    found = outcome(DITHER, mode, attempted.make)
    assert limits_table.fulfils(found.category, attempted.dither[MODES.index(mode)]), found.words
