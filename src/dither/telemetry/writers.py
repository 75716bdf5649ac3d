"""Where values go while a run trains: TensorBoard always, Weights & Biases and MLflow where they are asked for.

The last two are imported only then. Each keeps its own settings: WANDB_MODE=offline, MLFLOW_TRACKING_URI and so on.
"""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from dither.errors import MissingPackageError, reason_of
from dither.telemetry.names import EPSILON, is_private


@dataclass(frozen=True)
class Telemetry:
    """What is logged and drawn on the way. Nothing here changes the claim.

    Args:
        wandb: log to Weights & Biases too; its own settings hold, e.g. WANDB_MODE=offline.
        mlflow: log to MLflow too; MLFLOW_TRACKING_URI says where.
        project: the project or experiment there.
        non_private: send them values computed without noise too (loss, clip fraction, times), under the name
            non-private/..., and to W&B the machine's load; false keeps those in the run folder.
        samples: labelled grids drawn through training, at evenly spaced steps; 0 for none.
    """

    wandb: bool = False
    mlflow: bool = False
    project: str = "dither"
    non_private: bool = True
    samples: int = 4


class Writer(Protocol):
    """One place that values go to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a completed step, counted from 1."""

    def close(self) -> None:
        """Write what is still held."""


class TensorBoard:
    """Event files in a folder.

    Args:
        folder: made if missing.
        done: steps before this session; what was logged after them, by a session that crashed, is forgotten.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Writer`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """As `Writer`."""
        self._writer.close()


class WeightsAndBiases:
    """One run there for one run folder, also after a resume: its id is kept in the folder.

    Args:
        run: the run folder.
        project: its project there.
        config: the options of the run.
        non_private: send the machine's load too, which follows the batches' sizes. What the command prints is never
            sent: the values go there by name, and the lines hold those that are not private.
    """

    def __init__(self, run: Path, project: str, config: Mapping[str, Any], non_private: bool) -> None:
        import wandb

        name = _kept(run, "wandb", lambda: uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            name=run.name,
            id=name,
            resume="allow",
            dir=str(run),
            config=dict(config),
            settings=wandb.Settings(console="off", x_disable_stats=not non_private),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Writer`. It refuses steps that do not increase, so that no step is there twice."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """As `Writer`."""
        self._run.finish()


class MLflow:
    """One run there for one run folder, also after a resume: its id is kept in the folder.

    Args:
        run: the run folder.
        project: its experiment there.
        config: the options of the run.
    """

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()

        def start() -> str:
            found = self._client.get_experiment_by_name(project)
            experiment = self._client.create_experiment(project) if found is None else found.experiment_id
            begun: str = self._client.create_run(experiment, run_name=run.name).info.run_id
            for option, value in _flat(config).items():
                self._client.log_param(begun, option, value)
            return begun

        self._id = _kept(run, "mlflow", start)
        logged = self._client.get_metric_history(self._id, EPSILON)
        self._last = max((metric.step for metric in logged), default=0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Writer`. What a crashed session logged of this step stays, so that no step is there twice."""
        if step > self._last:
            for name, value in values.items():
                self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        """As `Writer`."""
        self._client.set_terminated(self._id)


class Writers:
    """All writers of a session; a context that closes them.

    A service that does not start, or fails while the run trains, gets no more values; the run goes on, and so does
    TensorBoard.

    Args:
        run: the run folder.
        telemetry: what was asked for.
        done: steps before this session.
        config: the options of the run.
        say: told, once, of a service that fails.
    """

    def __init__(
        self, run: Path, telemetry: Telemetry, *, done: int, config: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._elsewhere: list[Writer] = []
        self._non_private, self._say = telemetry.non_private, say
        self._log = TensorBoard(run / "tensorboard", done)
        if telemetry.wandb:
            self._start(WeightsAndBiases, run, telemetry.project, config, telemetry.non_private)
        if telemetry.mlflow:
            self._start(MLflow, run, telemetry.project, config)

    def __enter__(self) -> Writers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
        self._to_services(lambda writer: writer.close())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a completed step, counted from 1."""
        self._log.log(step, values)
        sent = {name: value for name, value in values.items() if self._non_private or is_private(name)}
        self._to_services(lambda writer: writer.log(step, sent))

    def _start(self, service: Callable[..., Writer], *arguments: object) -> None:
        try:
            self._elsewhere.append(service(*arguments))
        except Exception as error:  # as below; a release may have been made by now
            self._say(f"{service.__name__} does not start, and gets nothing of this session: {reason_of(error)}")

    def _to_services(self, give: Callable[[Writer], None]) -> None:
        for writer in list(self._elsewhere):
            try:
                give(writer)
            except Exception as error:  # whatever a service's client raises, private steps are worth more
                self._elsewhere.remove(writer)
                self._say(f"{type(writer).__name__} fails, and gets no more of this session: {reason_of(error)}")


def check_installed(telemetry: Telemetry) -> None:
    """Refuse, before anything is begun, a service whose package is missing.

    Raises:
        MissingPackageError: it names the package.
    """
    for package, wanted in (("wandb", telemetry.wandb), ("mlflow", telemetry.mlflow)):
        if wanted and importlib.util.find_spec(package) is None:
            raise MissingPackageError(
                f"--telemetry.{package} needs the package {package}, which is not installed",
                fix=f"pip install 'dither[{package}]', or leave the option out",
            )


def _kept(run: Path, service: str, start: Callable[[], str]) -> str:
    """The id of this run at a service: from telemetry.json, or begun now and written there."""
    file = run / "telemetry.json"
    ids: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    if service not in ids:
        ids[service] = start()
        file.write_text(json.dumps(ids, indent=2) + "\n")
    return ids[service]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as option names: {"privacy": {"steps": 3}} is {"privacy.steps": 3}."""
    found = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
