"""Flash clipping: the loss object's `backward` leaves the sum of clipped gradients in `.grad`, in one pass."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import oracle
from dither import errors
from dither.opacus import (
    BatchMemoryManager,
    DPLossFastGradientClipping,
    DPOptimizerFastGradientClipping,
    GradSampleModuleFastGradientClipping,
    PrivacyEngine,
    register_norm_sampler,
)

C = 0.2
STRATEGIES = ("auto", "hold", "ghost", "tile", "two_pass")


pytestmark = pytest.mark.usefixtures("double_precision")


def private(model, criterion, batch_size, reduction="mean", noise=0.0, **options):
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=C, loss_reduction=reduction, **options)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(wrapped.parameters(), lr=1.0),
        noise_multiplier=noise,
        max_grad_norm=C,
        expected_batch_size=batch_size,
        loss_reduction=reduction,
    )
    return wrapped, optimizer, DPLossFastGradientClipping(wrapped, optimizer, criterion, reduction)


def clipped(gradients: dict) -> dict:
    """The oracle's sum with Opacus's factor, C / (norm + 1e-6)."""
    factors = (C / (oracle.norms(gradients) + 1e-6)).clamp(max=1.0)
    return {n: torch.einsum("b,b...->...", factors, g) for n, g in gradients.items()}


def grads(model) -> dict:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


class Net(nn.Module):
    """Convolutions, norm layers, a raw parameter, an embedding tied to the output layer, dropout, two inputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.down = nn.Conv2d(8, 8, 2, stride=2, groups=2)
        self.group, self.layer, self.instance = nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.InstanceNorm2d(8, affine=True)
        self.table = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x, y=None):
        h = self.group(self.conv(x).relu_()) * self.scale
        h = self.instance(self.down(h))
        h = self.layer(F.dropout(h, 0.2, self.training).flatten(2).mT)
        return self.head(h + self.table(y)[:, None])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_is_exact(strategy, reduction):
    model, x, y = Net(), torch.randn(4, 3, 6, 6), torch.randint(5, (4,))
    target = torch.randn(4, 9, 5)
    state = torch.get_rng_state()
    reduce = torch.mean if reduction == "mean" else torch.sum
    truth = oracle.per_example_gradients(
        model, lambda: reduce(F.mse_loss(model(x, y=y), target, reduction="none").flatten(1), 1)
    )
    wrapped, optimizer, criterion = private(model, nn.MSELoss(reduction=reduction), 4, reduction, strategy=strategy)
    torch.set_rng_state(state)
    loss = criterion(wrapped(x, y=y), target)
    loss.backward()
    assert oracle.relative_error(grads(model), clipped(truth)) <= 1e-10
    torch.testing.assert_close(wrapped.per_sample_gradient_norms.double(), oracle.norms(truth), rtol=1e-6, atol=0)
    torch.testing.assert_close(wrapped.get_norm_sample(), oracle.norms(truth))
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer.step()
    for name, total in clipped(truth).items():
        divisor = 4 if reduction == "mean" else 1
        torch.testing.assert_close(before[name] - dict(model.named_parameters())[name], total / divisor)


def test_one_backward_pass():
    """Each layer's input gradient is computed once."""

    class Counted(torch.autograd.Function):
        passes = 0

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            Counted.passes += int(bool(gradient.isfinite().all()))
            return gradient

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    wrapped, _, criterion = private(model, nn.MSELoss(), 4)
    model[0].register_forward_hook(lambda layer, given, output: Counted.apply(output))
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    for _ in range(2):  # the first batch is also proved, and once more when the passes have doubled
        criterion(wrapped(x), y).backward()
    before = Counted.passes
    criterion(wrapped(x), y).backward()
    assert Counted.passes == before + 1


