"""An ordinary Opacus script: a DiT trained by PrivacyEngine on one fixed batch.

Prints the times of the second half of the steps (dither proves its gradients on the 1st, 2nd, 4th and 8th) and the peak
of memory.

    python benchmarks/opacus_script.py --mode ghost                     # stock Opacus
    python -m dither.opacus benchmarks/opacus_script.py --mode ghost    # the same script under dither

`benchmarks/drop_in.py` runs both in turns and prints the ratios. The position table is fixed: with a trainable one
stock Opacus raises a TypeError.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dither.diffusion import DiT


def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Per example, (B,), which stock Opacus needs in ghost mode; otherwise their mean."""
    losses = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
    return losses if squared_error.reduction == "none" else losses.mean()


squared_error.reduction = "mean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("plain", "hooks", "functorch", "ghost"), default="hooks")
    for name, default in {"width": 384, "depth": 4, "heads": 6, "size": 32, "batch": 8, "steps": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model: nn.Module = DiT(
        input_size=arguments.size,
        patch_size=2,
        hidden_size=arguments.width,
        depth=arguments.depth,
        num_heads=arguments.heads,
        learn_sigma=False,
    )
    with torch.no_grad():  # away from the zero initialisation, where half of the backward pass multiplies zeros
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    x = torch.randn(arguments.batch, 4, arguments.size, arguments.size)
    t, y = torch.randint(1000, (arguments.batch,)), torch.randint(1000, (arguments.batch,))
    noise = torch.randn_like(x)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    criterion = squared_error
    if arguments.mode != "plain":
        model, optimizer, *rest = PrivacyEngine(accountant="rdp").make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(x, t, y), batch_size=arguments.batch),
            criterion=criterion,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=arguments.mode,
        )
        criterion = rest[0] if arguments.mode == "ghost" else criterion
    times = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        criterion(model(x, t, y), noise).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # kilobytes on Linux
    print(
        json.dumps(
            {"seconds": times[len(times) // 2 :], "first": times[0], "peak_mib": peak, "module": type(model).__module__}
        )
    )


if __name__ == "__main__":
    main()
