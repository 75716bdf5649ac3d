"""Bounds that change while a batch is summed, settings of subclasses, parts in train mode, hooks, replaced buffers."""

from __future__ import annotations

import opacus.optimizers.optimizer as stock_noise
import opacus.optimizers.optimizer_fast_gradient_clipping as stock_fast_noise
import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

import dither.opacus
from dither import errors
from dither.opacus import DPOptimizer, GradSampleModule, PrivacyEngine


def private(mode, engine=PrivacyEngine, **options):
    model, data = nn.Linear(3, 2), TensorDataset(torch.randn(8, 3), torch.randn(8, 2))
    criterion = {"criterion": nn.MSELoss()} if mode == "ghost" else {}
    made = engine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(data, batch_size=8),
        poisson_sampling=False,
        grad_sample_mode=mode,
        **({"noise_multiplier": 1.0, "max_grad_norm": 8.0} | options),
        **criterion,
    )
    return made[0], made[1], made[2] if mode == "ghost" else F.mse_loss


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_noise_is_for_the_largest_bound_of_the_sum(mode, monkeypatch):
    model, optimizer, criterion = private(mode)
    drawn, before = [], stock_noise._generate_noise

    def watched(std, *args, **options):
        drawn.append(float(std))
        return before(std, *args, **options)

    monkeypatch.setattr(stock_noise, "_generate_noise", watched)
    monkeypatch.setattr(stock_fast_noise, "_generate_noise", watched)
    for bound, last in ((8.0, False), (4.0, False), (2.0, True)):
        optimizer.max_grad_norm = model.max_grad_norm = bound
        optimizer.signal_skip_step(do_skip=not last)
        optimizer.zero_grad()
        criterion(model(1e4 * torch.randn(2, 3)), torch.randn(2, 2)).backward()
        optimizer.step()
    assert set(drawn) == {8.0} and optimizer.max_grad_norm == 2.0
    drawn.clear()
    optimizer.zero_grad()
    criterion(model(torch.randn(2, 3)), torch.randn(2, 2)).backward()
    optimizer.step()
    assert set(drawn) == {2.0}


@pytest.mark.usefixtures("installed")
def test_arithmetic_keeps_the_settings_of_a_loss():
    from opacus.utils.adaptive_clipping import PrivacyEngineAdaptiveClipping

    model, _, criterion = private("ghost", PrivacyEngineAdaptiveClipping, noise_multiplier=4.0)
    loss = criterion(model(torch.randn(8, 3)), torch.randn(8, 2))
    for other in (loss / 2, 3 * loss, loss + loss, -loss):
        assert type(other) is type(loss)
        assert other.initial_noise_multiplier == loss.initial_noise_multiplier == 4.0


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 5).requires_grad_(False), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.body(x).flatten(0, 1)).unflatten(0, x.shape[:2])


def test_a_head_in_train_mode_has_the_examples_of_the_whole_model():
    wrapped = GradSampleModule(Head())
    wrapped.eval()
    wrapped._module.head.train()
    wrapped(torch.randn(4, 7, 3)).square().flatten(1).sum(1).mean().backward()
    assert wrapped._module.head.weight.grad_sample.shape == (4, 2, 5)
    wrapped.eval()
    with torch.no_grad():
        wrapped(torch.randn(4, 7, 3))


def test_a_coupled_loss_is_refused_however_often_it_is_sent_back():
    wrapped, x, target = GradSampleModule(nn.Linear(3, 2)), torch.randn(4, 3), torch.randn(2)
    for _ in range(6):
        wrapped.zero_grad()
        with pytest.raises(errors.CoupledExamplesError):
            (wrapped(x).mean(0) - target).square().sum().backward()


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_refused_in_flash_clipping(register):
    model, _, criterion = private("ghost")
    getattr(next(model.parameters()), register)(lambda value: None)
    with pytest.raises(errors.UnsupportedOpError, match="hook"):
        criterion(model(torch.randn(8, 3)), torch.randn(8, 2)).backward()


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x)


def test_a_buffer_that_is_replaced_by_a_statistic_is_refused():
    with pytest.raises(errors.BufferUpdateError, match="mean"):
        GradSampleModule(Centred())(torch.randn(4, 3))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.last = DPLSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x, lengths):
        _, (h, _) = self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        return self.last(h[-1])


@pytest.mark.filterwarnings("ignore:Full backward hook")  # of the first state, which is zeros
def test_opacus_recurrent_layers_on_examples_that_were_sorted_are_refused():
    wrapped, x = GradSampleModule(Packed()), torch.randn(3, 5, 3)
    wrapped(x, torch.tensor([5, 3, 2])).square().sum(1).mean().backward()
    with pytest.raises(errors.UnsupportedOpError, match="sorted"):
        wrapped(x, torch.tensor([2, 5, 3]))


@pytest.mark.parametrize("mode", ["ghost_fsdp", "ghost_tp"])
@pytest.mark.parametrize("wrap_model", [True, False])
def test_sharded_flash_clipping_is_refused_by_name(mode, wrap_model):
    with pytest.raises(errors.UnsupportedOpError, match=mode):
        dither.opacus.prepare_module(nn.Linear(3, 2), mode, wrap_model=wrap_model, max_grad_norm=1.0)


@pytest.mark.usefixtures("installed")
def test_an_optimizer_of_flash_clipping_is_a_dp_optimizer():
    from opacus.optimizers import DPOptimizer as Named

    _, optimizer, _ = private("ghost")
    assert Named is DPOptimizer and isinstance(optimizer, Named)
