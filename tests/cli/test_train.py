"""The demo in a shortened form: every file of the run folder, the resume, Ctrl-C in a real process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dither.accounting import epsilon_for
from dither.cli.main import main
from dither.training import PrivateTraining
from shortened import TINY


def read_certificate(run: Path) -> dict:
    return json.loads((run / "certificate.json").read_text())


def curves(run: Path) -> EventAccumulator:
    log = EventAccumulator(str(run / "tensorboard"))
    log.Reload()
    return log


def test_run_folder_is_complete(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "run.json",
        "config.yaml",
        "model.safetensors",
        "ema.safetensors",
        "state",
        "tensorboard",
        "samples.png",
        "samples",
        "certificate.json",
        "report.html",
    }
    assert {path.name for path in (finished_run / "samples").iterdir()} == {"step-00001.png", "step-00002.png"}
    with Image.open(finished_run / "samples.png") as grid:
        assert grid.format == "PNG"
        assert grid.width > 10 * 8
        assert grid.height > 10 * 8
    raw, ema = (load_file(finished_run / f"{name}.safetensors") for name in ("model", "ema"))
    assert raw.keys() == ema.keys()
    assert any(not torch.equal(raw[name], ema[name]) for name in raw)


def test_certificate_states_what_the_accountant_says(finished_run):
    certificate = read_certificate(finished_run)
    assert certificate["private"] is True
    assert certificate["steps_done"] == certificate["steps_planned"] == 3
    assert certificate["delta"] == 1e-4
    assert 9.5 < certificate["epsilon"] <= 10
    again = epsilon_for(certificate["sample_rate"], certificate["noise_multiplier"], 3, 1e-4)
    assert certificate["epsilon"] == pytest.approx(again, rel=1e-9)
    assert certificate["verification"]["exact"] is True
    assert "loss" in certificate["not_private_values_that_left_the_process"]


def test_log_marks_the_loss_as_not_private(finished_run):
    log = curves(finished_run)
    tags = set(log.Tags()["scalars"])
    not_private = {f"non-private/{name}" for name in ("loss", "clip-fraction", "dropped", "step-seconds")}
    assert tags == {"privacy/epsilon"} | not_private
    epsilons = [event.value for event in log.Scalars("privacy/epsilon")]
    assert len(epsilons) == 3
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] <= 10


def test_config_repeats_the_run(finished_run, tmp_path):
    config, output = finished_run / "config.yaml", tmp_path / "again"
    assert main(["train", f"--config={config}", "--noise_multiplier=5", "--epsilon=null", f"--output={output}"]) == 0
    certificate, first = read_certificate(output), read_certificate(finished_run)
    assert certificate["noise_multiplier"] == 5
    for name in ("expected_batch_size", "max_grad_norm", "steps_planned", "delta"):
        assert certificate[name] == first[name]


def test_a_seed_is_said_to_be_not_private_and_repeats(tmp_path, capsys):
    runs = [tmp_path / name for name in "ab"]
    for output in runs:
        assert main(["train", *TINY, "--steps=2", "--seed=7", f"--output={output}"]) == 0
    assert "NOT PRIVATE" in capsys.readouterr().out
    assert read_certificate(runs[0])["private"] is False
    first, second = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_of_a_finished_run_changes_nothing(finished_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    assert main(["train", f"--resume={copy}"]) == 0
    before, after = (load_file(run / "model.safetensors") for run in (finished_run, copy))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_certificate(copy)["epsilon"] == read_certificate(finished_run)["epsilon"]


def test_interrupted_run_resumes(tmp_path):
    """A real process, a real SIGINT, and the command that it prints."""
    output, steps = tmp_path / "interrupted", 40
    words = [*TINY, f"--steps={steps}", "--noise_multiplier=5", f"--output={output}"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "dither", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"dither train --resume {output}" in out
    certificate = read_certificate(output)
    done = certificate["steps_done"]
    assert 1 <= done < steps
    assert not (output / "samples.png").exists()

    assert main(["train", "--resume", str(output), "--strategy=ghost", "--performance.microbatch_size=16"]) == 0
    certificate = read_certificate(output)
    assert certificate["steps_done"] == steps
    assert certificate["resumed"] == 1
    assert (output / "samples.png").exists()
    logged = [event.step for event in curves(output).Scalars("privacy/epsilon")]
    assert logged == list(range(1, steps + 1))


def until_step(output: Path, *words: str) -> subprocess.Popen:
    """A process of `dither train` that has taken a step, and has many before it."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "dither", "train", *TINY, *words, "--noise_multiplier=5", f"--output={output}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert any(line.startswith("step ") for line in process.stdout)
    return process