@pytest.mark.parametrize("ghost", [True, False])
def test_use_ghost_clipping_chooses_the_strategy(ghost):
    model = nn.Sequential(nn.Linear(3, 400), nn.Tanh(), nn.Linear(400, 300))
    wrapped, _, criterion = private(model, nn.MSELoss(), 4, use_ghost_clipping=ghost)
    criterion(wrapped(torch.randn(4, 2, 3)), torch.randn(4, 2, 300)).backward()
    chosen = {use.parameter: use.strategy for use in wrapped.plan.uses}
    assert chosen["2.weight"] == ("ghost" if ghost else "tile")


def test_a_memory_budget_is_kept():
    bias = 4 * 64 * 8
    wrapped, _, criterion = private(nn.Linear(64, 64), nn.MSELoss(), 4, memory_budget=bias, strategy="auto")
    criterion(wrapped(torch.randn(4, 500, 64)), torch.randn(4, 500, 64)).backward()
    assert sum(use.held_bytes for use in wrapped.plan.uses) == bias
    wrapped.memory_budget = bias - 1
    with pytest.raises(errors.MemoryBudgetError, match=r"2,047 bytes.*2,048: of bias"):
        criterion(wrapped(torch.randn(4, 500, 64)), torch.randn(4, 500, 64)).backward()
    with pytest.raises(errors.UnknownStrategyError):
        private(nn.Linear(2, 2), nn.MSELoss(), 4, strategy="fast")
    wrapped, _, criterion = private(nn.Linear(2, 2), nn.MSELoss(), 4)
    wrapped.strategy = "two-pass"
    with pytest.raises(errors.UnknownStrategyError):
        criterion(wrapped(torch.randn(4, 2)), torch.randn(4, 2)).backward()


def test_arithmetic_on_the_loss_object():
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    wrapped, _, criterion = private(model, nn.MSELoss(), 4)
    wrapped.disable_hooks()
    truth = oracle.per_example_gradients(
        model, lambda: 0.5 * F.mse_loss(model(x), y, reduction="none").mean(1) - model(x).abs().mean(1) / 3 + 1
    )
    wrapped.enable_hooks()
    absolute = DPLossFastGradientClipping(wrapped, criterion.optimizer, nn.L1Loss(), "mean")
    out = wrapped(x)
    loss = sum([0.5 * criterion(out, y), -(absolute(out, torch.zeros_like(y)) / 3)]) + 1
    assert float(loss) == loss.item() and f"{loss:.3f}" == f"{loss.item():.3f}"
    loss.backward()
    assert oracle.relative_error(grads(model), clipped(truth)) <= 1e-10


# --- accumulation ------------------------------------------------------------------------------


def test_a_second_backward_before_the_step_accumulates():
    model, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.randn(6, 2)
    truth = oracle.per_example_gradients(model, lambda: F.mse_loss(model(x), y, reduction="none").mean(1))
    wrapped, optimizer, criterion = private(model, nn.MSELoss(), 3)
    for part in (slice(0, 3), slice(3, 6)):
        criterion(wrapped(x[part]), y[part]).backward()
    assert oracle.relative_error(grads(model), clipped(truth)) <= 1e-10
    assert optimizer.accumulated_iterations == 2
    optimizer.step()
    assert oracle.relative_error(grads(model), {n: t / 6 for n, t in clipped(truth).items()}) <= 1e-10
    criterion(wrapped(x), y).backward()  # without zero_grad: the step has taken the sums
    assert optimizer.accumulated_iterations == 1
    wrapped.forbid_grad_accumulation()
    with pytest.raises(ValueError, match="Poisson sampling is not compatible with grad accumulation"):
        criterion(wrapped(x), y).backward()


def test_batch_memory_manager_sums_physical_batches():
    model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randn(8, 2)
    truth = oracle.per_example_gradients(model, lambda: F.mse_loss(model(x), y, reduction="none").mean(1))
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped, optimizer, criterion, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=8),
            criterion=nn.MSELoss(),
            noise_multiplier=0.0,
            max_grad_norm=C,
            poisson_sampling=False,
            grad_sample_mode="ghost",
        )
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as batches:
        sizes = []
        for data, target in batches:
            optimizer.zero_grad()
            criterion(wrapped(data), target).backward()
            optimizer.step()
            sizes.append(len(data))
    assert sizes == [3, 3, 2]
    moved = {n: before[n] - p.detach() for n, p in model.named_parameters()}
    assert oracle.relative_error(moved, {n: t / 8 for n, t in clipped(truth).items()}) <= 1e-10


