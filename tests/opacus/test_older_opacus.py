"""The oldest Opacus that is supported, 1.5.4, in a process of its own: it has no hooks classes, the rest works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "1.5.4"

SCRIPT = """
import warnings; warnings.simplefilter("ignore")
import opacus, torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import dither.opacus
from opacus import PrivacyEngine
dither.opacus.install()
assert opacus.__version__ == "VERSION", opacus.__version__

class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.out = nn.Linear(5, 6), nn.Parameter(torch.ones(6)), nn.Linear(6, 5)
    def forward(self, x, *, t):
        return self.out((self.layer(x) * self.scale).tanh() * t[:, None])

x, t = torch.randn(12, 5), torch.rand(12)
moved = {}
for mode in ("hooks", "functorch", "ew", "ghost"):
    torch.manual_seed(0)
    model = TwoInputs()
    before = [p.detach().clone() for p in model.parameters()]
    made = PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), criterion=F.mse_loss,
        data_loader=DataLoader(TensorDataset(x, t), batch_size=12), noise_multiplier=0.0, max_grad_norm=0.1,
        poisson_sampling=False, grad_sample_mode=mode)
    wrapped, optimizer = made[:2]
    criterion = made[2] if mode == "ghost" else F.mse_loss
    assert type(wrapped).__module__.startswith("dither.")
    criterion(wrapped(x, t=t), x).backward()
    optimizer.step()
    moved[mode] = torch.cat([(a - b).detach().flatten() for a, b in zip(before, model.parameters())])
    assert moved[mode].norm() > 1e-3
for mode in moved:
    torch.testing.assert_close(moved[mode], moved["hooks"], rtol=1e-4, atol=1e-6)
try:
    dither.opacus.GradSampleHooks(nn.Linear(2, 2))
except dither.errors.ConfigurationError as error:
    print(error)
"""


@pytest.fixture(scope="session")
def older(request) -> Path:
    """A folder with that Opacus; downloaded once, into pytest's cache."""
    folder = Path(request.config.cache.mkdir(f"opacus-{VERSION}"))
    if not (folder / "opacus" / "version.py").exists():
        wanted = [
            "--no-deps",
            "--disable-pip-version-check",
            "--upgrade",
            "--target",
            str(folder),
            f"opacus=={VERSION}",
        ]
        ended = subprocess.run([sys.executable, "-m", "pip", "install", *wanted], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    return folder


def test_every_mode_and_a_named_refusal(older):
    environment = {**os.environ, "PYTHONPATH": str(older)}
    script = SCRIPT.replace("VERSION", VERSION)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "too old to attach to a module without wrapping it" in ended.stdout
