"""Every example runs as its user would run it, and its model's gradients are those of one example at a time."""

from __future__ import annotations

import copy
import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dither.opacus
import forks
import oracle

EXAMPLES = Path(__file__).parent.parent / "examples"
B = 6
SHORT = ["--epochs=1", "--batch-size=125"]  # four steps
FIRST_DIGITS = """
import sklearn.datasets
digits = sklearn.datasets.load_digits()
for name in ("data", "images", "target"):
    digits[name] = digits[name][:500]
sklearn.datasets.load_digits = lambda: digits
"""
"""Before each script: the data it loads, shortened."""
RESULT = re.compile(r"loss (\S+) \(not private\), epsilon (\S+) at delta (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def programs() -> Iterator[forks.Server]:
    """Forks the scripts; torch and the libraries that they import are imported once."""
    libraries = ("opacus", "torch._dynamo", "sklearn.datasets", "transformers.models.bert", "diffusers.models.unets")
    server = forks.Server(*libraries, environment={"HF_HUB_OFFLINE": "1"})
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["-m", "dither.opacus", "uvit_keyword.py", *SHORT], id="uvit_keyword"),
        pytest.param(["gan.py", *SHORT], id="gan"),
        pytest.param(["lora_peft.py", "--mode=hooks", *SHORT], id="lora_peft, hooks"),
        pytest.param(["lora_peft.py", "--mode=ghost", *SHORT], id="lora_peft, ghost"),
        pytest.param(["unet2d_condition.py", "--steps=3"], id="unet2d_condition"),
        pytest.param(["-m", "dither.opacus", "lightning_module.py", *SHORT], id="lightning_module"),
        pytest.param(["accelerate_loop.py", *SHORT], id="accelerate_loop"),
    ],
)
def test_runs(words, programs):
    done = programs.run(*words, cwd=EXAMPLES, before=FIRST_DIGITS)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout
    results = RESULT.findall(printed)
    assert len(results) == 1, printed
    loss, epsilon, delta = map(float, results[0])
    assert math.isfinite(loss)
    assert loss > 0
    assert 0 < epsilon < 20
    assert delta == 1e-4
    if "gan.py" in words:
        (moved,) = re.findall(r"weights moved by (\S+)$", printed, re.MULTILINE)
        assert float(moved) > 0


@pytest.fixture
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Import an example; its `install()` ends with the test."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    before = dither.opacus.installed()
    yield load
    if not before:
        dither.opacus.uninstall()


@dataclass
class Case:
    """A model of an example, its call, and its losses (B,) from what the call returned."""

    model: nn.Module
    call: Callable[[nn.Module], Any]
    losses: Callable[[Any], Tensor]


