"""TensorBoard, Weights & Biases (offline) and MLflow (in files), all of them real."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from dither.errors import MissingPackageError
from dither.telemetry import EPSILON, LOSS, SECONDS, Telemetry, Writers, check_installed, read_curves

CONFIG = {"privacy": {"steps": 6}, "seed": None}


def session(run, telemetry, first, last, offset=0.0):
    with Writers(run, telemetry, done=first - 1, config=CONFIG, say=pytest.fail) as writers:
        for step in range(first, last + 1):
            writers.log(step, {EPSILON: 0.5 * step, LOSS: 1.0 / step + offset, SECONDS: 0.25})


def test_a_resume_after_a_crash_has_each_step_once(tmp_path):
    session(tmp_path, Telemetry(), 1, 5)
    session(tmp_path, Telemetry(), 4, 6, offset=10.0)  # steps 4 and 5 were not saved
    curves = read_curves(tmp_path / "tensorboard")
    assert [step for step, _ in curves[LOSS]] == [1, 2, 3, 4, 5, 6]
    assert dict(curves[LOSS])[3] == pytest.approx(1 / 3) and dict(curves[LOSS])[4] == pytest.approx(10.25)
    assert read_curves(tmp_path / "nowhere") == {}


def test_mlflow(tmp_path):
    import mlflow

    telemetry = Telemetry(mlflow=True, project="scans")
    session(tmp_path, telemetry, 1, 5)
    session(tmp_path, telemetry, 4, 6, offset=10.0)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("scans")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == json.loads((tmp_path / "telemetry.json").read_text())["mlflow"]
    assert found.info.run_name == tmp_path.name and found.data.params["privacy.steps"] == "6"
    assert found.info.status == "FINISHED"
    logged = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, LOSS)}
    assert len(client.get_metric_history(found.info.run_id, LOSS)) == 6
    assert logged[6] == pytest.approx(10 + 1 / 6) and logged[4] == pytest.approx(0.25)


def test_a_service_that_fails_ends_nothing(tmp_path):
    said = []
    with Writers(tmp_path, Telemetry(mlflow=True), done=0, config=CONFIG, say=said.append) as writers:
        writers.log(1, {EPSILON: 0.5})
        shutil.rmtree(tmp_path / "mlruns")
        writers.log(2, {EPSILON: 1.0})
        writers.log(3, {EPSILON: 1.5})
    assert [step for step, _ in read_curves(tmp_path / "tensorboard")[EPSILON]] == [1, 2, 3]
    assert len(said) == 1 and said[0].startswith("MLflow fails")


def test_mlflow_without_values_that_are_not_private(tmp_path):
    import mlflow

    session(tmp_path, Telemetry(mlflow=True, non_private=False), 1, 2)
    client = mlflow.MlflowClient()
    run = client.get_run(json.loads((tmp_path / "telemetry.json").read_text())["mlflow"])
    assert set(run.data.metrics) == {EPSILON}
    assert set(read_curves(tmp_path / "tensorboard")) == {EPSILON, LOSS, SECONDS}


def test_wandb(tmp_path):
    """Its offline files hold names as they are, so that what would be uploaded can be searched for."""
    import wandb

    session(tmp_path, Telemetry(wandb=True, non_private=False), 1, 2)
    (first,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    session(tmp_path, Telemetry(wandb=True), 3, 4)
    wandb.teardown()  # waits for its own process, which still writes after a run's end
    (second,) = set((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")) - {first}
    name = json.loads((tmp_path / "telemetry.json").read_text())["wandb"]
    assert first.name == second.name == f"run-{name}.wandb"
    assert EPSILON.encode() in first.read_bytes() and b"non-private" not in first.read_bytes()
    assert all(value.encode() in second.read_bytes() for value in (EPSILON, LOSS, SECONDS))


def test_a_missing_package_is_named_before_anything_begins(monkeypatch):
    check_installed(Telemetry(wandb=True, mlflow=True))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(MissingPackageError, match="wandb") as error:
        check_installed(Telemetry(wandb=True))
    assert "dither[wandb]" in error.value.fix
