"""`dither verify` as a process: models of one's own, of diffusers, a run folder; what is refused; what cannot work."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dither.cli.main import main

GUIDE = Path(__file__).parents[2] / "docs" / "verify.md"

MODELS = '''
import torch
import torch.nn.functional as F
from torch import nn


class Conditional(nn.Module):
    """Several inputs, keywords, a raw parameter, dropout, nested output with an int, a spare layer."""

    def __init__(self):
        super().__init__()
        self.image, self.label, self.gain = nn.Linear(6, 6), nn.Embedding(4, 6), nn.Parameter(torch.ones(6))
        self.spare = nn.Linear(2, 2)

    def forward(self, x, t, *, y=None, scale: int = 1):
        h = F.dropout(self.image(x) * self.gain, 0.2, self.training) + self.label(y)
        return {"out": [(h * t[:, None] * scale, 7)], "mean of all": h.mean(), "note": None}


def with_loss():
    batch = {"x": torch.randn(12, 6), "t": torch.rand(12), "y": torch.randint(4, (12,))}
    return Conditional(), batch, lambda model, batch: model(**batch)["out"][0][0].square().mean(1)


def without_loss():
    model, batch, _ = with_loss()
    return model, ((batch["x"], batch["t"]), {"y": batch["y"], "scale": 2})


def one_tensor():
    return nn.Linear(3, 2), torch.randn(4, 3)


def unet():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    )
    return model, (torch.randn(3, 2, 8, 8), torch.randint(100, (3,)), torch.randn(3, 5, 8))


def batch_norm():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), torch.randn(4, 3, 6, 6)


def detached_mean():
    return nn.Linear(3, 2), torch.randn(6, 3), lambda m, x: (m(x) - m(x).mean(0).detach()).square().sum(1)


def own_generator():
    generator = torch.Generator().manual_seed(0)
    return nn.Linear(3, 2), torch.randn(6, 3), lambda m, x: (m(x) * torch.rand(2, generator=generator).to(x)).sum(1)


def time_first():
    return nn.Linear(3, 2), torch.randn(5, 4, 3), lambda m, x: m(x).square().sum((0, 2))


def mean_loss():
    return nn.Linear(3, 2), torch.randn(6, 3), lambda m, x: m(x).mean()


def cannot_be_cut():
    x = torch.randn(20, 3)
    return nn.Linear(3, 2), torch.randn(20, 3), lambda m, batch: m(x.to(batch)).sum(1)


def float32_inside():
    model = nn.Linear(3, 2)
    return model, torch.randn(4, 3), lambda m, x: m(x.float()).sum(1)


def raises():
    raise ValueError("the data are elsewhere")


def exits():
    raise SystemExit(3)


def frozen():
    return nn.Linear(3, 2).requires_grad_(False), torch.randn(4, 3)


def labels_only():
    return nn.Identity(), torch.ones(4, 3, dtype=torch.int64)


def swapped():
    return torch.randn(4, 3), nn.Linear(3, 2)


def no_gradient():
    return nn.Linear(3, 2), torch.randn(4, 3), lambda m, x: 0 * m(x).sum(1)


nothing = lambda: None
number = lambda: 3
model_alone = lambda: nn.Linear(3, 2)
four = lambda: (nn.Linear(3, 2), torch.ones(4, 3), None, None)
no_tensor = lambda: (nn.Linear(3, 2), "batch")
no_function = lambda: (nn.Linear(3, 2), torch.ones(4, 3), 1.0)
one_example = lambda: (nn.Linear(3, 2), torch.ones(1, 3))
no_example = lambda: (nn.Linear(3, 2), torch.ones(0, 3))
needs = lambda x: x
constant = 3
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("models") / "models.py"
    file.write_text(MODELS)
    (file.parent / "broken.py").write_text("import torch\nimport no_such_package_anywhere\n")
    (file.parent / "syntax.py").write_text("def make(:\n")
    return file


@pytest.fixture
def process(programs):
    """Run `dither verify` in a process of its own."""

    def run(*words: object, folder: Path | None = None) -> subprocess.CompletedProcess:
        return programs.run("-m", "dither", "verify", *map(str, words), cwd=folder, environment={"COLUMNS": "80"})

    return run


# --- exact ----------------------------------------------------------------------------------------


def test_a_model_of_several_inputs(process, models):
    done = process("models.py:with_loss", folder=models.parent)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "models.py:with_loss: Conditional, 78 trainable parameters, float64, train mode"
    assert lines[1:4] == [
        "batch: the first 8 of 12 examples",
        "loss: as given",
        "exchange: no loss changed when the other examples were exchanged",
    ]
    assert lines[4] == "exact: every example's gradient is its own; safe to train privately"
    assert "tolerance 1e-08" in lines[5]
    rows = {line.split()[0]: line for line in lines[9:] if line and line[0] != " "}
    assert rows["spare.bias"].endswith("unused in this batch")
    for name, shape, use in (("gain", "6", "mul"), ("label.weight", "4x6", "embedding"), ("image.bias", "6", "linear")):
        words = rows[name].split()
        assert words[1] == shape and use in words
        assert float(words[2]) < 1e-12
        assert "axis 0, 1 row an example" in rows[name]
    assert done.stderr == ""


@pytest.mark.slow
def test_a_model_of_diffusers_in_json(process, models):
    done = process(f"{models}:unet", "--json", "--strategy=ghost", "--mode=eval")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["exact"] is True and found["independent"] is True and found["class"] == "UNet2DConditionModel"
    assert found["examples"] == 3 and found["mode"] == "eval" and found["dtype"] == "float64"
    assert list(found["strategies"]) == ["ghost"] and found["max_relative_error"] < found["tolerance"] == 1e-8
    assert "output['sample']" in found["loss"] and "axis 0" in found["loss"]
    assert len(found["parameters"]) > 50
    by_name = {parameter["name"]: parameter for parameter in found["parameters"]}
    (use,) = by_name["conv_in.weight"]["uses"]
    assert use["operation"] == "conv2d" and use["axis"] == 0 and use["rows_per_example"] == 1


def test_a_run_folder(process, finished_run):
    done = process(finished_run, "--examples=3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["exact"] is True and found["examples"] == 3 and found["class"] == "DiT"
    rows = {use["rows_per_example"] for parameter in found["parameters"] for use in parameter["uses"]}
    assert rows == {2}  # the recipe's multiplicity


@pytest.fixture
def verified(models, capsys):
    """Run the command here, and read what it says."""

    def run(factory: str, *words: str, code: int = 0) -> dict:
        capsys.readouterr()
        assert main(["verify", f"{models}:{factory}", "--json", *words]) == code
        return json.loads(capsys.readouterr().out)

    return run


def test_the_loss_that_is_made_of_any_output(verified):
    found = verified("without_loss")
    assert "output['out'][0][0]" in found["loss"]
    assert "left out: output['mean of all']" in found["loss"]
    assert verified("one_tensor")["exact"] is True


def test_precision_mode_examples_and_strategy(verified):
    assert verified("with_loss", "--dtype=keep")["dtype"] == "float32"
    assert verified("with_loss", "--dtype=bfloat16")["tolerance"] == 5e-2
    assert verified("with_loss", "--mode=eval")["mode"] == "eval"
    assert verified("with_loss", "--examples=0")["examples"] == 12
    found = verified("with_loss", "--examples=3", "--strategy=tile")
    assert found["examples"] == 3 and list(found["strategies"]) == ["tile"]
    assert len(verified("with_loss")["strategies"]) == 5
    assert verified("float32_inside", "--dtype=keep")["exact"] is True


def test_the_seed_repeats_the_inputs(verified):
    errors = [verified("with_loss", f"--seed={seed}")["strategies"] for seed in (1, 1, 2)]
    assert errors[0] == errors[1] != errors[2]


def test_a_config_file(verified, tmp_path):
    file = tmp_path / "verify.yaml"
    file.write_text("examples: 4\nstrategy: hold\n")
    found = verified("with_loss", f"--config={file}")
    assert found["examples"] == 4 and list(found["strategies"]) == ["hold"]


def test_examples_on_another_axis(verified):
    found = verified("time_first")
    assert {use["axis"] for parameter in found["parameters"] for use in parameter["uses"]} == {1}
    assert found["exchange"].startswith("not tried")


def test_the_precision_of_the_process_is_left_alone(verified):
    import torch

    verified("one_tensor")
    assert torch.get_default_dtype() == torch.float32


# --- not exact, or refused ------------------------------------------------------------------------


def test_batch_normalisation_is_refused_with_the_fix(process, models):
    done = process(f"{models}:batch_norm")
    assert done.returncode == 1
    assert "refused: The batch normalisation of a tensor of shape (4, 4, 4, 4)" in done.stdout
    assert "\n  Fix: use group, layer or instance normalisation" in done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    frozen = process(f"{models}:batch_norm", "--mode=eval")  # the fix that it names
    assert frozen.returncode == 0, frozen.stdout


def test_a_refusal_in_json(verified):
    found = verified("batch_norm", code=1)
    assert found["verdict"] == "refused" and found["exact"] is False and found["error"] == "CoupledExamplesError"
    assert "batch normalisation" in found["what"] and "group" in found["fix"]


def test_a_dependence_that_leaves_no_trace_in_the_graph_is_refused(verified):
    found = verified("detached_mean", code=1)
    assert found["error"] == "CoupledExamplesError" and "exchanged" in found["what"]


def test_randomness_of_its_own_is_said(verified):
    found = verified("own_generator", code=1)
    assert found["exact"] is False and found["repeats"] is False
    assert found["verdict"].startswith("NOT exact") and "torch.Generator" in found["verdict"]


def test_a_batch_without_gradients_tests_nothing(verified):
    assert verified("no_gradient", code=1)["verdict"].startswith("nothing was tested")


def test_a_loss_that_is_not_one_an_example_is_refused(verified):
    assert verified("mean_loss", code=1)["error"] == "LossShapeError"


# --- cannot work ----------------------------------------------------------------------------------


def test_a_factory_that_raises_as_a_process(process, models):
    done = process(f"{models}:raises")
    line = MODELS.splitlines().index('    raise ValueError("the data are elsewhere")') + 1
    assert done.returncode == 2 and done.stdout == ""
    assert f"ValueError: the data are elsewhere\n  at {models}:{line}\n  Fix: a factory takes nothing" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in process(f"{models}:raises", "--debug").stderr


@pytest.mark.parametrize(
    ("factory", "named"),
    [
        ("exits", "SystemExit: 3"),
        ("nothing", "NoneType"),
        ("number", "returned int"),
        ("model_alone", "Linear"),
        ("swapped", "the first is not a torch.nn.Module"),
        ("four", "Linear, Tensor, NoneType, NoneType"),
        ("no_tensor", "no tensor in the batch"),
        ("no_function", "the third is not a function"),
        ("one_example", "a batch of 1"),
        ("no_example", "a batch of 0"),
        ("needs", "missing 1 required positional argument"),
        ("constant", "not a function"),
        ("unknown", "has no 'unknown'"),
        ("frozen", "no trainable parameters"),
        ("labels_only", "no loss was given"),
        ("cannot_be_cut", "cannot be cut to 8 of its 20 examples"),
        ("float32_inside", "--dtype keep"),
    ],
)
def test_rubbish_is_named(factory, named, failure, models):
    assert named in failure("verify", f"{models}:{factory}")


def test_a_wrong_place_is_named(failure, models, tmp_path):
    assert "there is no file nowhere.py" in failure("verify", "nowhere.py:make")
    assert "neither a run folder nor" in failure("verify", "nowhere")
    assert f"{models}:make" in failure("verify", models)
    assert "no_such_module" in failure("verify", "no_such_module:make")
    assert "did not write it" in failure("verify", tmp_path)
    assert "no_such_package_anywhere" in failure("verify", f"{models.parent / 'broken.py'}:make")
    assert "SyntaxError" in failure("verify", f"{models.parent / 'syntax.py'}:make")
    failure("verify")


@pytest.mark.parametrize(
    "word", ["--examples=1", "--examples=-2", "--examples=many", "--strategy=fast", "--dtype=int8", "--mode=test"]
)
def test_a_bad_option_is_named(word, failure, models):
    assert word.split("=")[1] in failure("verify", f"{models}:with_loss", word)


# --- the guide ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_guide_runs(process, tmp_path, capsys):
    text = GUIDE.read_text()
    python = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.partition("#")[0] for line in text.splitlines()]
    commands = [line for line in lines if line.startswith("dither verify ") and "runs/" not in line]
    assert len(python) == 2 and len(commands) >= 3
    (tmp_path / "model.py").write_text(python[0])
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(python[0])
    for command in commands:
        done = process(*shlex.split(command)[2:], folder=tmp_path)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    names: dict = {}
    exec(python[0] + python[1], names)
    assert "exact: every example's gradient is its own" in capsys.readouterr().out
