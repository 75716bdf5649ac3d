"""--finetune: from checkpoints of every kind, in every mode; sampled, resumed, exported; in the certificate."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from dither.cli.main import main
from dither.cli.run_folder import RunFolder
from dither.data.image_data import Latents
from dither.data.latents import save_latents
from dither.diffusion.checkpoints import load_dit, save_dit
from dither.diffusion.diffusers_dit import to_diffusers
from dither.diffusion.dit import dit
from shortened import TINY

QUICK = [*TINY, "--steps=2", "--noise_multiplier=5", "--recipe.prediction=epsilon"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A DiT-S/8 of one block and 20 classes, with a learned sigma, in both layouts."""
    folder = tmp_path_factory.mktemp("public")
    model = dit("DiT-S/8", depth=1, in_channels=1, input_size=16, num_classes=20, frequency_shift=1)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    save_dit(folder / "dit.pt", model)
    to_diffusers(model).save_pretrained(folder / "diffusers" / "transformer")
    return folder


def facts(run):
    return json.loads((run / "certificate.json").read_text())["public"]


@pytest.mark.parametrize(("mode", "layout"), [("lora", "diffusers"), ("attention", "dit.pt")])
def test_modes(mode, layout, checkpoint, tmp_path):
    output, source = tmp_path / "run", checkpoint / layout
    words = [*QUICK, f"--finetune.from={source}", f"--finetune.mode={mode}", "--finetune.rank=2"]
    assert main(["train", *words, f"--output={output}"]) == 0
    said = facts(output)
    assert said["checkpoint"]["path"] == source.name
    if source.is_file():
        assert said["checkpoint"]["sha256"] == {"dit.pt": hashlib.sha256(source.read_bytes()).hexdigest()}
    names = said["fine_tuning"]["parameters"]
    assert said["fine_tuning"]["mode"] == mode
    assert "y_embedder.embedding_table.weight" in names and "x_embedder.proj.weight" not in names

    weights, begun = RunFolder.open(output).load_weights("model"), load_dit(source).state_dict()
    changed = {n for n, tensor in weights.items() if begun.get(n) is not None and not _same(begun[n], tensor)}
    trained = {name for name in names if name in begun}
    assert changed == trained | {"pos_embed", "final_layer.linear.weight", "final_layer.linear.bias"}


def test_resumed_sampled_and_exported(checkpoint, tmp_path):
    output, grid = tmp_path / "run", tmp_path / "grid.png"
    words = [*QUICK, f"--finetune.from={checkpoint / 'dit.pt'}", "--finetune.mode=lora", f"--output={output}"]
    assert main(["train", *words]) == 0
    said = facts(output)
    assert main(["train", f"--resume={output}"]) == 0
    assert facts(output) == said
    assert main(["sample", str(output), "--count=1", "--steps=2", "--guidance=2", f"--output={grid}"]) == 0
    assert grid.exists()
    assert main(["export", str(output), str(tmp_path / "out"), "--to=dit"]) == 0
    assert load_dit(tmp_path / "out" / "dit.pt").num_classes == 10


def _same(before, after):
    return before.shape == after.shape and torch.equal(before, after)


def test_from_a_run_and_its_claim_is_told(finished_run, failure, tmp_path):
    output = tmp_path / "run"
    words = [*QUICK, f"--finetune.from={finished_run}", f"--output={output}"]
    assert "predicts edm, and --recipe.prediction is epsilon" in failure("train", *words)
    assert not output.exists()
    assert main(["train", *words, "--recipe.prediction=edm"]) == 0
    said = facts(output)
    assert said["checkpoint"]["certificate"]["epsilon"] == pytest.approx(10, abs=0.1)
    assert said["fine_tuning"]["mode"] == "full"
    assert said["fine_tuning"]["trained_numbers"] < said["fine_tuning"]["all_numbers"]  # fixed positions


def test_latents(tmp_path):
    """A published DiT is for latents of four channels, and is trained on such."""
    data, source, output = tmp_path / "latents.safetensors", tmp_path / "dit.pt", tmp_path / "run"
    save_latents(data, torch.randn(50, 4, 8, 8), torch.arange(50) % 2, Latents("vae", 0.5), ("cat", "dog"))
    save_dit(source, dit("DiT-S/4", depth=1, input_size=16, num_classes=3))
    words = [*QUICK, f"--data.path={data}", f"--finetune.from={source}", "--finetune.mode=biases"]
    assert main(["train", *words, f"--output={output}"]) == 0
    assert "final_layer.linear.bias" in facts(output)["fine_tuning"]["parameters"]
    assert main(["certificate", "check", str(output)]) == 0


def test_refusals_leave_nothing(checkpoint, failure, tmp_path):
    output = tmp_path / "run"
    begin = ["train", *QUICK, f"--output={output}"]
    assert "there is no" in failure(*begin, "--finetune.from=/nowhere.pt")
    source = f"--finetune.from={checkpoint / 'dit.pt'}"
    assert "--model" in failure(*begin, source, "--model=diffusers_unet")
    assert "--model" in failure(*begin, source, "--model=torch.nn.Identity")
    odd = tmp_path / "odd.npz"
    np.savez(odd, images=np.zeros((50, 12, 12), np.uint8), labels=np.zeros(50, np.int64), class_names=np.array(["a"]))
    assert "patch_size 8" in failure(*begin, source, f"--data.path={odd}")
    assert "to_q" in failure(*begin, source, "--finetune.mode=lora", '--finetune.targets=["to_q"]')
    assert "prompt" in failure(*begin, source, "--finetune.mode=prompt")
    assert "for a DiT" in failure(*begin, "--model=diffusers_unet", "--finetune.mode=biases")
    assert not output.exists()