@pytest.mark.parametrize("saved", [True, False])
def test_a_second_interrupt_says_how_to_go_on(tmp_path, saved):
    output = tmp_path / "cut"
    process = until_step(output, "--steps=100000", "--save_every=" + ("0.01" if saved else "1000"))
    while saved and not (output / "state" / "checkpoint.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # so that both signals come before the step is over
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (f"dither train --resume {output}" in out) is saved
    assert ("Nothing was saved yet" in out) is not saved


def test_a_state_that_is_gone_is_said_to_be(finished_run, failure, tmp_path):
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    shutil.rmtree(run / "state")
    assert f"gone from {run / 'state'}" in failure("train", "--resume", run)
    (run / "certificate.json").unlink()
    assert "stopped before its state was saved" in failure("train", "--resume", run)


def test_a_run_folder_that_is_a_link_to_nothing_is_named(failure, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert f"{tmp_path / 'link'} cannot be written" in failure("train", *TINY, f"--output={tmp_path / 'link'}")


def test_a_data_set_that_was_moved_is_said_to_be(failure, tmp_path):
    data, run = tmp_path / "digits.npz", tmp_path / "run"
    np.savez(data, images=np.zeros((40, 8, 8), np.uint8), labels=np.arange(40) % 2, class_names=["a", "b"])
    words = [*TINY, "--steps=1", "--expected_batch_size=20", "--delta=0.01", f"--data.path={data}", f"--output={run}"]
    assert main(["train", *words]) == 0
    (tmp_path / "elsewhere").mkdir()
    moved = data.rename(tmp_path / "elsewhere" / data.name)
    for command in (["train", "--resume", run], ["verify", run]):
        said = failure(*command)
        assert f"no longer at {data}" in said and f"data.path into {run / 'config.yaml'}" in said
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(data), str(moved)))
    assert main(["train", "--resume", str(run)]) == 0