def test_an_empty_batch_takes_a_noisy_step():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    wrapped, optimizer, criterion = private(model, nn.MSELoss(), 4, noise=1.0)
    before = copy.deepcopy(model.state_dict())
    criterion(wrapped(torch.zeros(0, 3)), torch.zeros(0, 2)).backward()
    optimizer.step()
    assert all((model.state_dict()[n] != before[n]).all() for n in before)


# --- the loss is not a riddle ------------------------------------------------------------------


def image_model():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1))


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.SmoothL1Loss(), F.mse_loss, F.l1_loss])
def test_a_loss_of_image_shape_is_reduced_per_example(criterion):
    model, x, y = image_model(), torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    if not isinstance(criterion, nn.Module):
        function = criterion
    else:
        function = {nn.MSELoss: F.mse_loss, nn.SmoothL1Loss: F.smooth_l1_loss}[type(criterion)]
    truth = oracle.per_example_gradients(model, lambda: function(model(x), y, reduction="none").flatten(1).mean(1))
    wrapped, _, loss = private(model, criterion, 4)
    value = loss(wrapped(x), y)
    assert value.loss_per_sample.shape == (4,)
    value.backward()
    assert oracle.relative_error(grads(model), clipped(truth)) <= 1e-10


@pytest.mark.parametrize(
    "criterion, ignored",
    [
        (nn.CrossEntropyLoss(), -100),
        (F.cross_entropy, -100),
        (partial(F.cross_entropy, ignore_index=2), 2),
        (nn.CrossEntropyLoss(ignore_index=2), 2),
    ],
    ids=["module", "function", "partial", "other index"],
)
def test_ignored_pixels_and_flattened_tokens(criterion, ignored):
    model, x = nn.Conv2d(3, 5, 1), torch.randn(4, 3, 6, 6)
    y = torch.randint(5, (4, 6, 6))
    y[0, :3] = ignored
    truth = oracle.per_example_gradients(
        model,
        lambda: torch.stack(
            [F.cross_entropy(o[None], t[None], ignore_index=ignored) for o, t in zip(model(x), y, strict=True)]
        ),
    )
    wrapped, _, loss = private(model, criterion, 4)
    loss(wrapped(x), y).backward()
    assert oracle.relative_error(grads(model), clipped(truth)) <= 1e-10
    wrapped.zero_grad()
    logits = wrapped(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, T, classes)
    loss(logits.flatten(0, 1), y.flatten(), shape=logits.shape).backward()
    assert oracle.relative_error(grads(model), clipped(truth)) <= 1e-10
    assert not hasattr(F.cross_entropy, "reduction")


@pytest.mark.parametrize(
    "criterion, shape",
    [
        (lambda p, y: F.mse_loss(p, y, reduction="none"), r"\(4, 3, 5, 5\)"),
        (lambda p, y: F.mse_loss(p, y), r"\(\)"),
        (lambda p, y: F.mse_loss(p, y, reduction="none").mean((0, 1, 2)), r"\(5,\)"),
    ],
    ids=["image", "scalar", "one number per column"],
)
def test_a_criterion_that_is_not_per_example_shows_the_shape_and_the_fix(criterion, shape):
    wrapped, _, loss = private(image_model(), criterion, 4)
    with pytest.raises(errors.LossShapeError, match=shape) as found:
        loss(wrapped(torch.randn(4, 3, 5, 5)), torch.randn(4, 3, 5, 5)).backward()
    assert "return loss.flatten(1).mean(1)" in str(found.value)


# --- guards ------------------------------------------------------------------------------------


