"""Opacus's own example scripts, unmodified, under `python -m dither.opacus`.

The scripts come from Opacus's source distribution, of the version that is installed; nothing of them is kept here.
Each runs as a process of its own, with its own options, on the small data of `example_data`. What a script cannot be
told by an option is done before it in that process, for stock Opacus and for dither alike: a seed; the checksums of the
stand-in for CIFAR-10, because torchvision accepts no others than the original's; and where torchvision comes from PyPI,
built for CUDA, beside a CPU build of torch, the names of two compiled operators that it misses at import and that no
script uses.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import example_data
import opacus
import pytest

import forks

SCRIPTS = ("mnist.py", "cifar10.py", "dcgan.py", "char-lstm-classification.py")
EXAMPLES = 300

SEED = "import torch\ntorch.manual_seed(0)\n"
TORCHVISION = """
import sys
try:
    import torchvision
except RuntimeError:  # operator torchvision::nms does not exist
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define("torchvision::" + name, schema)
"""
CHECKSUMS = """
from torchvision.datasets import CIFAR10
sums = {sums!r}
CIFAR10.train_list = [[name, sums[name]] for name, _ in CIFAR10.train_list]
CIFAR10.test_list = [[name, sums[name]] for name, _ in CIFAR10.test_list]
CIFAR10.meta = {{**CIFAR10.meta, "md5": sums[CIFAR10.meta["filename"]]}}
"""


@pytest.fixture(scope="session")
def scripts(request, tmp_path_factory) -> Path:
    """The folder of the scripts; downloaded once, into pytest's cache."""
    version = opacus.__version__
    kept = Path(request.config.cache.mkdir(f"opacus-{version}-examples"))
    if not all((kept / name).exists() for name in SCRIPTS):
        archive = download(version, tmp_path_factory.mktemp("sdist"))
        with tarfile.open(archive) as members:
            for name in SCRIPTS:
                partial = kept / f"{name}.{os.getpid()}"  # another worker of pytest may write it as well
                partial.write_bytes(members.extractfile(f"opacus-{version}/examples/{name}").read())
                partial.replace(kept / name)
    return kept


