"""A network over a mixture of Gaussians: the mixture's own denoiser, and what the network says on top of it.

Of a noisy image whose class is a mixture of Gaussians the expected clean image is known in closed form. A network whose
output starts at zero therefore starts as good as the mixture, and training is left with what the mixture lacks.

Legend: N rows, K classes, M components of a class, D entries of an image, R directions, A axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dither.errors import ConfigurationError
from dither.release import release_sizes

if TYPE_CHECKING:
    from dither.diffusion.process import Process
    from dither.release import ClassMixtures


_LEAST = 1e-4


class OverMixture(nn.Module):
    """A denoiser under the signature of `DiT` whose output is the mixture's plus the network's.

    The mixture is in its buffers: weights files hold it, and it is not trained. Until `fill` it is a
    Gaussian of white images.

    Args:
        model: the network, with `input_size`, `in_channels` and `num_classes`; best one whose output starts at zero.
        process: the process that it is trained and sampled with.
        components: Gaussians of a class, M.
        rank: directions of the release, R, before it is cut to an image's entries.

    Raises:
        ConfigurationError: a process of learned variances.
    """

    middle: Tensor
    directions: Tensor
    weights: Tensor
    centres: Tensor
    axes: Tensor
    variances: Tensor
    rest: Tensor

    def __init__(self, model: nn.Module, process: Process, components: int, rank: int) -> None:
        super().__init__()
        if process.learn_sigma:
            raise ConfigurationError("a mixture has no learned variances", fix="learn_sigma=False")
        self.model, self.process = model, process
        self.input_size, self.in_channels, self.num_classes = (
            int(getattr(model, name)) for name in ("input_size", "in_channels", "num_classes")
        )
        shape = self.in_channels, self.input_size, self.input_size
        directions, axes = release_sizes(self.in_channels * self.input_size**2, rank)
        each = self.num_classes, components
        for name, size in {
            "middle": shape,
            "directions": (directions, *shape),
            "weights": each,
            "centres": (*each, directions),
            "axes": (*each, directions, axes),
            "variances": (*each, axes),
            "rest": (2,),
        }.items():
            empty = torch.ones(size) if name in ("weights", "rest") else torch.zeros(size)
            self.register_buffer(name, empty)

    def fill(self, mixtures: ClassMixtures) -> None:
        """Take what was released.

        Raises:
            ConfigurationError: it is of another size.
        """
        for name, tensor in mixtures.tensors().items():
            own = self.get_buffer(name)
            if own.shape != tensor.shape:
                raise ConfigurationError(
                    f"the released {name} are of shape {tuple(tensor.shape)}, the model's of {tuple(own.shape)}",
                    fix="the same components and rank for both, and images of the model's shape",
                )
            own.copy_(tensor)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_label: Tensor | None = None) -> Tensor:
        """Predict (N, C, H, W) from noisy images, timesteps (N,) and labels (N,), hidden where `drop_label` (N,)."""
        learned: Tensor = self.model(x, t, y, drop_label=drop_label)
        with torch.no_grad():
            signal, noise = (part.to(x.dtype).view(-1, 1, 1, 1) for part in self.process.signal_and_noise(t))
            signal, noise = signal.clamp(min=_LEAST), noise.clamp(min=_LEAST)  # a straight line ends with one alone
            clean = self.expected(x / signal, (noise / signal).flatten(), y, drop_label)
            known = self.process.target(clean, (x - signal * clean) / noise, t)
        return known + learned

    def expected(self, x: Tensor, noise: Tensor, y: Tensor, drop_label: Tensor | None = None) -> Tensor:
        """The mean of clean images given x (N, C, H, W), a clean image plus noise of deviation (N,), and its class."""
        offset = x.flatten(1) - self.middle.flatten()
        basis = self.directions.flatten(1)  # (R, D)
        points = offset @ basis.T
        variance = noise.square()[:, None]
        within, outside = self.rest
        left = (offset - points @ basis) * (outside / (outside + variance))
        # In a component's coordinates: along its axes, and the rest of the distance.
        axes = self.axes.permute(2, 0, 1, 3).flatten(1)  # (R, K M A)
        centres = self.centres.flatten(0, 1)  # (K M, R)
        groups, number = self.variances.shape[:2], self.variances.shape[2]
        along = (points @ axes).unflatten(1, (-1, number)) - self._centres_along()
        spread = torch.maximum(self.variances, within).flatten(0, 1) + variance[:, None]  # (N, K M, A)
        far = (points.square().sum(1, keepdim=True) - 2 * points @ centres.T + centres.square().sum(1))[..., None]
        scaled = along / spread
        rest = within + variance
        distance = (along * scaled).sum(2) + (far[..., 0] - along.square().sum(2)) / rest
        scores = self.weights.log().flatten() - 0.5 * (spread.log().sum(2) - number * rest.log() + distance)
        other = torch.arange(groups[0], device=y.device).repeat_interleave(groups[1]) != y[:, None]
        if drop_label is not None:
            other = other & ~drop_label[:, None]
        shares = scores.masked_fill(other, -torch.inf).softmax(1)  # (N, K M)
        # A component's own mean: its centre, and of the distance to it the share of the variance that is not noise.
        gain = within / rest
        pulled = shares[..., None] * (along - variance[:, None] * scaled - gain[..., None] * along)
        known = gain * points + (1 - gain) * (shares @ centres) + pulled.flatten(1) @ axes.T
        clean: Tensor = known @ basis + left + self.middle.flatten()
        return clean.view_as(x)

    def _centres_along(self) -> Tensor:
        """Each centre in its component's axes, (K M, A)."""
        return torch.einsum("kmr,kmra->kma", self.centres, self.axes).flatten(0, 1)
