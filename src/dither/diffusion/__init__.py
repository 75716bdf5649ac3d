"""Class-conditional diffusion transformers: model, process, per-example loss, sampling."""

from dither.diffusion.dit import DiT, dit
from dither.diffusion.edm import Churn
from dither.diffusion.flash import DiTModelWithFlashAttention
from dither.diffusion.grid import image_grid, save_grid
from dither.diffusion.loss import DiffusionLoss, Draws
from dither.diffusion.process import Process
from dither.diffusion.recipe import (
    Recipe,
    build_ema,
    build_loss,
    build_model,
    build_optimizer,
    build_process,
)
from dither.diffusion.sampling import FLOW_SAMPLERS, SAMPLERS, sample
from dither.diffusion.timesteps import TimestepDistribution

__all__ = [
    "FLOW_SAMPLERS",
    "SAMPLERS",
    "Churn",
    "DiT",
    "DiTModelWithFlashAttention",
    "DiffusionLoss",
    "Draws",
    "Process",
    "Recipe",
    "TimestepDistribution",
    "build_ema",
    "build_loss",
    "build_model",
    "build_optimizer",
    "build_process",
    "dit",
    "image_grid",
    "sample",
    "save_grid",
]