def download(version: str, folder: Path) -> Path:
    """Opacus's source distribution. pip asks it for its metadata, which needs setuptools, here or from the index."""
    wanted = ["--no-deps", "--no-binary", "opacus", f"opacus=={version}"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-d", str(folder), *wanted]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = list(folder.glob("opacus-*.tar.gz"))
    if ended.returncode or not found:
        pytest.fail(f"The source distribution of opacus {version} could not be downloaded:\n{ended.stderr}")
    return found[0]


@pytest.fixture(scope="module")
def programs() -> Iterator[forks.Server]:
    """Forks the scripts; torch and stock Opacus are imported once, dither only where it is asked for."""
    # The character example numbers its labels in the order of a set.
    environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    server = forks.Server("opacus", "torch._dynamo", environment=environment)
    yield server
    server.close()


@pytest.fixture
def run(scripts, programs, tmp_path):
    """Run a script with stock Opacus or with dither, in an empty folder; return what it wrote to stdout and stderr."""

    def run(how: str, script: str, *options: str, before: str) -> tuple[str, str]:
        folder = tmp_path / how
        folder.mkdir()
        module = ["-m", "dither.opacus"] if how == "dither" else []
        words = [*module, str(scripts / script), *options]
        ended = programs.run(*words, cwd=folder, before=before)
        assert ended.returncode == 0, f"{' '.join(words)}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout, ended.stderr

    return run


def numbers(pattern: str, text: str, times: int) -> list[float]:
    """Every number that the pattern's groups match: finite, in that many places of the text."""
    found = re.findall(pattern, text)
    assert len(found) == times, f"{pattern} is {len(found)} times, not {times}, in:\n{text}"
    values = [float(value) for groups in found for value in groups]
    assert all(math.isfinite(value) for value in values), text
    return values


def agree(reports: dict[str, list[float]]) -> None:
    """What dither reports is what stock Opacus does, up to rounding."""
    assert reports["dither"] == pytest.approx(reports["stock"], rel=1e-4)


@pytest.mark.slow
def test_mnist(run, tmp_path):
    data = tmp_path / "data"
    example_data.write_mnist(data, EXAMPLES)
    options = ["--device=cpu", "--epochs=2", "--batch-size=60", f"--data-root={data}", "--save-model"]
    reports = {}
    for how in ("stock", "dither"):
        printed, _ = run(how, "mnist.py", *options, before=SEED + TORCHVISION)
        epochs = numbers(r"Train Epoch: \d+ \s*Loss: (\S+) \(ε = (\S+), δ = 1e-05\)", printed, 2)
        assert 0 < epochs[1] < epochs[3]
        held_out = numbers(r"Test set: Average loss: (\S+), Accuracy: (\d+)/60 ", printed, 1)
        reports[how] = [*epochs, *held_out]
        assert list((tmp_path / how).glob("mnist_cnn_*.pt"))
    agree(reports)


@pytest.mark.slow
def test_cifar10(run, tmp_path):
    """torchvision checks the MD5 sums of CIFAR-10's files; it is told those of the stand-in."""
    data = tmp_path / "data"
    sums = example_data.write_cifar10(data, EXAMPLES)
    options = ["--epochs=1", "--batch-size=100", "--workers=0", "--print-freq=1", f"--data-root={data}"]
    reports = {}
    for how in ("stock", "dither"):
        printed, _ = run(how, "cifar10.py", *options, before=SEED + TORCHVISION + CHECKSUMS.format(sums=sums))
        line = r"Train Epoch: 1 \s*Loss: (\S+) Acc@1: (\S+) \(ε = (\S+), δ = 1e-05\)"
        steps = numbers(line, printed, 3)
        assert 0 < steps[2] < steps[5] < steps[8]
        reports[how] = steps + numbers(r"Test set:Loss: (\S+) Acc@1: (\S+)", printed, 1)
        assert (tmp_path / how / "checkpoint.tar").exists()
    agree(reports)


@pytest.mark.slow
def test_character_lstm(run, tmp_path):
    data = tmp_path / "names"
    example_data.write_names(data)
    options = ["--device=cpu", "--epochs=2", "--batch-size=32", f"--data-root={data}"]
    reports = {}
    for how in ("stock", "dither"):
        printed, _ = run(how, "char-lstm-classification.py", *options, before=SEED)
        assert "128 samples for training, 32 for testing" in printed
        line = r"Epoch \d+\. Accuracy: (\S+) \| Loss: (\S+) \| \(ε = (\S+), δ = 8e-05\)"
        epochs = numbers(line, printed, 2)
        assert 0 < epochs[2] < epochs[5]
        reports[how] = epochs + numbers(r"Test Accuracy: (\S+) \(ε = (\S+), δ = 8e-05\)", printed, 1)
    agree(reports)


@pytest.mark.slow
def test_dcgan(run, tmp_path):
    """Only with dither: stock Opacus stops here at the discriminator's in-place LeakyReLU.

    Its backward hooks make each layer's output a view, which may not be changed in place.
    """
    data = tmp_path / "data"
    example_data.write_mnist(data, EXAMPLES)
    options = ["--device=cpu", "--epochs=2", "--batch-size=16", "--ngf=8", "--ndf=8", "--workers=0", "--outf=out"]
    _, bars = run("dither", "dcgan.py", *options, "--manualSeed=0", f"--data-root={data}", before=SEED + TORCHVISION)
    line = r"Loss_D: (\S+) Loss_G: (\S+) D\(x\): (\S+) D\(G\(z\)\): ([^/]+)/([^(]+)\(ε = ([^,]+), δ"
    steps = re.findall(line, bars)
    assert len(set(steps)) == 4, bars  # the bar is drawn more than once a step
    values = [[float(value) for value in step] for step in steps]
    assert all(math.isfinite(value) for step in values for value in step), bars
    assert 0 < values[0][-1] < values[-1][-1]
    written = {path.name for path in (tmp_path / "dither" / "out").iterdir()}
    assert {"netD_epoch_1.pth", "netG_epoch_1.pth", "real_samples.png", "fake_samples_epoch_001.png"} <= written