def test_a_plain_backward_pass_never_reaches_the_optimizer():
    model, x, y = nn.Linear(3, 2), 100 * torch.randn(4, 3), torch.randn(4, 2)
    wrapped, optimizer, criterion = private(model, nn.MSELoss(), 4)
    before = copy.deepcopy(model.state_dict())
    F.mse_loss(wrapped(x), y).backward()
    with pytest.raises(errors.CoverageError, match="DPLossFastGradientClipping"):
        optimizer.step()
    optimizer.zero_grad()
    wrapped.disable_hooks()
    F.mse_loss(wrapped(x), y).backward()
    with pytest.raises(errors.CoverageError, match="not clipped"):
        optimizer.step()
    wrapped.enable_hooks()
    optimizer.zero_grad()
    criterion(wrapped(x), y).backward()
    F.mse_loss(wrapped(x), y).backward()  # beside a clipped one
    with pytest.raises(errors.CoverageError, match="not clipped"):
        optimizer.step()
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in before)


def test_nothing_unclipped_hides_among_accumulated_sums():
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    for write in (
        lambda m, w: (1000 * F.linear(x, m.weight)).sum().backward(),
        lambda m, w: m.weight.grad.data.add_(1000),
        lambda m, w: setattr(m.weight, "grad", m.weight.grad + 1000),
        lambda m, w: (w.eval(), (1000 * w(x)).sum().backward(), w.train()),
    ):
        model = nn.Linear(3, 2)
        wrapped, optimizer, criterion = private(model, nn.MSELoss(), 4)
        criterion(wrapped(x), y).backward()
        write(model, wrapped)
        with pytest.raises(errors.CoverageError, match="not clipped"):
            criterion(wrapped(x), y).backward()
        with pytest.raises(errors.CoverageError, match="not clipped"):
            optimizer.step()
    model = nn.Linear(3, 2)
    wrapped, optimizer, criterion = private(model, nn.MSELoss(), 4)
    F.linear(x, model.weight).sum().backward()
    criterion(wrapped(x), y).backward()  # cleared first
    optimizer.step()


def test_clip_grad_norm_between_backward_and_step_also_without_examples():
    wrapped, optimizer, criterion = private(nn.Linear(3, 2), nn.MSELoss(), 4, noise=1.0)
    for size in (4, 0, 4):
        optimizer.zero_grad()
        criterion(wrapped(torch.randn(size, 3)), torch.randn(size, 2)).backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 0.01)
        optimizer.step()


def test_a_loss_over_an_axis_of_no_output_is_refused():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x, mask):
            return self.b((self.a(2 * x) + mask.sum(1)[:, None]).tanh())

    wrapped, _, criterion = private(Masked(), lambda out, y: out.square().sum((0, 2)), 4)
    with pytest.raises(errors.CaptureError):
        criterion(wrapped(torch.randn(4, 7, 5), torch.randn(7, 7)), None).backward()


def test_two_passes_by_hand_as_in_opacus():
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    truth = oracle.per_example_gradients(model, lambda: F.mse_loss(model(x), y, reduction="none").mean(1))
    wrapped, optimizer, _ = private(model, nn.MSELoss(), 4)
    losses = F.mse_loss(wrapped(x), y, reduction="none").mean(1)
    losses.mean().backward(retain_graph=True)
    optimizer.zero_grad()
    factors = wrapped.get_clipping_coef()
    wrapped.disable_hooks()
    (factors * losses).sum().backward()
    wrapped.enable_hooks()
    optimizer.step()
    summed = {n: p.summed_grad for n, p in model.named_parameters()}
    assert oracle.relative_error(summed, clipped(truth)) <= 1e-10


def two_passes_through(hook):
    """A wrapped pair of layers, with a hook between them; gives the model and the step's backward."""
    torch.manual_seed(0)

    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.first(x) * 1
            h.register_hook(hook)
            return self.last(h)

    model = Hooked()
    wrapped, _, criterion = private(model, nn.MSELoss(), 4, strategy="two_pass")
    x, y = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    return model, lambda: criterion(wrapped(x), y).backward()


