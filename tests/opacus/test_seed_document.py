"""The document's code samples run as written: both usage sections, the criterion, both examples.

`seed/` holds the blocks of `seed.md` byte for byte. What they take as given (a batch, a data loader, a loss) is in the
namespace that they run in. Where a sample says `...` for arguments, what it calls is a function of the namespace's that
takes `...`. Only `f(img_size=256, ...)` is not Python: there `...` is substituted (`SUBSTITUTIONS`).

Labels are dropped with probability one half, and targets drawn in the loop, so the references replay the generator.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from seed_cases import (
    clipped_sum,
    dit,
    dit_batch,
    dit_losses,
    example_error,
    named,
    parameter_error,
    per_example_mse,
    replayed,
    seeded,
    within,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dither.opacus
import oracle

pytestmark = pytest.mark.usefixtures("installed")

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[2] / "shared" / "seed.md"
SAMPLES = ("custom_criterion", "standard_usage", "flash_usage", "example_1", "example_2")
NOT_PROGRAMS = {"Problem Statement", "Technical Details"}
"""Sections whose blocks are signatures without a body, and lines of Opacus's and of a formula."""

CONFIG = {"class_dropout_prob": 0.5}
SUBSTITUTIONS = {"example_1": {"img_size=256, ...": "img_size=256, patch_size=64"}}
"""Everything that is changed in a sample before it runs."""


def sample(name: str) -> str:
    """A block as the document has it."""
    return (HERE / "seed" / f"{name}.py.txt").read_text(encoding="utf-8")


def run(name: str, names: dict) -> list[dict]:
    """Execute a block in a namespace; what each optimizer step was given, by parameter name."""
    code = sample(name)
    for written, replacement in SUBSTITUTIONS.get(name, {}).items():
        assert code.count(written) == 1
        code = code.replace(written, replacement)
    steps = []

    def step(optimizer, args, kwargs):
        wrapped = names["gs_model"]
        attributes = [a for a in ("grad", "summed_grad") if hasattr(wrapped._module.pos_embed, a)]
        steps.append({a: named(wrapped, a) for a in attributes})

    handle = register_optimizer_step_pre_hook(step)
    try:
        exec(compile(code, name, "exec"), names)
    finally:
        handle.remove()
    return steps


class Loader:
    """Yields batches; notes the generator's state and the parameters before each."""

    def __init__(self, names: dict, batches: list):
        self.names, self.batches, self.before = names, batches, []

    def __iter__(self):
        for batch in self.batches:
            self.before.append((torch.get_rng_state(), copy.deepcopy(self.names["gs_model"]._module.state_dict())))
            yield batch

    def truths(self, **config) -> list[dict]:
        """Each batch's per-example gradients of the loop's loss, replayed on an unwrapped model."""

        def losses(model, images, timesteps, labels):
            target = torch.randn_like(images)
            return per_example_mse(model(images, timesteps, labels), target)

        truths = []
        for batch, (state, parameters) in zip(self.batches, self.before, strict=True):
            model = dit(**{**CONFIG, **config})
            model.load_state_dict(parameters)
            truths.append(replayed(model, losses, *batch, state=state))
        return truths


def namespace() -> dict:
    """What the samples take as given. The model's constructor is asked for `...`, or for arguments."""

    def constructor(*dots, **config):
        assert dots in ((), (...,))
        return dit(**{**CONFIG, **config})

    images, timesteps, labels, target = dit_batch(6)
    return {
        "torch": torch, "F": F, "compute_loss": F.mse_loss, "DiTModelWithFlashAttention": constructor,
        "images": images, "timesteps": timesteps, "labels": labels, "target": target, "batch_size": 6,
    }  # fmt: skip


def uneven() -> torch.nn.Module:
    """A DiT whose gradient norms differ by label: the samples' bound of one clips some examples and leaves others."""
    model = dit(**CONFIG)
    with torch.no_grad():
        model.final_layer.linear.weight.mul_(8)
        model.y_embedder.embedding_table.weight.mul_(10.0 * torch.arange(8)[:, None])
    return model


def within_clipped(what: str, step: dict, truth: dict) -> None:
    """Hold a step's sum of gradients clipped to one against the reference, and its noise to the scale of one."""
    norms = oracle.norms(truth)
    assert (norms > 1).any() and (norms < 1).any(), norms
    expected = clipped_sum(truth, 1.0)
    within(f"{what}: clipped sum", oracle.relative_error(step["summed_grad"], expected))
    within(f"{what}: clipped sum, worst parameter", parameter_error(step["summed_grad"], expected))
    assert 0.98 < float(noise_of(step, 6).std()) < 1.02


