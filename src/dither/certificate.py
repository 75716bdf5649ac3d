"""The certificate: what a run guarantees, in one JSON-serialisable dictionary."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from dither.accounting import NEIGHBOURING_RELATION, accountant_name

if TYPE_CHECKING:
    from dither.training import PrivateTraining

FORMAT = "dither certificate 1"
_NOT_PRIVATE = ("batch_size", "loss", "clip_fraction", "dropped", "step_seconds")


def certificate(training: PrivateTraining) -> dict[str, Any]:
    """What was guaranteed, to whom, by which mechanism.

    Args:
        training: a run, finished or not.

    Returns:
        JSON-serialisable, as report/certificate.schema.json says. "epsilon" is spent,
        "planned_epsilon" of the whole run; both hold only where "private".
    """
    reasons = []
    if training.seed is not None:
        reasons.append(f"seed={training.seed}: batches and noise can be computed by whoever knows the seed")
    reasons += [
        f"{event.release} were released with a seed: their noise can be computed by whoever knows it"
        for event in training.prior
        if not event.private
    ]
    if training.verification["exact"] is False and training.index > training.verification["first_step"]:
        reasons.append("steps were taken after the verification found gradients that are not exact")
    sampler = training.sampler
    left = [*_NOT_PRIVATE] if training.index else []
    if training.verification["exact"] is not None:
        left.append("verification")  # whether the compared gradients are the same
    return {
        "format": FORMAT,
        "private": not reasons,
        "reasons": reasons,
        "mechanism": _mechanism(training),
        "neighbouring_relation": NEIGHBOURING_RELATION,
        "unit_of_privacy": "one example of the dataset",
        "epsilon": training.epsilon(),
        "delta": training.delta,
        "planned_epsilon": training.planned_epsilon,
        "target_epsilon": training.target_epsilon,
        "accountant": accountant_name(),
        "ledger": [event.to_dict() for event in training.ledger.events],
        "noise_multiplier": training.noise_multiplier,
        "max_grad_norm": training.max_grad_norm,
        "clipping": training.clipping,
        "sensitivity": training.sensitivity,
        "sampling": "Poisson",
        "sample_rate": sampler.sample_rate,
        "expected_batch_size": sampler.expected_batch_size,
        "dataset_size": sampler.dataset_size,
        "steps_done": training.index,
        "steps_planned": training.steps,
        "resumed": training.resumed,
        "verification": _verification(training),
        "not_private_values_that_left_the_process": left,
        "versions": {"dither": _dither_version(), "torch": str(torch.__version__)},
    }


def _mechanism(training: PrivateTraining) -> str:
    """The steps' mechanism, and what the ledger has before them."""
    steps = "DP-SGD: Gaussian noise on sums of clipped per-example gradients of Poisson batches"
    earlier = " and ".join(dict.fromkeys(event.release for event in training.prior))
    return f"{steps}; before it, {earlier} released with Gaussian noise" if earlier else steps


def _verification(training: PrivateTraining) -> dict[str, Any]:
    """What came of comparing the first batch's gradients with autograd's; by how much they differ is not for others."""
    exact = training.verification["exact"]
    if exact is None:
        status = "not run" if training.first_batches.wanted else "turned off"
    else:
        status = "exact" if exact else "not exact"
    public = ("exact", "first_step", "tolerance")
    return {"status": status, **{name: value for name, value in training.verification.items() if name in public}}


def _dither_version() -> str:
    try:
        return version("dither")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
