"""`PrivacyEngine` in every mode, with and without a wrapper, with Poisson batches, and its checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import oracle
from dither import opacus as drop_in
from dither.opacus import DPLossFastGradientClipping, PrivacyEngine, get_hooks_class, get_optimizer_class

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG", "ignore:.*Optimal order", "ignore:Full backward hook")
MODES = ("hooks", "functorch", "ew", "ghost")


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.label = nn.Linear(6, 8), nn.Embedding(4, 8)
        self.out, self.gain = nn.Linear(8, 6), nn.Parameter(torch.ones(8))

    def forward(self, x, t, *, y):
        return self.out((self.image(x) * self.gain + self.label(y)).tanh() * t[:, None])


def data(n=40):
    torch.manual_seed(0)
    return TensorDataset(torch.randn(n, 6), torch.rand(n), torch.randint(4, (n,)))


def engine():
    return PrivacyEngine(accountant="rdp")


def make(mode, engine_, model, *, wrap_model=True, noise=0.0, poisson=False, batch_size=40, **options):
    made = engine_.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(data(), batch_size=batch_size),
        criterion=nn.MSELoss(),
        noise_multiplier=noise,
        max_grad_norm=options.pop("max_grad_norm", 0.1),
        poisson_sampling=poisson,
        grad_sample_mode=mode,
        wrap_model=wrap_model,
        **options,
    )
    return made if mode == "ghost" else (*made[:2], nn.MSELoss(), made[2])


def step(model, optimizer, criterion, batch):
    x, t, y = batch
    optimizer.zero_grad()
    criterion(model(x, t, y=y), x).backward()
    optimizer.step()


@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_every_mode_is_the_clipped_mean(mode, wrap_model):
    if mode == "ew" and not wrap_model:
        with pytest.raises(ValueError, match="ew"):  # as in Opacus
            get_hooks_class(mode)
        return
    model = Conditional().double()
    x, t, y = (column.double() if column.is_floating_point() else column for column in data().tensors)
    truth = oracle.per_example_gradients(model, lambda: (model(x, t, y=y) - x).square().mean(1))
    factors = (0.1 / (oracle.norms(truth) + 1e-6)).clamp(max=1.0)
    expected = {n: torch.einsum("b,b...->...", factors, g) / 40 for n, g in truth.items()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped, optimizer, criterion, _ = make(mode, engine(), model, wrap_model=wrap_model)
    assert isinstance(wrapped, nn.Module) == wrap_model
    step(wrapped if wrap_model else model, optimizer, criterion, (x, t, y))
    moved = {n: before[n] - p.detach() for n, p in model.named_parameters()}
    assert oracle.relative_error(moved, expected) <= 1e-10


@pytest.mark.parametrize("clipping", ["per_layer", "adaptive"])
def test_other_clippings(clipping):
    model = Conditional()
    options = (
        {"max_grad_norm": [0.1] * 6}
        if clipping == "per_layer"
        else {
            "target_unclipped_quantile": 0.5,
            "clipbound_learning_rate": 0.2,
            "max_clipbound": 10.0,
            "min_clipbound": 0.01,
            "unclipped_num_std": 1.0,
        }
    )
    wrapped, optimizer, criterion, loader = make("hooks", engine(), model, clipping=clipping, **options)
    assert type(optimizer) is get_optimizer_class(clipping, False, "hooks")
    step(wrapped, optimizer, criterion, next(iter(loader)))
    for parameter in model.parameters():
        bound = 0.1 * 40 if clipping == "per_layer" else None
        assert torch.isfinite(parameter).all()
        if bound is not None:
            assert parameter.summed_grad.norm() <= bound * (1 + 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_poisson_training_spends_what_the_accountant_says(mode):
    engine_ = engine()
    wrapped, optimizer, criterion, loader = make(mode, engine_, Conditional(), noise=1.0, poisson=True, batch_size=4)
    sizes = []
    for batch in loader:
        step(wrapped, optimizer, criterion, batch)
        sizes.append(len(batch[0]))
    assert len(set(sizes)) > 1 and len(sizes) == len(loader) == 10
    accountant = drop_in.RDPAccountant()
    for _ in sizes:
        accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    assert engine_.get_epsilon(1e-5) == pytest.approx(accountant.get_epsilon(1e-5))


def test_a_target_epsilon_is_met():
    engine_ = engine()
    model = Conditional()
    wrapped, optimizer, criterion, loader = engine_.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=4),
        criterion=nn.MSELoss(),
        target_epsilon=5.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
    )
    assert isinstance(criterion, DPLossFastGradientClipping)
    for _ in range(2):
        for batch in loader:
            step(wrapped, optimizer, criterion, batch)
    assert 4.5 <= engine_.get_epsilon(1e-5) <= 5.0


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_checkpoint_goes_on_where_it_stopped(mode, tmp_path):
    engine_ = engine()
    wrapped, optimizer, criterion, loader = make(mode, engine_, Conditional(), noise=1.0, batch_size=4)
    batches = list(loader)
    for batch in batches[:5]:
        step(wrapped, optimizer, criterion, batch)
    engine_.save_checkpoint(path=tmp_path / "run.pt", module=wrapped, optimizer=optimizer)
    other = engine()
    resumed, optimizer2, criterion2, _ = make(mode, other, Conditional(), noise=1.0, batch_size=4)
    other.load_checkpoint(path=tmp_path / "run.pt", module=resumed, optimizer=optimizer2)
    assert other.get_epsilon(1e-5) == engine_.get_epsilon(1e-5)
    for ours, theirs in zip(resumed.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    step(resumed, optimizer2, criterion2, batches[5])
    assert other.get_epsilon(1e-5) > engine_.get_epsilon(1e-5)


def test_a_checkpoint_of_stock_opacus_is_read(tmp_path):
    import opacus

    stock = opacus.PrivacyEngine(accountant="rdp")
    plain = nn.Linear(6, 2)
    model, optimizer, _ = stock.make_private(
        module=plain,
        optimizer=torch.optim.SGD(plain.parameters(), lr=1.0),
        data_loader=DataLoader(data(), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    stock.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    stock.save_checkpoint(path=tmp_path / "run.pt", module=model, optimizer=optimizer)
    engine_, ours = engine(), drop_in.GradSampleModule(nn.Linear(6, 2))
    engine_.load_checkpoint(path=tmp_path / "run.pt", module=ours, optimizer=None)
    assert engine_.get_epsilon(1e-5) == stock.get_epsilon(1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True))


def test_no_op_mode_wraps_any_forward_and_forms_nothing():
    model = Conditional()
    wrapped, _, _, _ = make("no_op", engine(), model)
    x, t, y = data().tensors
    F.mse_loss(wrapped(x, t, y=y), x).backward()
    assert model.gain.grad_sample is None and model.gain.grad is not None


def test_the_same_module_is_not_wrapped_twice_with_other_arguments():
    engine_, model = engine(), Conditional()
    wrapped, *_ = make("hooks", engine_, model)
    again, *_ = make("hooks", engine_, wrapped)
    assert again is wrapped
    with pytest.raises(ValueError, match="Pre-existing GradSampleModule"):
        make("ghost", engine_, wrapped)
