"""A Hugging Face Accelerate loop: diffusers' class-conditional DiT, `accelerator.prepare`, `accelerator.backward`.

    python examples/accelerate_loop.py

First the privacy engine, then `prepare`. The script is written for Opacus, with one added line: `install()`. Without
it, stock Opacus 1.6.0 ends in the first forward, for the transformer calls its time embedding twice:
NotImplementedError: Parameter tying is not supported with Ghost Clipping. With grad_sample_mode="hooks" and an ordinary
loss it ran.
"""

import argparse

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiTTransformer2DModel
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import dither.opacus

dither.opacus.install()


def build_model():
    return DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_embeds_ada_norm=10,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    model = build_model().train()
    engine = PrivacyEngine()
    model, optimizer, criterion, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        criterion=torch.nn.MSELoss(),
        data_loader=DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=args.batch_size),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
    )
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = DDPMScheduler()
    for epoch in range(args.epochs):
        for x_0, labels in loader:
            t = torch.randint(scheduler.config.num_train_timesteps, (len(x_0),), device=x_0.device)
            noise = torch.randn_like(x_0)
            x_t = scheduler.add_noise(x_0, noise, t)
            optimizer.zero_grad()
            loss = criterion(model(x_t, timestep=t, class_labels=labels).sample, noise)
            accelerator.backward(loss)
            optimizer.step()
        epsilon = engine.get_epsilon(delta=1e-4)
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f} (not private), epsilon {epsilon:.2f} at delta 1e-4")


if __name__ == "__main__":
    main()
