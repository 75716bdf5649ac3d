"""Services in `dither train`: what they get of a whole run, and that one of them costs no run."""

from __future__ import annotations

import pytest
import wandb

from dither.cli.main import main
from dither.telemetry import CLIP_FRACTION, EPSILON, read_curves
from shortened import TINY

QUICK = [*TINY, "--steps=2", "--noise_multiplier=5", "--telemetry.samples=0"]


def sent_to_wandb(run):
    """All that it keeps of its runs to upload, in which names and lines are as they are."""
    wandb.teardown()  # waits for its own process, which still writes after a run's end, and forgets its settings
    return b"".join(file.read_bytes() for file in (run / "wandb").glob("offline-run-*/**/*") if file.is_file())


@pytest.mark.parametrize("non_private", [True, False])
def test_wandb_gets_no_printed_line_and_the_load_with_what_is_not_private(non_private, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.1")
    run = tmp_path / "run"
    words = ["--telemetry.wandb=true", f"--telemetry.non_private={non_private}", f"--output={run}"]
    assert main(["train", *QUICK, *words]) == 0
    assert "clip fraction" in capsys.readouterr().out
    sent = sent_to_wandb(run)
    assert EPSILON.encode() in sent and b"clip fraction" not in sent and b"images/s" not in sent
    assert (CLIP_FRACTION.encode() in sent) is non_private
    assert (b"proc.memory.rssMB" in sent) is non_private


def test_services_that_do_not_start_are_said_once_and_cost_no_run(tmp_path, capsys, monkeypatch):
    """A file where MLflow's folder has to be, and a project's name that W&B does not take; later both work."""
    run, wrong = tmp_path / "run", tmp_path / "file"
    wrong.touch()
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", (wrong / "mlruns").as_uri())
        words = ["--telemetry.wandb=true", "--telemetry.mlflow=true", "--telemetry.project=a/b", f"--output={run}"]
        assert main(["train", *QUICK, *words]) == 0
        assert main(["train", f"--resume={run}"]) == 0
    said = capsys.readouterr().out
    assert said.count("WeightsAndBiases does not start") == 2 and said.count("MLflow does not start") == 2
    assert (run / "certificate.json").is_file() and len(read_curves(run / "tensorboard")[EPSILON]) == 2
    assert main(["train", f"--resume={run}", "--telemetry.project=scans"]) == 0
    assert "does not start" not in capsys.readouterr().out