def noise_of(step: dict, batch: int) -> torch.Tensor:
    """What a step added to its clipped sum."""
    noise = [step["grad"][name] * batch - step["summed_grad"][name] for name in step["grad"]]
    return torch.cat([n.flatten() for n in noise])


def test_samples_are_the_documents():
    """Every block but those that are not programs, in order; where the document is at hand."""
    if DOCUMENT.exists():
        sections = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
        programs = [text for text in sections if text.partition("\n")[0] not in NOT_PROGRAMS]
        blocks = [block for text in programs for block in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)]
        assert blocks == [sample(name) for name in SAMPLES]


def test_custom_criterion():
    names = {"F": F}
    run("custom_criterion", names)
    output, target = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = names["custom_criterion"](output, target)
    assert ours.shape == (5,)
    within("losses", example_error({"": ours}, {"": per_example_mse(output.double(), target.double())}))


def test_standard_usage():
    names = namespace()
    state = seeded(0)
    run("standard_usage", names)
    assert type(names["gs_model"]) is dither.opacus.GradSampleModule
    batch = [names[key] for key in ("images", "timesteps", "labels", "target")]
    truth = replayed(dit(**CONFIG), dit_losses, *batch, state=state)
    ours = named(names["gs_model"], "grad_sample")
    within("per-example gradients", example_error(ours, truth))
    within("per-example gradients, worst parameter", parameter_error(ours, truth))


def test_flash_usage():
    names = namespace()
    names["model"] = uneven()
    state = seeded(0)
    (step,) = run("flash_usage", names)
    assert type(names["gs_model"]) is dither.opacus.GradSampleModuleFastGradientClipping
    assert type(names["optimizer"]) is dither.opacus.DPOptimizerFastGradientClipping
    assert type(names["dp_loss_fn"]) is dither.opacus.DPLossFastGradientClipping
    batch = [names[key] for key in ("images", "timesteps", "labels", "target")]
    truth = replayed(uneven(), dit_losses, *batch, state=state)
    within_clipped("one step", step, truth)


def test_example_1():
    """Both batches' per-example gradients are kept; `.grad` is their mean, clipped as the sample does."""
    names = {**namespace(), "GradSampleModule": GradSampleModule}
    loader = names["dataloader"] = Loader(names, [dit_batch(size, size, img_size=256)[:3] for size in (4, 3)])
    seeded(0)
    steps = run("example_1", names)
    assert type(names["gs_model"]) is dither.opacus.GradSampleModule
    samples = {name: p.grad_sample for name, p in names["gs_model"]._module.named_parameters()}
    for i, (step, truth) in enumerate(zip(steps, loader.truths(img_size=256, patch_size=64), strict=True)):
        within(f"batch {i}: per-example gradients", example_error({n: g[i] for n, g in samples.items()}, truth))
        mean = {name: g.mean(0) for name, g in truth.items()}
        norm = float(oracle.norms({name: g[None] for name, g in mean.items()}))
        clipped = {name: min(1.0, 1.0 / (norm + 1e-6)) * g for name, g in mean.items()}
        within(f"batch {i}: gradient", oracle.relative_error(step["grad"], clipped))


def test_example_2():
    """The sums of both steps, with the criterion of the document and noise of the stated scale."""
    names = {
        **namespace(),
        "model": uneven(),
        "GradSampleModuleFastGradientClipping": GradSampleModuleFastGradientClipping,
        "DPOptimizerFastGradientClipping": lambda dots: DPOptimizerFastGradientClipping(
            torch.optim.Adam(names["gs_model"].parameters()),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=6,
        ),
        "DPLossFastGradientClipping": lambda dots: DPLossFastGradientClipping(
            names["gs_model"], names["optimizer"], names["custom_criterion"], "mean"
        ),
    }
    run("custom_criterion", names)
    loader = names["dataloader"] = Loader(names, [dit_batch(size, size)[:3] for size in (6, 5)])
    seeded(0)
    steps = run("example_2", names)
    for i, (step, truth) in enumerate(zip(steps, loader.truths(), strict=True)):
        within_clipped(f"batch {i}", step, truth)
