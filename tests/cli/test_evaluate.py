"""`dither evaluate` on a run and on samples: figures, marks, what is refused, what a private score spends."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dither.cli.main import main
from dither.data import Latents, digits
from dither.data.latents import save_latents
from pictures import idx_folder
from shortened import TINY


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Real training digits, as if they were generated."""
    file = tmp_path_factory.mktemp("samples") / "digits.npz"
    images, labels = digits()[0].tensors
    np.savez(file, images=images.numpy(), labels=labels.numpy())
    return file


def _marks(node):
    if "private" in node:
        return [node["private"]]
    return [mark for part in node.values() for mark in _marks(part)]


def test_a_run(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    words = [str(run), "--count=4", "--classifiers", "CNN", "--seed=1"]
    assert main(["evaluate", *words]) == 0
    out = capsys.readouterr().out
    assert "non-private" in out and "frechet distance" in out
    found = json.loads((run / "evaluation.json").read_text())
    assert found["images"]["generated"] == {"value": 40, "private": True}
    assert not any(_marks(found["accuracy_on_held_out_images"])) and not any(_marks(found["nearest_training_image"]))
    with Image.open(run / "evaluation" / "nearest-training-images.png") as picture:
        assert picture.width > picture.height
    assert main(["report", str(run)]) == 0
    assert "nearest training images" in (run / "report.html").read_text()


def test_real_images_as_samples_score_high_and_are_found_in_the_training_data(samples, tmp_path):
    output = tmp_path / "out"
    assert main(["evaluate", str(samples), f"--output={output}", "--classifiers", "CNN", "--private_score=2"]) == 0
    found = json.loads((output / "evaluation.json").read_text())
    assert found["accuracy_on_held_out_images"]["CNN"]["all"]["value"] > 0.93
    assert found["nearest_training_image"]["generated_nearer_than_999_of_1000_held_out"]["value"] == 1437
    assert found["distance_to_held_out_images"]["precision"]["value"] > 0.9
    assert found["private_score"]["accuracy"]["private"] is True
    assert found["private_score"]["epsilon_spent_on_held_out_images"]["value"] <= 2.0


def test_held_out_images_of_their_own(samples, tmp_path, capsys):
    """Of another kind and size than the training images; an .npz has no such part itself."""
    real, folder = tmp_path / "real.npz", tmp_path / "unseen"
    (images, labels), (unseen, unseen_labels) = (part.tensors for part in digits())
    np.savez(real, images=images.numpy(), labels=labels.numpy())
    for number, (image, label) in enumerate(zip(unseen, unseen_labels, strict=True)):
        file = folder / str(int(label)) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = ((image[0] + 1) * 127.5).round().byte().repeat_interleave(2, 0).repeat_interleave(2, 1)
        Image.fromarray(picture.numpy()).convert("RGB").save(file)
    words = [str(samples), f"--data.path={real}", "--data.num_classes=10", "--classifiers", "logistic regression"]
    assert main(["evaluate", *words, f"--output={tmp_path / 'none'}"]) == 2
    assert "--held_out" in capsys.readouterr().err
    assert main(["evaluate", *words, f"--held_out={folder}", f"--output={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["images"]["held_out"]["value"] == len(unseen)
    assert found["accuracy_on_held_out_images"]["logistic regression"]["all"]["value"] > 0.9


def test_options_of_the_data_without_a_path_are_about_the_runs_own(tmp_path):
    real, run = tmp_path / "real.npz", tmp_path / "run"
    images, labels = (tensor[:90].numpy() for tensor in digits()[0].tensors)
    np.savez(real, images=images, labels=labels % 3)
    words = [*TINY, "--steps=2", f"--data.path={real}", "--data.num_classes=3", "--expected_batch_size=20"]
    assert main(["train", *words, "--warm_up.kind=none", f"--output={run}"]) == 0
    unseen = tmp_path / "unseen.npz"
    np.savez(unseen, images=images[:30], labels=labels[:30] % 3)
    words = [str(run), "--data.skip_broken=true", f"--held_out={unseen}", "--count=4", "--classifiers", "CNN"]
    assert main(["evaluate", *words]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found["accuracy_on_held_out_images"]["CNN"]) == ["all", "class 0", "class 1", "class 2"]


def test_the_held_out_part_has_the_training_classes_and_shape(tmp_path):
    """A class without held-out images, and held-out images of another size and in colour, change no label."""
    images, labels = digits()[0].tensors
    names = ["cat", "dog", "fox"]
    root, held_out = tmp_path / "zoo", {1: "dog", 2: "fox"}
    for label, name in enumerate(names):
        for part, size, mode in (("train", 8, "L"), ("test", 16, "RGB")):
            if part == "test" and label not in held_out:
                continue
            (root / part / name).mkdir(parents=True)
            for number, image in enumerate(images[labels == label][:40]):
                pixels = ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()
                picture = Image.fromarray(pixels).resize((size, size)).convert(mode)
                picture.save(root / part / name / f"{number}.png")
    few = labels < 3
    np.savez(tmp_path / "drawn.npz", images=images[few].numpy(), labels=labels[few].numpy(), class_names=names)
    words = [str(tmp_path / "drawn.npz"), f"--data.path={root}", "--classifiers=logistic regression"]
    assert main(["evaluate", *words, f"--output={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out" / "evaluation.json").read_text()
    found = json.loads(text)["accuracy_on_held_out_images"]["logistic regression"]
    assert found["class cat"]["value"] is None and found["all"]["value"] > 0.9


def test_samples_are_labelled_by_the_names_of_their_classes(tmp_path, failure):
    images, labels = digits()[1].tensors
    names = list("abcdefghij")
    real, drawn, other = tmp_path / "real.npz", tmp_path / "drawn.npz", tmp_path / "other.npz"
    np.savez(real, images=images.numpy(), labels=labels.numpy(), class_names=names)
    np.savez(drawn, images=images.numpy(), labels=(9 - labels).numpy(), class_names=names[::-1])
    np.savez(other, images=images.numpy(), labels=labels.numpy(), class_names=[*names[:-1], "z"])
    held_out = tmp_path / "held-out.npz"
    shutil.copy(real, held_out)
    words = [f"--data.path={real}", f"--held_out={held_out}", "--classifiers=logistic regression"]
    assert main(["evaluate", str(drawn), *words, f"--output={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["accuracy_on_held_out_images"]["logistic regression"]["all"]["value"] > 0.9  # exchanged: below 0.1
    assert "the class 'z'" in failure("evaluate", other, *words, f"--output={tmp_path / 'a'}")


def test_more_real_images_than_there_is_memory_for(samples, tmp_path, failure, monkeypatch):
    monkeypatch.setattr("dither.clipping.machine.free_memory", lambda device: 1e5)
    said = failure("evaluate", samples, f"--output={tmp_path / 'out'}")
    assert "GiB of memory" in said and not (tmp_path / "out").exists()


def test_latents_are_refused_before_their_held_out_part_is_looked_for(samples, failure, tmp_path):
    file = tmp_path / "latents.safetensors"
    save_latents(file, torch.randn(4, 4, 2, 2), torch.arange(4), Latents("vae", 1.0), ("a", "b", "c", "d"))
    said = failure("evaluate", samples, f"--data.path={file}", f"--output={tmp_path / 'out'}")
    assert "holds latents" in said and "--data.path" in said


def test_a_second_private_score_counts_the_first(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    spent = []
    for words in (["--private_score=1"], ["--private_score=1"], []):
        assert main(["evaluate", str(run), "--count=3", "--classifiers", "logistic regression", *words]) == 0
        kept = json.loads((run / "evaluation.json").read_text())["private_score"]
        spent.append(kept["epsilon_spent_on_held_out_images"]["value"])
    assert spent[0] <= 1.0 < spent[1] and spent[2] == spent[1]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")
def test_two_processes_do_not_evaluate_one_run(finished_run, tmp_path, failure):
    run = shutil.copytree(finished_run, tmp_path / "run")
    program = "import sys\nfrom pathlib import Path\nfrom dither.cli.locking import evaluating_alone\n"
    program += "with evaluating_alone(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert "another process evaluates" in failure("evaluate", run, "--count=4", "--classifiers", "CNN")
    assert main(["evaluate", str(run), "--count=4", "--classifiers", "CNN"]) == 0


def test_a_full_disk_keeps_the_account_of_private_scores(finished_run, tmp_path, monkeypatch, capsys):
    def half(path, text):
        path.write_bytes(text[:20].encode())
        raise OSError("disk full")

    run = shutil.copytree(finished_run, tmp_path / "run")
    words = ["evaluate", str(run), "--count=3", "--classifiers", "logistic regression", "--private_score=1"]
    assert main(words) == 0
    before = (run / "evaluation.json").read_text()
    monkeypatch.setattr(Path, "write_text", half)
    assert main(words) == 2 and "disk full" in capsys.readouterr().err
    assert (run / "evaluation.json").read_text() == before


def test_inception_features_say_whose_weights_gave_them(tmp_path, capsys):
    from torchvision.models import inception_v3

    weights = tmp_path / "inception.pth"
    torch.save(inception_v3(weights=None, aux_logits=False, init_weights=False).state_dict(), weights)
    images, labels = np.random.default_rng(0).integers(0, 256, (5, 8, 8)), np.array([0, 1, 0, 1, 0])
    for part in ("train", "t10k"):
        idx_folder(tmp_path / "data", images, labels, part=part)
    np.savez(tmp_path / "drawn.npz", images=images[:4, None].astype(np.uint8), labels=labels[:4])
    words = [f"--data.path={tmp_path / 'data'}", "--data.num_classes=2", f"--inception_weights={weights}"]
    output = tmp_path / "out"
    assert main(["evaluate", str(tmp_path / "drawn.npz"), *words, "--classifiers", "CNN", f"--output={output}"]) == 0
    found = json.loads((output / "evaluation.json").read_text())["distance_to_held_out_images"]
    said = " ".join(capsys.readouterr().out.split())
    assert "Inception v3, last pooling, with torchvision's weights" in found["features"]["value"]
    assert "torchvision's weights" in said
    assert found["weights_sha256"] == {"value": hashlib.sha256(weights.read_bytes()).hexdigest(), "private": True}
    assert found["frechet_distance"]["private"] is False and np.isfinite(found["frechet_distance"]["value"])


def test_a_class_without_held_out_images_has_no_accuracy(samples, tmp_path):
    images, labels = digits()[1].tensors
    np.savez(tmp_path / "zeros.npz", images=images[labels == 0].numpy(), labels=labels[labels == 0].numpy())
    words = [str(samples), f"--held_out={tmp_path / 'zeros.npz'}", "--classifiers=logistic regression"]
    assert main(["evaluate", *words, f"--output={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out" / "evaluation.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)["accuracy_on_held_out_images"]["logistic regression"]
    assert found["class 0"]["value"] > 0.9 and found["class 1"]["value"] is None


def test_what_cannot_be_evaluated(samples, tmp_path, failure):
    assert "--output" in failure("evaluate", samples)
    assert "no classifier" in failure("evaluate", samples, "--output", tmp_path / "a", "--classifiers", "oracle")
    assert "samples are of shape" in failure("evaluate", samples, "--output", tmp_path / "b", "--data.image_size", 12)
    for words, named in ((["--private_score", -1], "epsilon"), (["--private_delta", 1], "delta")):
        assert named in failure("evaluate", tmp_path / "missing", "--output", tmp_path / "d", *words)  # before reading
    said = failure("evaluate", samples, "--output", tmp_path / "d", "--features", "inception")
    assert "--inception_weights" in said and "pt_inception-2015-12-05" in said and "inception_v3_google" in said
    said = failure("evaluate", samples, "--output", tmp_path / "d", "--inception_weights", samples, "--features", "cnn")
    assert "no use" in said
    assert "no state dict" in failure("evaluate", samples, "--output", tmp_path / "d", "--inception_weights", samples)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "something").write_text("mine")
    assert "not empty" in failure("evaluate", samples, "--output", tmp_path / "c")


def test_held_out_images_are_labelled_as_the_training_images(samples, tmp_path, failure):
    """A class in another order is refused, a part that is not for training is preferred, the data set itself is not."""
    images, labels = (part.numpy() for part in digits()[1].tensors)
    names, turned = tmp_path / "names.npz", tmp_path / "turned.npz"
    np.savez(names, images=images, labels=labels, class_names=np.array(list("abcdefghij")))
    np.savez(turned, images=images, labels=labels, class_names=np.array(list("jihgfedcba")))
    words = [str(samples), f"--output={tmp_path / 'out'}", f"--data.path={names}"]
    assert "same order" in failure("evaluate", *words, f"--held_out={turned}")
    assert "training images" in failure("evaluate", *words, f"--held_out={names}")
    assert "held-out part" in failure("evaluate", *words)
