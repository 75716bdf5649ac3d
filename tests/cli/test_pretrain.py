"""--pretrain: a public data set before the private one, in the certificate; interrupted in each part and resumed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
import torch

from dither.cli.main import main
from dither.cli.public import files_digest
from dither.cli.run_folder import RunFolder
from dither.data import digits
from dither.data.image_data import Latents
from dither.data.latents import save_latents
from dither.diffusion.embeddings import position_sinusoids
from pictures import class_folders
from shortened import TINY

QUICK = [*TINY, "--steps=2", "--noise_multiplier=5"]
NAMES = [str(label) for label in range(10)]


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Digits upside down, as a data set of their own: 100 of them, of 10 classes."""
    file = tmp_path_factory.mktemp("public") / "flipped.npz"
    images, labels = digits()[1].tensors
    np.savez(file, images=images[:100].flip(2).numpy(), labels=labels[:100].numpy(), class_names=np.array(NAMES))
    return file


def certificate(run):
    return json.loads((run / "certificate.json").read_text())


def test_a_data_set_with_the_same_classes(public, tmp_path, capsys):
    """Recorded as public; and with private steps too small to move anything, the average is the pretrained model."""
    output = tmp_path / "run"
    words = [*QUICK, f"--pretrain.path={public}", "--pretrain.steps=3", "--pretrain.labels=true"]
    words += ["--pretrain.learning_rate=0.1", "--recipe.learning_rate=1e-12"]
    assert main(["train", *words, f"--output={output}"]) == 0
    said = certificate(output)
    assert said["private"] is True and said["steps_done"] == 2
    facts = said["public"]["pretraining"]
    assert (facts["path"], facts["examples"], facts["steps"], facts["labels"]) == (public.name, 100, 3, True)
    assert facts["sha256"] == hashlib.sha256(public.read_bytes()).hexdigest()
    assert said["public"]["fine_tuning"]["mode"] == "full"
    assert not (output / "beginning.pt").exists()
    capsys.readouterr()
    assert main(["certificate", "check", str(output)]) == 0
    assert f"The 100 examples of {public.name} are taken as public" in capsys.readouterr().out
    assert "Public steps, without noise" in (output / "report.html").read_text()
    raw, ema = (RunFolder.open(output).load_weights(name) for name in ("model", "ema"))
    assert raw["final_layer.linear.bias"].abs().max() > 0.05
    for name, tensor in raw.items():
        torch.testing.assert_close(ema[name], tensor, rtol=0, atol=1e-6)


def test_a_folder_of_other_pictures_before_low_rank_updates(tmp_path):
    """Colour pictures of any size and class; the public steps train what the private ones leave alone."""
    other, run = class_folders(tmp_path / "fruit", {"apple": 3, "pear": 3}, size=(20, 16)), tmp_path / "run"
    words = [*QUICK, f"--pretrain.path={other}", "--pretrain.steps=2", "--finetune.mode=lora"]
    assert main(["train", *words, f"--output={run}"]) == 0
    public = certificate(run)["public"]
    assert public["pretraining"]["sha256"] == files_digest(other)
    weights, base = RunFolder.open(run).load_weights("model"), "final_layer.linear.bias"
    assert base not in public["fine_tuning"]["parameters"] and weights[base].any()  # it begins at zero
    assert weights["pos_embed"].equal(position_sinusoids(16, math.isqrt(weights["pos_embed"].shape[1])))


def test_the_digest_is_that_of_sha256sum(tmp_path):
    folder = class_folders(tmp_path / "fruit", {"pear": 2, "apple tree": 1})
    script = "find . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    printed = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert files_digest(folder) == printed.split()[0]


def interrupt_when(condition):
    """Send this process a real SIGINT once the condition holds; `dither train` handles it as in a terminal."""

    def wait():
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def part(run):
    """Where the beginning stands, and after how many steps; (None, 0) before there is one."""
    if not (run / "beginning.pt").exists():
        return None, 0
    state = torch.load(run / "beginning.pt", weights_only=True)
    return state["part"], state.get("index", 0)


