"""A GAN with two optimizers: a private discriminator, and an ordinary generator that learns through it.
The script is written for Opacus, with one added line: `dither.opacus.install()`.

    python examples/gan.py

What is private: only the discriminator sees real images, so only its steps are accounted; each of their terms is one
real image and one generated one, clipped together, so a real image moves the sum by at most max_grad_norm. The
generator learns from the private discriminator alone, in batches of a public size, so the same epsilon holds for its
weights and whatever it draws.

The discriminator is spectrally normalised (Miyato et al. 2018, arXiv:1802.05957). Stock Opacus 1.6.0 refuses to wrap
it: NotImplementedError, "Model contains a trainable layer with buffers". With plain convolutions it ran the same loop.
"""

import argparse

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

import dither.opacus

dither.opacus.install()

LATENT = 16


def build_generator():
    return nn.Sequential(
        nn.Linear(LATENT, 64 * 4),
        nn.Unflatten(1, (64, 2, 2)),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def build_discriminator():
    return nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 32, 4, stride=2, padding=1)),
        nn.LeakyReLU(0.2),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(32, 64, 4, stride=2, padding=1)),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(64 * 4, 1),
        nn.Flatten(0),
    )


def verdict_loss(logits, real, reduction="mean"):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)), reduction=reduction)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()

    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    loader = DataLoader(TensorDataset(images), batch_size=args.batch_size)
    generator, discriminator = build_generator(), build_discriminator()
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    engine = PrivacyEngine()
    discriminator, discriminator_optimizer, loader = engine.make_private(
        module=discriminator,
        optimizer=discriminator_optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    before = parameters_to_vector(generator.parameters()).detach()
    for epoch in range(args.epochs):
        for (real,) in loader:
            # As many generated images as real ones: image i of both is clipped together.
            fake = generator(torch.randn(len(real), LATENT)).detach()
            discriminator_optimizer.zero_grad()
            loss = verdict_loss(discriminator(real), True) + verdict_loss(discriminator(fake), False)
            loss.backward()
            discriminator_optimizer.step()

            discriminator_optimizer.zero_grad()  # the generator's pass leaves gradients there too
            generator_optimizer.zero_grad()
            fake = generator(torch.randn(args.batch_size, LATENT))
            generator_loss = verdict_loss(discriminator(fake), True)
            generator_loss.backward()
            generator_optimizer.step()
        epsilon = engine.get_epsilon(delta=1e-4)
        print(f"epoch {epoch}: loss {loss:.3f} (not private), epsilon {epsilon:.2f} at delta 1e-4")
    moved = (parameters_to_vector(generator.parameters()).detach() - before).norm()
    print(f"generator: loss {generator_loss:.3f}, weights moved by {moved:.3f}")


if __name__ == "__main__":
    main()
