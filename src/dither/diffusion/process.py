"""The forward process: how an image is noised, what the network predicts, how timesteps are drawn.

The noise schedule is diffusers' (`DDPMScheduler`); a sampler built from the same `Process` agrees with it.

Shapes: R rows (examples times noise draws), x_0 and x_t (R, C, H, W), timesteps (R,) int64 in 0..timesteps-1, for
flow matching 1..timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dither.diffusion.timesteps import TimestepDistribution, draw
from dither.errors import ConfigurationError

Prediction = Literal["epsilon", "v", "sample", "edm", "flow"]
Weighting = Literal["uniform", "snr", "min_snr", "truncated_snr", "edm"]

# diffusers' names for what `Process.denoiser_output` hands to a scheduler
_PREDICTION_TYPES = {
    "epsilon": "epsilon", "v": "v_prediction", "sample": "sample", "edm": "sample", "flow": "flow_prediction"
}  # fmt: skip
_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class Process:
    """A diffusion: how images become noise, and what the network learns of it.

    Variance-preserving, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise; with prediction "flow" the straight
    line x_t = (1 - s) x_0 + s noise, s = t / timesteps, of flow matching (Liu et al. 2023; Lipman et al. 2023).

    All fields are public constants of a run.

    Args:
        timesteps: number of noise levels.
        beta_schedule: diffusers' name of the schedule: "linear", "scaled_linear", "squaredcos_cap_v2".
        prediction: what the network outputs: the noise "epsilon" (Ho et al. 2020), the velocity "v"
            (Salimans & Ho 2022), the clean image "sample", "edm": what a Wiener filter of white images
            leaves over (Karras et al. 2022, sec. 5), so that a network of zeros already denoises; or "flow": the
            direction noise - x_0 of the straight line.
        sigma_data: standard deviation of a pixel within its class, for "edm": a public guess.
        weighting: weight of a row's squared error. "uniform" is 1 and "snr" the signal-to-noise ratio, both on the
            error of what is predicted. The others are on the error of x_0, whatever is predicted: "min_snr"
            (Hang et al. 2023, gamma 5: min(snr, 5)), "truncated_snr" (Salimans & Ho 2022: max(snr, 1)), "edm"
            (Karras et al. 2022: snr + sigma_data^-2).
        min_timestep: lowest timestep that training draws, inclusive, counted from 0.
        max_timestep: highest, exclusive; None means `timesteps`.
        timestep_distribution: how often training draws which.
        learn_sigma: the network's second half of channels parametrises the reverse variance.

    Raises:
        ConfigurationError: an unknown name or an empty range of timesteps.
    """

    timesteps: int = 1000
    beta_schedule: str = "linear"
    prediction: Prediction = "epsilon"
    sigma_data: float = 0.5
    weighting: Weighting = "uniform"
    min_timestep: int = 0
    max_timestep: int | None = None
    timestep_distribution: TimestepDistribution = field(default_factory=TimestepDistribution)
    learn_sigma: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _require("prediction", self.prediction, get_args(Prediction))
        _require("weighting", self.weighting, get_args(Weighting))
        _require("beta_schedule", self.beta_schedule, _SCHEDULES)
        if self.sigma_data <= 0:
            raise ConfigurationError(f"sigma_data {self.sigma_data} is not above 0", fix="0.5 is usual")
        low, high = self._range()
        if not 0 <= low < high <= self.timesteps:
            raise ConfigurationError(
                f"timesteps {low}..{high} are not a range within 0..{self.timesteps}",
                fix="keep 0 <= min_timestep < max_timestep <= timesteps",
            )
        if self.learn_sigma and self.prediction != "epsilon":
            raise ConfigurationError(
                f"learn_sigma goes with prediction 'epsilon', not {self.prediction!r}",
                fix="use prediction='epsilon' or learn_sigma=False",
            )

    def scheduler_settings(self) -> dict[str, Any]:
        """Return the keyword arguments that make a diffusers scheduler agree with this process.

        With "flow" they are for `FlowMatchEulerDiscreteScheduler`, otherwise for any of DDPM's kind.
        """
        if self.prediction == "flow":
            return {"num_train_timesteps": self.timesteps}
        return {
            "num_train_timesteps": self.timesteps,
            "beta_schedule": self.beta_schedule,
            "prediction_type": _PREDICTION_TYPES[self.prediction],
        }

    @cached_property
    def scheduler(self) -> Any:
        """The diffusers `DDPMScheduler` whose noise levels training uses; not with "flow", which needs none."""
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        variance_type = "learned_range" if self.learn_sigma else "fixed_small"
        return DDPMScheduler(**self.scheduler_settings(), variance_type=variance_type)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha_bar, (timesteps,) float32."""
        alphas: Tensor = self.scheduler.alphas_cumprod
        return alphas

    def draw_timesteps(
        self, count: int, draws: int = 1, *, stratified: bool = False, device: Any = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Draw timesteps from the training distribution: (count, draws) int64.

        Args:
            count: number of examples.
            draws: draws per example.
            stratified: one draw in each of `draws` equally probable parts of the distribution (on average each still
                has the whole distribution, so the loss has the same expectation and less variance).
            device: where the timesteps live.
            generator: source of randomness; None is torch's global one.
        """
        position = torch.rand(count, draws, device=device, generator=generator)
        if stratified:
            position = (position + torch.arange(draws, device=device)) / draws
        return draw(self.timestep_probabilities, position) + self._first

    @cached_property
    def timestep_probabilities(self) -> Tensor:
        """How often training draws each timestep, (timesteps,) float64.

        Raises:
            ConfigurationError: the distribution draws nothing in the range.
        """
        signal, noise = self.signal_and_noise(torch.arange(self.timesteps) + self._first)
        return self.timestep_distribution.probabilities(noise.log() - signal.log(), *self._range())

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of x_0 and of the noise in x_t at timesteps (R,), both (R,)."""
        if self.prediction == "flow":
            level = t.float() / self.timesteps
            return 1 - level, level
        alpha_bar = self.alphas_cumprod.to(t.device)[t]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t for clean x_0, standard normal noise (both (R, C, H, W)) and timesteps (R,)."""
        if self.prediction == "flow":
            signal, level = (part.to(x_0.dtype).view(-1, 1, 1, 1) for part in self.signal_and_noise(t))
            return signal * x_0 + level * noise
        noised: Tensor = self.scheduler.add_noise(x_0, noise, t)
        return noised

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should output at x_t, (R, C, H, W)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x_0
        if self.prediction == "flow":
            return noise - x_0
        if self.prediction == "edm":
            skip, scale = self._preconditioning(t)
            return (x_0 - skip * self.add_noise(x_0, noise, t)) / scale
        velocity: Tensor = self.scheduler.get_velocity(x_0, noise, t)
        return velocity

    def denoiser_output(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Turn the network's output (R, C, H, W) into what a scheduler of `scheduler_settings` expects."""
        if self.prediction != "edm":
            return output
        skip, scale = self._preconditioning(t)
        return skip * x_t + scale * output

    def weight(self, t: Tensor) -> Tensor:
        """Return the weight of each row's mean squared error, (R,) float32."""
        if self.weighting == "uniform":
            return torch.ones(t.shape, device=t.device)
        signal, noise = self.signal_and_noise(t)
        snr = (signal / noise).square()
        if self.weighting == "snr":
            return snr
        per_x_0 = {
            "sample": torch.ones_like(snr),
            "epsilon": snr,
            "v": snr + 1,
            "edm": snr + self.sigma_data**-2,
            "flow": noise**-2,
        }[self.prediction]
        on_x_0 = {
            "min_snr": snr.clamp(max=5.0),
            "truncated_snr": snr.clamp(min=1.0),
            "edm": snr + self.sigma_data**-2,
        }[self.weighting]
        return on_x_0 / per_x_0

    def _preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return c_skip and c_out of Karras et al. 2022, table 1, for a variance-preserving x_t: (R, 1, 1, 1)."""
        alpha_bar = self.alphas_cumprod.to(t.device)[t].view(-1, 1, 1, 1)
        variance = self.sigma_data**2 * alpha_bar + 1 - alpha_bar
        return (
            self.sigma_data**2 * alpha_bar.sqrt() / variance,
            self.sigma_data * ((1 - alpha_bar) / variance).sqrt(),
        )

    @property
    def _first(self) -> int:
        """The timestep with the least noise: a straight line's 0 is the image itself, its last is noise alone."""
        return 1 if self.prediction == "flow" else 0

    def _range(self) -> tuple[int, int]:
        return self.min_timestep, self.timesteps if self.max_timestep is None else self.max_timestep


def _require(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigurationError(f"{name} {value!r} is not known", fix=f"choose one of {', '.join(known)}")