def test_interrupted_in_each_part_and_resumed(public, tmp_path, capsys):
    """First in the public steps, then in the warm-up: nothing private is claimed, nothing is released twice."""
    run, steps = tmp_path / "run", 80
    words = [*TINY, "--steps=2", "--epsilon=3", "--save_every=1e-9", f"--output={run}"]
    words += [
        f"--pretrain.path={public}",
        f"--pretrain.steps={steps}",
        "--warm_up.kind=means",
        f"--warm_up.steps={steps}",
    ]
    waiting = interrupt_when(lambda: part(run)[0] == "public")
    assert main(["train", *words]) == 130
    waiting.join()
    assert f"dither train --resume {run}" in capsys.readouterr().out.replace("\n", " ")
    name, done = part(run)
    assert name == "public" and 1 <= done < steps
    assert not (run / "certificate.json").exists() and not (run / "class_statistics.safetensors").exists()
    assert "nothing is claimed" in (run / "report.html").read_text()

    waiting = interrupt_when(lambda: part(run)[0] == "warm-up")
    assert main(["train", f"--resume={run}", "--save_every=1e-9"]) == 130
    waiting.join()
    assert f"public step {steps}/{steps}" in capsys.readouterr().out
    name, done = part(run)
    assert name == "warm-up" and 1 <= done < steps
    release = (run / "class_statistics.safetensors").read_bytes()

    assert main(["train", f"--resume={run}"]) == 0
    said = certificate(run)
    assert [event["release"] for event in said["ledger"]] == ["class means", "gradients"]
    assert said["steps_done"] == 2 and said["epsilon"] <= 3 and said["public"]["pretraining"]["steps"] == steps
    assert (run / "class_statistics.safetensors").read_bytes() == release and not (run / "beginning.pt").exists()
    assert main(["certificate", "check", str(run)]) == 0


def test_a_beginning_goes_on_with_the_same_data_only(public, tmp_path, failure):
    """An image fewer after the release is a person whom the ledger forgot; other public files are not those named."""
    run, files = tmp_path / "run", {name: tmp_path / f"{name}.npz" for name in ("private", "public")}
    with np.load(public) as whole:
        kept = {name: {key: whole[key] for key in whole.files} for name in files}
    for name, file in files.items():
        np.savez(file, **kept[name])
    words = [*TINY, "--steps=2", "--epsilon=3", "--delta=0.001", f"--data.path={files['private']}", f"--output={run}"]
    words += [f"--pretrain.path={files['public']}", "--pretrain.steps=80", "--warm_up.kind=means"]
    words += ["--warm_up.steps=80", "--save_every=1e-9"]

    waiting = interrupt_when(lambda: part(run)[0] == "public")
    assert main(["train", *words]) == 130
    waiting.join()
    np.savez(files["public"], **{**kept["public"], "images": kept["public"]["images"][::-1]})
    assert "SHA-256" in failure("train", f"--resume={run}")
    assert part(run)[0] == "public"

    np.savez(files["public"], **kept["public"])
    waiting = interrupt_when(lambda: part(run)[0] == "warm-up")
    assert main(["train", f"--resume={run}"]) == 130
    waiting.join()
    release = (run / "class_statistics.safetensors").read_bytes()
    np.savez(files["private"], **{**kept["private"], **{key: kept["private"][key][1:] for key in ("images", "labels")}})
    said = failure("train", f"--resume={run}")
    assert "99 examples" in said and "100" in said and not (run / "certificate.json").exists()

    np.savez(files["private"], **kept["private"])
    assert main(["train", f"--resume={run}"]) == 0
    assert (run / "class_statistics.safetensors").read_bytes() == release
    assert certificate(run)["dataset_size"] == 100
    assert certificate(run)["public"]["pretraining"]["sha256"] == files_digest(files["public"])


def test_latents_go_with_latents_of_their_autoencoder(tmp_path, failure):
    """Random latents; a class of another set of names is hidden by default."""
    files = [tmp_path / f"{name}.safetensors" for name in ("private", "public", "other", "large")]
    for file, scale, side in zip(files, (0.5, 0.5, 0.25, 0.5), (8, 8, 8, 4), strict=True):
        latents, labels = torch.randn(50, 4, side, side), torch.arange(50) % 2
        save_latents(file, latents, labels, Latents("vae", scale), ("cat", file.stem))
    private, same, other, large = files
    output = tmp_path / "run"
    begin = ["train", *QUICK, f"--data.path={private}", "--pretrain.steps=2", f"--output={output}"]
    assert "one autoencoder" in failure(*begin, f"--pretrain.path={other}")
    assert "side 4" in failure(*begin, f"--pretrain.path={large}")
    assert "cat, public" in failure(*begin, f"--pretrain.path={same}", "--pretrain.labels=true")
    assert not output.exists()
    assert main([*begin, f"--pretrain.path={same}"]) == 0
    assert certificate(output)["public"]["pretraining"]["examples"] == 50


def test_refusals_leave_nothing(public, failure, tmp_path):
    output, other = tmp_path / "run", tmp_path / "other.npz"
    np.savez(other, images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    begin = ["train", *QUICK, f"--output={output}"]
    assert "/nowhere" in failure(*begin, "--pretrain.path=/nowhere")
    assert "--pretrain.num_classes 10" in failure(*begin, f"--pretrain.path={other}")
    begin.append(f"--pretrain.path={public}")
    assert "no_such" in failure(*begin, "--model=no_such.Net")
    assert "label_dropout" in failure(*begin, "--recipe.label_dropout=0")
    assert "pretrain.steps" in failure(*begin, "--pretrain.steps=0")
    assert "5000" in failure(*begin, "--expected_batch_size=5000")
    assert "holds latents" in failure(*begin, f"--pretrain.path={tmp_path / 'a.safetensors'}")
    assert not output.exists()
