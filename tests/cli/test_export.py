"""`dither export`: what it writes, opened by the programs it is written for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dither.cli.main import main
from dither.cli.run_folder import RunFolder
from dither.diffusion.checkpoints import load_dit
from shortened import TINY


@pytest.fixture(scope="module")
def run_for_diffusers(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "diffusers"
    words = [*TINY, "--steps=2", "--epsilon=10", "--recipe.timestep_frequencies=diffusers", f"--output={output}"]
    assert main(["train", *words]) == 0
    return output


OPEN = """
import sys
import torch
import dither.diffusion.pipelines
from diffusers import DiTPipeline

pipe = DiTPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
noise = torch.load(sys.argv[2])
import diffusers.pipelines.dit.pipeline_dit as module
module.randn_tensor = lambda shape, **options: noise
options = dict(num_inference_steps=3, output_type="pt")
torch.save([pipe([0, 7], guidance_scale=scale, **options).images for scale in (1.0, 2.0)], sys.argv[3])
"""


def test_pipeline_of_diffusers_draws_the_runs_images(run_for_diffusers, tmp_path, capsys):
    """Opened in a process of its own; with guidance too, where the pipeline asks for class 1000."""
    from dither.cli.reading import read_run_options
    from dither.diffusion.recipe import build_model, build_process
    from dither.diffusion.schedulers import build_scheduler

    out = tmp_path / "exported"
    assert main(["export", str(run_for_diffusers), "--to", "diffusers", str(out)]) == 0
    assert "import dither.diffusion.pipelines" in capsys.readouterr().out
    assert json.loads((out / "certificate.json").read_text())["private"] is True

    recipe, folder = read_run_options(run_for_diffusers / "config.yaml").recipe, RunFolder.open(run_for_diffusers)
    model, process = build_model(recipe, 8, 1, 10).eval(), build_process(recipe)
    model.load_state_dict(folder.load_weights("ema"))
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 7])
    torch.save(noise, tmp_path / "noise.pt")
    arguments = [str(out), str(tmp_path / "noise.pt"), str(tmp_path / "images.pt")]
    subprocess.run([sys.executable, "-c", OPEN, *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for guidance, images in zip((1.0, 2.0), torch.load(tmp_path / "images.pt"), strict=True):
        x, scheduler = noise, build_scheduler("ddim", process, True)
        scheduler.set_timesteps(3)
        with torch.no_grad():
            for t in scheduler.timesteps:
                shown, hidden = (model(x, t.expand(2), y) for y in (labels, torch.full((2,), 10)))
                output = hidden + guidance * (shown - hidden)
                x = scheduler.step(process.denoiser_output(output, x, t), t, x).prev_sample
        expected = (x / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def run_on_latents(vae, tmp_path_factory):
    """Of an autoencoder with a scale and a shift."""
    folder = tmp_path_factory.mktemp("latents")
    file, output = folder / "digits.safetensors", folder / "run"
    assert main(["encode", "--data.image_size=16", f"--vae={vae}", f"--output={file}"]) == 0
    assert main(["train", *TINY, "--steps=2", "--epsilon=10", f"--data.path={file}", f"--output={output}"]) == 0
    return output


def test_pipeline_of_diffusers_decodes_the_runs_latents(run_on_latents, vae, tmp_path, capsys):
    """As dither does, shift included; nothing is clipped to the range of pixels."""
    from dither.cli.models import run_dit
    from dither.cli.reading import read_run_options
    from dither.data.autoencoder import Autoencoder
    from dither.diffusion.diffusers_dit import to_diffusers
    from dither.diffusion.recipe import build_process
    from dither.diffusion.schedulers import build_scheduler

    out = tmp_path / "exported"
    words = ["export", str(run_on_latents), str(out), "--to=diffusers", "--approximate", f"--vae={vae}"]
    assert main(words) == 0 and "import dither.diffusion.pipelines" in capsys.readouterr().out
    noise, labels = 30 * torch.randn(2, 4, 8, 8), torch.tensor([0, 7])
    torch.save(noise, tmp_path / "noise.pt")
    arguments = [str(out), str(tmp_path / "noise.pt"), str(tmp_path / "images.pt")]
    subprocess.run([sys.executable, "-c", OPEN, *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    process = build_process(read_run_options(run_on_latents / "config.yaml").recipe)
    model = to_diffusers(run_dit(RunFolder.open(run_on_latents), "ema"), approximate=True)
    x, scheduler = noise, build_scheduler("ddim", process, clip=False)
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = process.denoiser_output(model(x, t.expand(2), labels).sample, x, t)
            x = scheduler.step(output, t, x).prev_sample
    assert x.abs().max() > 1
    expected = Autoencoder(vae).decode(x) / 2 + 0.5
    torch.testing.assert_close(torch.load(tmp_path / "images.pt")[0], expected, rtol=1e-4, atol=1e-4)


def test_a_run_on_latents_takes_its_own_autoencoder(run_on_latents, run_for_diffusers, vae, failure, tmp_path):
    out, words = tmp_path / "out", ["--to=diffusers", "--approximate"]
    assert f"--vae {vae}" in failure("export", run_on_latents, out, *words)
    other = shutil.copytree(vae, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    for name, value in (("scaling_factor", 0.75), ("shift_factor", None)):
        (other / "config.json").write_text(json.dumps({**config, name: value}))
        assert name in failure("export", run_on_latents, out, *words, f"--vae={other}")
    assert "on pixels" in failure("export", run_for_diffusers, out, "--to=diffusers", f"--vae={vae}")
    assert "no place for --vae" in failure("export", run_on_latents, out, "--to=dit", f"--vae={vae}")
    cut = shutil.copytree(vae, tmp_path / "cut")
    file = next(cut.glob("*.safetensors"))
    weights = load_file(file)
    del weights["decoder.conv_in.bias"]
    save_file(weights, file, {"format": "pt"})
    assert "holds no AutoencoderKL" in failure("export", run_on_latents, out, *words, f"--vae={cut}")
    assert not out.exists()


def test_published_layout(finished_run, tmp_path, capsys):
    assert main(["export", str(finished_run), str(tmp_path / "out"), "--to=dit"]) == 0
    assert "facebookresearch/DiT" in capsys.readouterr().out
    model = load_dit(tmp_path / "out" / "dit.pt", num_heads=2)
    weights = RunFolder.open(finished_run).load_weights("ema")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())


def test_refusals(finished_run, failure, tmp_path):
    out = tmp_path / "out"
    assert "timestep_frequencies" in failure("export", finished_run, out, "--to=diffusers")
    assert "not empty" in failure("export", finished_run, finished_run, "--to=dit")
    assert "onnx" in failure("export", finished_run, out, "--to=onnx")
    assert not out.exists()


def test_approximate_says_by_how_much(finished_run, tmp_path, capsys):
    assert main(["export", str(finished_run), str(tmp_path / "out"), "--to=diffusers", "--approximate"]) == 0
    assert "relative" in capsys.readouterr().out
