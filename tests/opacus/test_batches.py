"""Several forwards and several backward passes before a step: what one example gives to the step is one clipped row."""

from __future__ import annotations

import pytest
import torch
from limits_measure import clipped_sum
from test_adversarial_steps import Private, network
from torch import Tensor, nn

import oracle
from dither.errors import CoverageError
from dither.opacus import DPLossFastGradientClipping, DPOptimizer, GradSampleModule

pytestmark = pytest.mark.usefixtures("double_precision")
each_mode = pytest.mark.parametrize("mode", ["hooks", "ghost"])


class Heads(nn.Module):
    """A trunk and two heads that are called by themselves as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.p, self.q = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        h = self.trunk(x).tanh()
        return self.p(h), self.q(h)


def private(model: nn.Module):
    wrapped = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=4
    )
    return wrapped, optimizer


def loss(output: Tensor, power: int = 2) -> Tensor:
    """One number per example, of gradients that are clipped."""
    return 9 * (output**power).sum(1)


def assert_clipped(model: nn.Module, optimizer: DPOptimizer, *batches) -> None:
    """The step's sum is that of the batches' losses on the plain model, each example clipped once."""
    optimizer.step()
    plain = type(model)()
    plain.load_state_dict(model.state_dict())
    truth = [oracle.per_example_gradients(plain, lambda losses=losses: losses(plain)) for losses in batches]
    whole = clipped_sum({name: torch.cat([one[name] for one in truth]) for name in truth[0]})
    assert oracle.relative_error({n: p.summed_grad for n, p in model.named_parameters()}, whole) <= 1e-10


# --- two forwards, then their losses one after the other ---


def two_losses(private: Private):
    """Functions that send back the losses of two forwards, made already."""

    def send(output: Tensor):
        losses = loss(output)
        return losses.mean().backward if private.mode == "hooks" else (lambda: private.criterion(losses).backward())

    return [send(private.wrapped(torch.randn(4, 5))) for _ in range(2)]


class WithCriterion(Private):
    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        if mode == "ghost":
            self.criterion = DPLossFastGradientClipping(self.wrapped, self.optimizer, lambda losses: losses)


@each_mode
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("forbid", [False, True])
def test_two_forwards_and_then_two_backward_passes_are_refused(mode, order, forbid):
    private = WithCriterion(mode)
    if forbid:
        private.wrapped.forbid_grad_accumulation()
    send = two_losses(private)
    send[order[0]]()
    with pytest.raises(CoverageError, match=r"\(loss_a \+ loss_b\)"):
        send[order[1]]()


@each_mode
def test_a_skipped_step_in_between_changes_nothing(mode):
    private = WithCriterion(mode)
    first, second = two_losses(private)
    first()
    private.optimizer.signal_skip_step()
    private.optimizer.step()
    private.optimizer.zero_grad()
    with pytest.raises(CoverageError, match=r"\(loss_a \+ loss_b\)"):
        second()


@each_mode
def test_what_was_dropped_does_not_count(mode):
    private = WithCriterion(mode)
    first, second = two_losses(private)
    first()
    private.optimizer.zero_grad()
    second()
    private.optimizer.step()


# --- two forwards in one loss: row i of both is one example ---


def send_sum(private: WithCriterion, *inputs: Tensor) -> None:
    losses = sum(loss(private.wrapped(x)) for x in inputs)
    losses.mean().backward() if private.mode == "hooks" else private.criterion(losses).backward()


@each_mode
@pytest.mark.parametrize(
    "parts",
    [
        lambda x: x.chunk(2),
        lambda x: (x[:3], x[5:]),
        lambda x: x.split(1),
        lambda x: [row[None] for row in x],
    ],
    ids=["chunks", "ranges", "examples", "rows"],
)
def test_parts_of_one_batch_in_one_loss_are_refused(mode, parts):
    with pytest.raises(CoverageError, match="different rows of one tensor"):
        send_sum(WithCriterion(mode), *parts(torch.randn(8, 5)))


@each_mode
@pytest.mark.parametrize(
    "views",
    [
        lambda: torch.randn(2, 4, 5).unbind(),
        lambda: torch.randn(4, 2, 5).unbind(1),
        lambda: torch.randn(4, 10).chunk(2, 1),
        lambda: [part.clone() for part in torch.randn(8, 5).chunk(2)],
        lambda: [torch.randn(4, 5)] * 2,
        lambda: [torch.randn(8, 5)[:4]] * 2,
    ],
    ids=["stacked", "pairs", "halves", "copies", "twice", "a range twice"],
)
def test_views_of_the_same_examples_in_one_loss_are_clipped_together(mode, views):
    private, inputs = WithCriterion(mode), views()
    send_sum(private, *inputs)
    private.optimizer.step()
    plain = network()
    truth = clipped_sum(oracle.per_example_gradients(plain, lambda: sum(loss(plain(x)) for x in inputs)))
    found = {name: p.summed_grad for name, p in private.model.named_parameters()}
    assert oracle.relative_error(found, truth) <= 1e-10


def test_parts_of_one_batch_sent_back_apart_are_exact():
    private, x = WithCriterion("hooks"), torch.randn(8, 5)
    for part in x.chunk(2):
        send_sum(private, part)
    private.optimizer.step()
    plain = network()
    truth = clipped_sum(oracle.per_example_gradients(plain, lambda: loss(plain(x))))
    found = {name: p.summed_grad for name, p in private.model.named_parameters()}
    assert oracle.relative_error(found, truth) <= 1e-10


# --- two losses over one forward ---


def test_a_second_loss_goes_to_the_rows_of_its_own_examples():
    model = Heads()
    wrapped, optimizer = private(model)
    x, z = torch.randn(4, 3), torch.randn(4, 3)
    p, q = wrapped(x)
    loss(p).mean().backward(retain_graph=True)
    loss(wrapped(z)[0]).mean().backward()
    loss(q, 3).mean().backward()
    assert [len(entry) for entry in model.q.weight.grad_sample] == [4, 4]

    def both(m):
        p, q = m(x)
        return loss(p) + loss(q, 3)

    assert_clipped(model, optimizer, both, lambda m: loss(m(z)[0]))


def test_a_second_loss_after_a_skipped_step_is_refused():
    wrapped, optimizer = private(Heads())
    p, q = wrapped(torch.randn(4, 3))
    loss(p).mean().backward(retain_graph=True)
    optimizer.signal_skip_step()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(CoverageError, match="clipped twice"):
        loss(q).mean().backward()


def test_a_second_loss_after_zero_grad_is_a_batch_of_its_own():
    model = Heads()
    wrapped, optimizer = private(model)
    x = torch.randn(4, 3)
    p, q = wrapped(x)
    loss(p).mean().backward(retain_graph=True)
    optimizer.zero_grad()
    loss(q).mean().backward()
    assert_clipped(model, optimizer, lambda m: loss(m(x)[1]))


def test_one_loss_of_two_batches_that_were_sent_back_apart_is_refused():
    wrapped, _ = private(Heads())
    outputs = []
    for _ in range(2):
        p, q = wrapped(torch.randn(4, 3))
        loss(p).mean().backward(retain_graph=True)
        outputs.append(q)
    with pytest.raises(CoverageError, match="sent back apart"):
        (loss(outputs[0]) + loss(outputs[1])).mean().backward()


# --- parts of a model that are sent back one after the other ---


@pytest.mark.parametrize("at_once", [False, True])
def test_heads_with_losses_of_their_own_are_clipped_together(at_once):
    model = Heads()
    wrapped, optimizer = private(model)
    wrapped.forbid_grad_accumulation()  # as under Poisson sampling
    x = torch.randn(4, 3)
    if at_once:
        losses = [loss(wrapped.p(x)), loss(wrapped.q(x))]
        for each in losses:
            each.mean().backward()
    else:
        loss(wrapped.p(x)).mean().backward()
        loss(wrapped.q(x)).mean().backward()
    assert_clipped(model, optimizer, lambda m: loss(m.p(x)) + loss(m.q(x)))


def test_heads_keep_two_accumulated_batches_apart():
    model = Heads()
    wrapped, optimizer = private(model)
    batches = [torch.randn(4, 3), torch.randn(2, 3)]
    for x in batches:
        loss(wrapped.p(x)).mean().backward()
        loss(wrapped.q(x)).mean().backward()
    assert_clipped(model, optimizer, *[lambda m, x=x: loss(m.p(x)) + loss(m.q(x)) for x in batches])


def test_heads_of_different_batches_are_refused():
    wrapped, _ = private(Heads())
    loss(wrapped.p(torch.randn(4, 3))).mean().backward()
    with pytest.raises(CoverageError, match=r"Forwards of \[2, 4\] examples"):
        loss(wrapped.q(torch.randn(2, 3))).mean().backward()


def test_heads_on_one_trunk_are_one_batch():
    model = Heads()
    wrapped, optimizer = private(model)
    wrapped.forbid_grad_accumulation()
    x = torch.randn(4, 3)
    h = wrapped.trunk(x).tanh()
    losses = [loss(wrapped.p(h)), loss(wrapped.q(h))]
    losses[0].mean().backward(retain_graph=True)
    losses[1].mean().backward()
    assert_clipped(model, optimizer, lambda m: sum(loss(output) for output in m(x)))
