"""The diffusers schedulers that turn a process back."""

from __future__ import annotations

from typing import Any

from dither.diffusion.process import Process
from dither.errors import ConfigurationError

SAMPLERS = ("ddim", "ddpm", "dpm-solver++", "edm")
FLOW_SAMPLERS = ("euler", "dpm-solver++")  # of a process with prediction "flow"


def build_scheduler(sampler: str, process: Process, clip: bool) -> Any:
    """Build the diffusers scheduler that inverts `process`.

    Raises:
        ConfigurationError: not a sampler of diffusers that goes with the process's prediction.
    """
    if process.prediction == "flow":
        return _flow_scheduler(sampler, process)
    settings = {**process.scheduler_settings(), "timestep_spacing": "trailing"}
    if sampler == "ddpm":
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        variance_type = "learned_range" if process.learn_sigma else "fixed_small"
        return DDPMScheduler(**settings, clip_sample=clip, variance_type=variance_type)
    if sampler == "ddim":
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        return DDIMScheduler(**settings, clip_sample=clip)
    if sampler == "dpm-solver++":
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(**settings, algorithm_type="dpmsolver++")
    raise ConfigurationError(
        f"sampler {sampler!r} is not known, or not for prediction {process.prediction!r}",
        fix=f"choose one of {', '.join(SAMPLERS)}",
    )


def _flow_scheduler(sampler: str, process: Process) -> Any:
    """Build the diffusers scheduler that follows a straight line back."""
    settings = process.scheduler_settings()
    if sampler == "euler":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(**settings)
    if sampler == "dpm-solver++":
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(
            **settings, prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++"
        )
    raise ConfigurationError(
        f"sampler {sampler!r} does not go with prediction 'flow'", fix=f"choose one of {', '.join(FLOW_SAMPLERS)}"
    )
