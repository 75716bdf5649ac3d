"""--model: U-Nets of diffusers and classes of the user, trained, sampled, verified, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dither.cli.main import main
from dither.cli.reading import read_run_options
from dither.cli.results import write_results
from dither.cli.run_folder import Images, RunFolder
from dither.training import PrivateTraining
from shortened import TINY

QUICK = [*TINY, "--steps=2", "--noise_multiplier=5"]
USER = Path(__file__).with_name("users_models.py")


def certificate(run):
    return json.loads((run / "certificate.json").read_text())


@pytest.mark.parametrize("kind, patch", [("UNet2DModel", 1), ("UNet2DModel", 4), ("UNet2DConditionModel", 2)])
def test_unet_of_diffusers(kind, patch, tmp_path):
    output = tmp_path / "run"
    sizes = ["--unet.block_out_channels=[8,16]", "--unet.norm_num_groups=4"]
    words = [*QUICK, "--model=diffusers_unet", f"--unet.kind={kind}", f"--unet.patch_size={patch}", *sizes]
    assert main(["train", *words, f"--output={output}"]) == 0
    assert certificate(output)["verification"]["exact"] is True
    names = RunFolder.open(output).load_weights("ema")
    assert names["unet.conv_in.weight"].shape[1] == names["unet.conv_out.weight"].shape[0] == patch**2
    assert ("class_tokens.weight" in names) == (kind == "UNet2DConditionModel")
    grid = tmp_path / "grid.png"
    assert main(["sample", str(output), "--count=1", "--steps=2", "--guidance=2", f"--output={grid}"]) == 0
    assert grid.exists()


def test_class_of_the_user_in_a_yaml(programs, tmp_path):
    """A real process, in the folder where the class lies, and another when it is gone."""
    (tmp_path / "users_models.py").write_bytes(USER.read_bytes())
    (tmp_path / "net.yaml").write_text(
        "model:\n  class_path: users_models.Net\n  init_args:\n    width: 6\n"
        "recipe:\n  multiplicity: 2\n  sampler_steps: 3\n"
        "privacy:\n  steps: 2\n  expected_batch_size: 40\n"
        "performance:\n  microbatch_size: 40\n  threads: 1\n"
    )

    def dither(*words):
        return programs.run("-m", "dither", *words, cwd=tmp_path)

    trained = dither("train", "--config", "net.yaml", "--output", "run")
    assert trained.returncode == 0, trained.stderr
    assert certificate(tmp_path / "run")["verification"]["exact"] is True
    assert RunFolder.open(tmp_path / "run").load_weights("ema")["net.first.weight"].shape == (6, 1, 3, 3)
    (tmp_path / "users_models.py").unlink()
    lost = dither("sample", "run", "--overwrite")
    assert lost.returncode == 2
    assert "users_models" in lost.stderr and "Traceback" not in lost.stderr


@pytest.fixture
def users_models(monkeypatch):
    monkeypatch.syspath_prepend(str(USER.parent))
    return "users_models"


def test_the_average_of_a_tied_parameter_is_written_under_each_of_its_names(tmp_path):
    """Else the raw weights, which come last, take its place when the file is loaded."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    training = PrivateTraining(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        TensorDataset(torch.ones(8, 3)),
        lambda model, batch: model(batch[0]).square().sum(1),
        expected_batch_size=4,
        steps=2,
        noise_multiplier=1.0,
        ema_decay=0.9,
    )
    list(training)
    folder = RunFolder.create(tmp_path / "run", Images("data", 1, 1, 1))
    write_results(folder, model, training)
    written = folder.load_weights("ema")
    for name in ("0.weight", "1.weight"):
        torch.testing.assert_close(written[name], training.ema["0.weight"], rtol=0, atol=0)


def test_arguments_as_words_and_in_the_config(users_models, tmp_path):
    output = tmp_path / "run"
    words = [*QUICK, f"--model={users_models}.Net", "--model.init_args.width=5", f"--output={output}"]
    assert main(["train", *words]) == 0
    options = read_run_options(output / "config.yaml")
    assert (options.model.class_path, options.model.init_args.width) == ("users_models.Net", 5)
    assert main(["verify", str(output), "--examples=2"]) == 0
    assert main(["train", f"--resume={output}"]) == 0
    assert main(["sample", str(output), "--count=1", "--guidance=2", f"--output={tmp_path / 'grid.png'}"]) == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model=users_models.Mixing"], "example"),
        (["--model=users_models.Net", "--model.init_args.norm=true"], "batch normalisation"),
        (["--model=users_models.Net", "--model.init_args.classes=10"], "label 10 means 'no label'"),
        (["--model=users_models.Net", "--model.init_args.width=-1"], "cannot be built"),
        (["--model=users_models.Net", "--model.init_args.depth=2"], "depth"),
        (["--model=users_models.Classifier"], "returns (2,)"),
        (["--model=users_models.Tabled", "--recipe.prediction=flow", "--recipe.sampler=euler"], "dpm-solver++"),
        (["--model=users_models.Missing"], "no attribute 'Missing'"),
        (["--model=no_such_module.Net"], "no_such_module"),
        (["--model=vit"], "vit"),
        (["--model=diffusers_unet", "--unet.block_out_channels=[8,8,8,8,8]"], "fewer"),
        (["--model=diffusers_unet", "--unet.patch_size=3"], "patches of side 3"),
        (["--model=diffusers_unet", "--unet.norm_num_groups=3"], "UNet2DModel"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_trained_is_named(words, named, users_models, failure, tmp_path):
    assert named in failure("train", *QUICK, f"--output={tmp_path / 'run'}", *words)


def test_without_label_dropout_no_row_is_needed(users_models, failure, tmp_path):
    output = tmp_path / "run"
    words = [f"--model={users_models}.Net", "--model.init_args.classes=10", "--recipe.label_dropout=0"]
    assert main(["train", *QUICK, *words, f"--output={output}"]) == 0
    assert "guidance" in failure("sample", output, "--guidance=2", f"--output={tmp_path / 'grid.png'}")


def test_a_sampler_that_the_model_cannot_follow_is_named(users_models, failure, tmp_path):
    output = tmp_path / "run"
    words = [f"--model={users_models}.Tabled", "--recipe.prediction=flow", "--recipe.sampler=dpm-solver++"]
    assert main(["train", *QUICK, *words, f"--output={output}"]) == 0
    said = failure("sample", output, "--count=1", "--sampler=euler", f"--output={tmp_path / 'grid.png'}")
    assert "timesteps between whole numbers" in said


def test_only_a_dit_is_exported(users_models, failure, tmp_path):
    output = tmp_path / "run"
    assert main(["train", *QUICK, f"--model={users_models}.Net", f"--output={output}"]) == 0
    assert "not a DiT" in failure("export", output, tmp_path / "out", "--to=dit")