def test_two_pass_refuses_a_backward_that_does_not_repeat_itself():
    model, step = two_passes_through(lambda g: g * (torch.rand(()) < 0.5) * 1e3)
    refused = 0
    for _ in range(20):
        before = {n: p.grad for n, p in model.named_parameters()}
        try:
            step()
        except errors.CoverageError as error:
            refused += 1
            assert "second backward pass" in str(error)
            assert all(p.grad is None or p.grad is before[n] for n, p in model.named_parameters())
        else:
            total = sum(float(g.square().sum()) for g in grads(model).values()) ** 0.5
            assert total <= 4 * C * (1 + 1e-6)
        model.zero_grad()
    assert refused >= 2


def test_the_smaller_of_two_bounds_is_taken_with_a_warning():
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    truth = oracle.per_example_gradients(model, lambda: F.mse_loss(model(x), y, reduction="none").mean(1))
    wrapped, optimizer, criterion = private(model, nn.MSELoss(), 4)
    wrapped.max_grad_norm = 10 * C
    with pytest.warns(UserWarning, match="max_grad_norm"):
        criterion(wrapped(x), y).backward()
    assert oracle.relative_error(grads(model), clipped(truth)) <= 1e-10
    assert optimizer.max_grad_norm == C


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_an_example_that_is_not_finite_is_left_out(strategy, value):
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3), torch.randn(5, 2)
    x[2] = value
    keep = [0, 1, 3, 4]
    truth = oracle.per_example_gradients(model, lambda: F.mse_loss(model(x[keep]), y[keep], reduction="none").mean(1))
    wrapped, _, criterion = private(model, nn.MSELoss(), 5, strategy=strategy)
    criterion(wrapped(x), y).backward()
    assert oracle.relative_error(grads(model), clipped(truth)) <= 1e-10


def test_a_second_backward_over_one_forward_and_a_coupled_loss_are_refused():
    wrapped, _, criterion = private(nn.Linear(3, 2), nn.MSELoss(), 4)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    loss = criterion(wrapped(x), y)
    loss.loss_per_sample.sum().backward(retain_graph=True)
    with pytest.raises(errors.CoverageError, match="clipped twice"):
        loss.backward()
    out = wrapped(x)
    with pytest.raises(errors.CoupledExamplesError):
        criterion(out - out.mean(0), y).backward()
    with pytest.raises(errors.CoverageError, match="does not depend"):
        criterion(torch.randn(4, 2, requires_grad=True), y).backward()


def test_registered_norm_samplers_are_honoured():
    class Doubled(nn.Linear):
        pass

    def norms(layer, activations, backprops):
        gradient = torch.einsum("ni,nj->nij", backprops, activations[0])
        return {layer.weight: 2 * gradient.flatten(1).norm(dim=1), layer.bias: 2 * backprops.norm(dim=1)}

    register_norm_sampler(Doubled)(norms)
    try:
        model, x, y = nn.Sequential(nn.Linear(3, 3), Doubled(3, 2)), torch.randn(4, 3), torch.randn(4, 2)
        truth = oracle.per_example_gradients(model, lambda: F.mse_loss(model(x), y, reduction="none").mean(1))
        doubled = {n: g * (2 if n.startswith("1") else 1) for n, g in truth.items()}
        factors = (C / (oracle.norms(doubled) + 1e-6)).clamp(max=1.0)
        expected = {n: torch.einsum("b,b...->...", factors, g) for n, g in truth.items()}
        for strategy in ("auto", "two_pass"):
            wrapped, _, criterion = private(model, nn.MSELoss(), 4, strategy=strategy)
            criterion(wrapped(x.requires_grad_()), y).backward()
            assert oracle.relative_error(grads(model), expected) <= 1e-6  # _norm_sample has the parameter's dtype
            wrapped.to_standard_module().zero_grad()
    finally:
        del GradSampleModuleFastGradientClipping.NORM_SAMPLERS[Doubled]