@pytest.mark.parametrize(("delta", "warned"), [("0.001", True), ("0.0005", False)])
def test_a_delta_that_promises_nothing_is_named_before_the_run(delta, warned, tmp_path, capsys):
    assert main(["train", *TINY, "--steps=1", f"--delta={delta}", f"--output={tmp_path / 'run'}"]) == 0
    before, folder, _ = capsys.readouterr().out.partition("Run folder")
    assert folder and ("is not below 1 / 1,437 images" in before) is warned


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--data.pth=photos"], "did you mean --data.path?"),
        (["train", "--epsilonn=3"], "did you mean --privacy.epsilon?"),
        (["sample", "run", "--lable=3"], "did you mean --label?"),
        (["train", "--epsilon=nan"], "--privacy.epsilon nan is not known; it may be: a finite number"),
        (["train", "--steps=2.5"], "it may be: a whole number"),
        (["train", "--config=CONFIG"], "CONFIG: Option 'epsilonn' is not accepted"),
        (["train", "--config", "CONFIG"], "did you mean --privacy.epsilon?"),
    ],
)
def test_what_is_mistyped_is_met_halfway(words, said, failure, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("epsilonn: 3\n")
    assert said.replace("CONFIG", str(config)) in failure(*(word.replace("CONFIG", str(config)) for word in words))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")
def test_two_processes_do_not_train_one_run(tmp_path, failure):
    """Beside a real process that trains, or resumes, another is refused; once the first is killed, it is not."""
    output, steps = tmp_path / "run", 40
    words = [*TINY, f"--steps={steps}", "--noise_multiplier=5", "--save_every=0.001", f"--output={output}"]
    for arguments in (words, [f"--resume={output}"]):
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "dither", "train", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("step "))
        while not (output / "state" / "checkpoint.json").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # neither dead nor done
        assert "another process trains" in failure("train", f"--resume={output}")
        process.kill()
        process.communicate()
    assert json.loads((output / "state" / "checkpoint.json").read_text())["step"] < steps
    assert main(["train", f"--resume={output}"]) == 0
    assert read_certificate(output)["steps_done"] == steps


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--strategy=fast"], "fast"),
        (["--privacy.clipping=soft"], "soft"),
        (["--expected_batch_size=5000"], "5000"),
        (["--expected_batch_size=0"], "0"),
        (["--epsilon=-1"], "epsilon"),
        (["--epsilon=1e-9", "--delta=1e-15"], "epsilon"),
        (["--delta=2"], "delta"),
        (["--max_grad_norm=0"], "max_grad_norm"),
        (["--epsilon=3", "--noise_multiplier=1"], "noise_multiplier"),
        (["--steps=0"], "steps"),
        (["--steps=many"], "many"),
        (["--performance.microbatch_size=0"], "microbatch_size"),
        (["--performance.threads=0"], "threads"),
        (["--recipe.model=DiT-Z/3"], "DiT-Z/3"),
        (["--recipe.hidden_size=15"], "15"),
        (["--recipe.sampler=euler"], "euler"),
        (["--recipe.sampler_steps=2000"], "2000"),
        (["--recipe.learning_rate=-1"], "learning_rate"),
        (["--recipe.label_dropout=2"], "label_dropout"),
        (["--recipe.ema_decay=1.5"], "ema_decay"),
        (["--no_such_option=1"], "no_such_option"),
        (["--config=/nowhere.yaml"], "/nowhere.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_option_is_named_and_leaves_nothing(words, named, failure, tmp_path):
    output = tmp_path / "run"
    assert named in failure("train", *TINY, f"--output={output}", *words)
    assert not output.exists()


def test_output_that_cannot_be_used(failure, finished_run, tmp_path):
    assert "not empty" in failure("train", f"--output={finished_run}")
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in failure("train", f"--output={file}")
    assert "cannot be written" in failure("train", f"--output={file}/below")
    assert "cannot be written" in failure("train", "--output=/proc/dither/run")


def test_resume_of_what_is_no_run(failure, finished_run, tmp_path):
    assert "is not a folder" in failure("train", "--resume", tmp_path / "missing")
    assert "run.json" in failure("train", "--resume", tmp_path)
    assert "epsilon" in failure("train", "--resume", finished_run, "--epsilon=3")
    assert "output" in failure("train", "--resume", finished_run, "--output=elsewhere")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", "{"),
        ("run.json", '{"format": "another program"}'),
        ("run.json", '{"format": "dither run 1"}'),
        ("run.json", "[]"),
        ("config.yaml", "privacy: {epsilon: [1, 2"),
        ("config.yaml", "flavour: vanilla"),
        ("config.yaml", None),
        ("state/checkpoint.json", "not json"),
        ("state/*.pt", "not tensors"),
        ("state", None),
    ],
)
def test_resume_of_a_damaged_run(file, content, failure, finished_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    (damaged,) = copy.glob(file)
    if content is not None:
        damaged.write_text(content)
    elif damaged.is_dir():
        shutil.rmtree(damaged)
    else:
        damaged.unlink()
    assert failure("train", "--resume", copy).count("Fix: ") == 1


@pytest.mark.parametrize(
    ("kind", "name"), [("means", "class means"), ("gaussians", "class Gaussians"), ("mixtures", "class mixtures")]
)
def test_a_warm_up_is_released_once_and_paid_for(tmp_path, capsys, kind, name):
    run = tmp_path / "run"
    words = [*TINY, "--steps=2", "--epsilon=3", f"--warm_up.kind={kind}", "--warm_up.steps=5", f"--output={run}"]
    assert main(["train", *words]) == 0
    assert "of each class is released" in capsys.readouterr().out
    release = (run / "class_statistics.safetensors").read_bytes()
    assert (run / "class_statistics.png").stat().st_size > 0
    certificate = json.loads((run / "certificate.json").read_text())
    assert [event["release"] for event in certificate["ledger"]] == [name, "gradients"]
    assert certificate["mechanism"].endswith(f"Poisson batches; before it, {name} released with Gaussian noise")
    assert certificate["epsilon"] <= 3 and main(["certificate", "check", str(run / "certificate.json")]) == 0
    assert main(["train", f"--resume={run}"]) == 0
    assert (run / "class_statistics.safetensors").read_bytes() == release


def test_a_crash_while_the_first_state_is_written_loses_no_release(tmp_path, monkeypatch):
    def crash(self, path):
        path.mkdir()
        (path / "state-00000000-00000000.pt").write_bytes(b"half")
        raise SystemError("power")

    run = tmp_path / "run"
    words = [*TINY, "--steps=2", "--epsilon=3", "--warm_up.kind=means", "--warm_up.steps=5", f"--output={run}"]
    with monkeypatch.context() as patch:
        patch.setattr(PrivateTraining, "save", crash)
        with pytest.raises(SystemError):
            main(["train", *words])
    release = (run / "class_statistics.safetensors").read_bytes()
    assert main(["train", f"--resume={run}"]) == 0
    assert (run / "class_statistics.safetensors").read_bytes() == release
    ledger = json.loads((run / "certificate.json").read_text())["ledger"]
    assert ledger[0]["release"] == "class means"


def test_a_crash_after_a_grid_loses_no_step_that_the_grid_shows(tmp_path, monkeypatch):
    def crash(file, *rest):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"drawn")
        raise SystemError("power")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("dither.cli.train.write_samples", crash)
        with pytest.raises(SystemError):
            main(["train", *TINY, "--steps=4", "--noise_multiplier=5", "--telemetry.samples=1", f"--output={run}"])
    assert [file.name for file in (run / "samples").iterdir()] == ["step-00002.png"]
    assert json.loads((run / "state" / "checkpoint.json").read_text())["step"] == 2
    assert main(["train", f"--resume={run}"]) == 0
    assert read_certificate(run)["steps_done"] == 4


def test_settings_that_do_not_go_together_are_refused(tmp_path, failure):
    assert "guidance" in failure("train", *TINY, "--recipe.guidance=2", "--recipe.label_dropout=0")
    mixtures = [*TINY, "--warm_up.kind=mixtures"]
    assert "begins at zero" in failure("train", *mixtures, "--finetune.mode=lora")
    assert "begins at zero" in failure("train", *mixtures, f"--pretrain.path={tmp_path}")


def test_a_warm_up_beyond_the_budget_releases_nothing(tmp_path, failure):
    run, words = tmp_path / "run", [*TINY, "--epsilon=0.5", "--warm_up.kind=means"]
    error = failure("train", *words, "--warm_up.noise_multiplier=1", f"--output={run}")
    assert "before the first step" in error and not run.exists()