def squared_error(target: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda prediction: (prediction - target).square().flatten(1).mean(1)


def uvit_keyword(module):
    x_t, t, noise = module.noised(images())
    return Case(module.UViT(), lambda m: m(x=x_t, timesteps=t), squared_error(noise))


def gan(module):
    def losses(logits):
        real, fake = logits
        return module.verdict_loss(real, True, "none") + module.verdict_loss(fake, False, "none")

    real, fake = images(), images()
    return Case(module.build_discriminator(), lambda m: (m(real), m(fake)), losses)


def lora_peft(module):
    ids, mask, labels = module.sentences()[:B]
    assert 0 < mask.float().mean() < 1  # some sentences are padded

    def call(m):
        return m(input_ids=ids, attention_mask=mask).logits

    return Case(module.build_model(), call, lambda logits: F.cross_entropy(logits, labels, reduction="none"))


def unet2d_condition(module):
    x_t, t, prompts = images(), torch.randint(1000, (B,)), torch.randn(B, module.WORDS, module.WIDTH).double()

    def call(m):
        return m(x_t, t, encoder_hidden_states=prompts).sample

    return Case(module.build_model(), call, squared_error(images()))


def lightning_module(module):
    x, labels = torch.randn(B, 3, 8, 8).double(), torch.randint(10, (B,))
    return Case(module.build_model(), lambda m: m(x), lambda logits: F.cross_entropy(logits, labels, reduction="none"))


def accelerate_loop(module):
    x_t, t, labels = images(), torch.randint(1000, (B,)), torch.randint(10, (B,))

    def call(m):
        return m(x_t, timestep=t, class_labels=labels).sample

    return Case(module.build_model(), call, squared_error(images()))


def images() -> Tensor:
    return torch.randn(B, 1, 8, 8).double()


CASES = [uvit_keyword, gan, lora_peft, unet2d_condition, lightning_module, accelerate_loop]


def prepared(build: Callable[[ModuleType], Case], example: Callable[[str], ModuleType]) -> tuple[Case, dict, nn.Module]:
    """The case in float64 and train mode, the oracle's gradients by name, and a copy of the model to be wrapped."""
    torch.manual_seed(0)
    case = build(example(build.__name__))
    case.model.double().train()
    for parameter in trainable(case.model).values():
        if not parameter.any():  # LoRA's B, adaLN's gates, a ViT's head: at zero they would hide other gradients
            nn.init.normal_(parameter, std=0.2)
    copied = copy.deepcopy(case.model)
    torch.manual_seed(1)  # the same dropout on both sides
    truth = oracle.per_example_gradients(case.model, lambda: case.losses(case.call(case.model)))
    assert oracle.norms(truth).min() > 0
    torch.manual_seed(1)
    return case, truth, copied


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_grad_sample_is_the_oracle(build, example):
    case, truth, model = prepared(build, example)
    case.losses(case.call(dither.opacus.GradSampleModule(model))).mean().backward()
    ours = {name: p.grad_sample for name, p in trainable(model).items()}
    assert oracle.relative_error(ours, truth) <= 1e-8


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_ghost_sum_is_the_oracle(build, example):
    def criterion(predictions):
        return case.losses(predictions)

    criterion.reduction = "mean"
    case, truth, model = prepared(build, example)
    norms = oracle.norms(truth)
    bound = float(norms.median())
    wrapped = dither.opacus.GradSampleModuleFastGradientClipping(model, max_grad_norm=bound)
    optimizer = dither.opacus.DPOptimizerFastGradientClipping(
        torch.optim.SGD(trainable(model).values(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=B,
    )
    loss = dither.opacus.DPLossFastGradientClipping(wrapped, optimizer, criterion)(case.call(wrapped))
    loss.backward()
    factors = (bound / (norms + 1e-6)).clamp(max=1.0)  # Opacus's, with its 1e-6
    assert 0 < (factors < 1).sum() < B
    expected = {name: torch.einsum("b,b...->...", factors, g) for name, g in truth.items()}
    assert oracle.relative_error({name: p.grad for name, p in trainable(model).items()}, expected) <= 1e-8


def test_generator_trains_through_the_wrapped_discriminator(example):
    gan = example("gan")
    discriminator, generator = gan.build_discriminator().double(), gan.build_generator().double()
    plain = copy.deepcopy(discriminator)
    latent = torch.randn(B, gan.LATENT).double()
    gradients = []
    for judge in (plain, dither.opacus.GradSampleModule(discriminator)):
        generator.zero_grad()
        gan.verdict_loss(judge(generator(latent)), True).backward()
        gradients.append({name: p.grad.clone() for name, p in generator.named_parameters()})
    assert all(gradient.any() for gradient in gradients[0].values())
    assert oracle.relative_error(gradients[1], gradients[0]) <= 1e-8


def test_lightning_steps_on_poisson_batches(example):
    from lightning import Callback, Trainer
    from torch.utils.data import TensorDataset

    class Sizes(Callback):
        seen: tuple[int, ...] = ()

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.seen += (len(batch[0]),)

    dither.opacus.install()
    dataset = TensorDataset(torch.randn(400, 3, 8, 8), torch.randint(10, (400,)))
    module = example("lightning_module")
    classifier = module.PrivateClassifier(module.build_model(), dataset, batch_size=40)
    before = copy.deepcopy(classifier.network.state_dict())
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=1, callbacks=[sizes := Sizes()], enable_model_summary=False, **options).fit(classifier)
    assert type(classifier.network) is dither.opacus.GradSampleModule
    assert len(sizes.seen) == 10
    assert len(set(sizes.seen)) > 1
    assert classifier.engine.accountant.history == [(1.0, 0.1, 10)]
    assert any(not torch.equal(value, before[n]) for n, value in classifier.network._module.state_dict().items())


def test_accelerate_keeps_poisson_batches_and_steps():
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    engine, model = dither.opacus.PrivacyEngine(), nn.Linear(3, 2)
    model, optimizer, criterion, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(400, 3), torch.randint(2, (400,))), batch_size=40),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
    )
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sizes = []
    for x, y in loader:
        before = model._module.weight.detach().clone()
        optimizer.zero_grad()
        accelerator.backward(criterion(model(x), y))
        optimizer.step()
        sizes.append(len(x))
        assert not torch.equal(model._module.weight, before)
    assert len(sizes) == 10
    assert len(set(sizes)) > 1
    assert engine.accountant.history == [(1.0, 0.1, 10)]
