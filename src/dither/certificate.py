"""The certificate: what a run guarantees, in one JSON-serialisable dictionary."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from dither.accounting import NEIGHBOURING_RELATION, accountant_name

if TYPE_CHECKING:
    from dither.training import PrivateTraining

FORMAT = "dither certificate 1"
_NOT_PRIVATE = ("batch_size", "loss", "clip_fraction", "dropped")


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
    if training.verification["exact"] is False and training.index > training.verification["first_step"]:
        reasons.append("steps were taken after the verification found gradients that are not exact")
    sampler = training.sampler
    left = [*_NOT_PRIVATE] if training.index else []
    if training.verification["exact"] is not None:
        left.append("verification")  # how far the compared gradients are off
    return {
        "format": FORMAT,
        "private": not reasons,
        "reasons": reasons,
        "mechanism": "DP-SGD: Gaussian noise on sums of clipped per-example gradients of Poisson batches",
        "neighbouring_relation": NEIGHBOURING_RELATION,
        "unit_of_privacy": "one example of the dataset",
        "epsilon": training.epsilon(),
        "delta": training.delta,
        "planned_epsilon": training.planned_epsilon,
        "target_epsilon": training.target_epsilon,
        "accountant": accountant_name(),
        "ledger": [asdict(event) for event in training.ledger.events],
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
        "verification": {"status": _verification_status(training), **training.verification},
        "not_private_values_that_left_the_process": left,
        "versions": {"dither": _dither_version(), "torch": str(torch.__version__)},
    }


def _verification_status(training: PrivateTraining) -> str:
    """What came of comparing the first batch's gradients with autograd's."""
    exact = training.verification["exact"]
    if exact is None:
        return "not run" if training.verify_first_batch else "turned off"
    return "exact" if exact else "not exact"


def _dither_version() -> str:
    try:
        return version("dither")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
