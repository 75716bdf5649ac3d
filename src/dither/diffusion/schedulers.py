"""The diffusers schedulers that turn a process back."""

from __future__ import annotations

from typing import Any

from dither.diffusion.process import Process
from dither.errors import ConfigurationError

SAMPLERS = ("ddim", "ddpm", "dpm-solver++", "edm")
FLOW_SAMPLERS = ("euler", "dpm-solver++")  # of a process with prediction "flow"


def check_sampler(sampler: str, prediction: str) -> None:
    """Refuse a sampler that is not known, or not for a process of this prediction.

    Raises:
        ConfigurationError: it is not.
    """
    known = FLOW_SAMPLERS if prediction == "flow" else SAMPLERS
    if sampler not in known:
        raise ConfigurationError(
            f"sampler {sampler!r} is not known, or not for prediction {prediction!r}",
            fix=f"choose one of {', '.join(known)}",
        )


def build_scheduler(sampler: str, process: Process, clip: bool) -> Any:
    """Build the diffusers scheduler that inverts `process`; a sampler is one but for "edm".

    Raises:
        ConfigurationError: the sampler does not go with the process's prediction.
    """
    check_sampler(sampler, process.prediction)
    settings = process.scheduler_settings()
    if sampler == "euler":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(**settings)
    if process.prediction == "flow":
        settings |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    else:
        settings["timestep_spacing"] = "trailing"
    if sampler == "dpm-solver++":
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(**settings, algorithm_type="dpmsolver++")
    if sampler == "ddpm":
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        variance_type = "learned_range" if process.learn_sigma else "fixed_small"
        return DDPMScheduler(**settings, clip_sample=clip, variance_type=variance_type)
    assert sampler == "ddim"
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(**settings, clip_sample=clip)
