"""A U-ViT, called by keyword: `model(x=x_t, timesteps=t)`. The script is plain Opacus, without a line of dither.

    python -m dither.opacus examples/uvit_keyword.py

The position table and the output's scale are parameters of the top module itself, which has two inputs, both named
(https://github.com/meta-pytorch/opacus/issues/777). `python examples/uvit_keyword.py`, with stock Opacus 1.6.0, ends in
the first `loss.backward()`: IndexError: list index out of range.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, width, heads, skip=False):
        super().__init__()
        self.merge = nn.Linear(2 * width, width) if skip else None
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h, skip=None):
        if skip is not None:
            h = self.merge(torch.cat([h, skip], dim=-1))
        q, k, v = self.qkv(self.norm_1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm_2(h))


class UViT(nn.Module):
    """Bao et al. 2023, arXiv:2209.12152: time is one more token, and the second half sees the first half's tokens."""

    def __init__(self, size=8, patch=2, width=48, heads=4, depth=2):
        super().__init__()
        self.patch, self.grid, self.width = patch, size // patch, width
        self.embed = nn.Conv2d(1, width, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid**2, width))
        self.down = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.middle = Block(width, heads)
        self.up = nn.ModuleList(Block(width, heads, skip=True) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, patch**2)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, timesteps):
        angles = timesteps[:, None] * torch.exp(-math.log(1e4) * torch.linspace(0, 1, self.width // 2).to(x))
        time = torch.cat([angles.cos(), angles.sin()], dim=-1)
        h = torch.cat([time[:, None], self.embed(x).flatten(2).transpose(1, 2)], dim=1) + self.positions
        skips = []
        for block in self.down:
            h = block(h)
            skips.append(h)
        h = self.middle(h)
        for block in self.up:
            h = block(h, skip=skips.pop())
        patches = self.scale * self.head(self.norm(h))[:, 1:].transpose(1, 2)
        return F.fold(patches, (self.grid * self.patch,) * 2, kernel_size=self.patch, stride=self.patch)


def noised(x_0, steps=1000):
    """A noisy image, its time and the noise."""
    t = torch.randint(1, steps, (len(x_0),))
    alpha_bar = torch.cos(t / steps * math.pi / 2).square().view(-1, 1, 1, 1).to(x_0)
    noise = torch.randn_like(x_0)
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise, t, noise


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()

    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    loader = DataLoader(TensorDataset(images), batch_size=args.batch_size)
    model = UViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    for epoch in range(args.epochs):
        for (x_0,) in loader:
            x_t, t, noise = noised(x_0)
            loss = F.mse_loss(model(x=x_t, timesteps=t), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        epsilon = engine.get_epsilon(delta=1e-4)
        print(f"epoch {epoch}: loss {loss:.3f} (not private), epsilon {epsilon:.2f} at delta 1e-4")


if __name__ == "__main__":
    main()
