"""diffusers' text-to-image UNet with ghost clipping: timestep by position, `encoder_hidden_states=` by keyword.

    python examples/unet2d_condition.py

A digit's prompt is four vectors from a fixed table, which stands for a frozen text encoder. The cross-attention reads
them; the UNet predicts the noise. Without the `install()` line, stock Opacus 1.6.0 ends in the first `loss.backward()`,
because nn.MSELoss leaves it four axes: RuntimeError: grad can be implicitly created only for scalar outputs. With a
criterion that returns one loss per image it ran.
"""

import argparse

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import dither.opacus

dither.opacus.install()

WORDS, WIDTH = 4, 24


def build_model():
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def forever(loader):
    """Poisson batches without end, each drawn anew."""
    while True:
        yield from loader


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    prompts = torch.randn(10, WORDS, WIDTH)
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=args.batch_size)
    scheduler = DDPMScheduler()
    unet = build_model().train()
    engine = PrivacyEngine()
    unet, optimizer, criterion, loader = engine.make_private(
        module=unet,
        optimizer=torch.optim.AdamW(unet.parameters(), lr=1e-3),
        criterion=torch.nn.MSELoss(),
        data_loader=loader,
        noise_multiplier=0.8,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
    )
    for _, (x_0, labels) in zip(range(args.steps), forever(loader), strict=False):
        t = torch.randint(scheduler.config.num_train_timesteps, (len(x_0),))
        noise = torch.randn_like(x_0)
        x_t = scheduler.add_noise(x_0, noise, t)
        optimizer.zero_grad()
        prediction = unet(x_t, t, encoder_hidden_states=prompts[labels]).sample
        loss = criterion(prediction, noise)
        loss.backward()
        optimizer.step()
    epsilon = engine.get_epsilon(delta=1e-4)
    print(f"{args.steps} steps: loss {loss.item():.3f} (not private), epsilon {epsilon:.2f} at delta 1e-4")


if __name__ == "__main__":
    main()
