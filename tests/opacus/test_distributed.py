"""Two real processes over gloo: the drop-in under Opacus's DDP wrapper and under torch's, against one process."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from dither.opacus import DifferentiallyPrivateDistributedDataParallel, PrivacyEngine

WORLD, N, STEPS = 2, 16, 3
mp.set_forkserver_preload(["dither.opacus"])  # once for all the processes, each of which is forked from there


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.out = nn.Linear(5, 6), nn.Parameter(torch.ones(6)), nn.Linear(6, 5)

    def forward(self, x, t):
        return self.out((self.layer(x) * self.scale).tanh() * t[:, None])


def build():
    torch.manual_seed(0)
    return TwoInputs().double(), torch.randn(N, 5, dtype=torch.float64), torch.rand(N, dtype=torch.float64)


def train(model, x, t, mode, part):
    warnings.simplefilter("ignore")
    made = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(x, t), batch_size=N),
        criterion=nn.MSELoss(),
        noise_multiplier=0.0,
        max_grad_norm=0.1,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    wrapped, optimizer = made[:2]
    criterion = made[2] if mode == "ghost" else F.mse_loss
    for _ in range(STEPS):
        optimizer.zero_grad()
        criterion(wrapped(x[part], t[part]), x[part]).backward()
        optimizer.step()


def worker(rank, address, mode, wrapper, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD)
    model, x, t = build()
    half = slice(rank * N // WORLD, (rank + 1) * N // WORLD)
    train(wrapper(model), x, t, mode, half)
    results[rank] = {n: p.detach() for n, p in model.named_parameters()}
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("wrapper", [DifferentiallyPrivateDistributedDataParallel, DistributedDataParallel])
def test_two_processes_train_as_one(mode, wrapper, tmp_path):
    model, x, t = build()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, x, t, mode, slice(None))
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (f"file://{tmp_path / 'store'}", mode, wrapper, results)
        mp.start_processes(worker, arguments, nprocs=WORLD, start_method="forkserver")
        for rank in range(WORLD):
            for name, parameter in model.named_parameters():
                assert (parameter - start[name]).abs().max() > 1e-4
                torch.testing.assert_close(results[rank][name], parameter.detach(), rtol=1e-10, atol=1e-12)
