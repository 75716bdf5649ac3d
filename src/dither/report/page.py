"""Write the page: contents, claims and charts into one HTML file that asks the network for nothing.

Every value reaches the template as data and is escaped there. The page has no script; its policy forbids any, allows
its one style sheet by hash, and pictures only from within.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dither.errors import OutputPathError
from dither.report.charts import charts_of
from dither.report.claim import claim_of
from dither.report.contents import Contents, read_contents
from dither.report.cost import cost_of
from dither.report.evaluation import evaluation_of
from dither.report.remarks import remarks

FILES = {
    "certificate.json": ("the claim, for machines; its verification result is not covered", True),
    "model.safetensors": ("weights", True),
    "ema.safetensors": ("running average of the weights", True),
    "samples.png": ("generated images", True),
    "samples": ("generated images, through training", True),
    "config.yaml": ("every option of the run", True),
    "public.json": ("what was taken as public, and which parameters were trained", True),
    "model.json": ("sizes of the model, from its checkpoint", True),
    "beginning.pt": ("where public training or warm-up was interrupted", True),
    "class_statistics.safetensors": ("noisy statistics of each class, released before the steps", True),
    "run.json": ("size, channels and classes of the images", True),
    "class_statistics.png": ("the same as pictures", True),
    "state": ("what a resume needs, figures of the verification among it", False),
    "tensorboard": ("curves, also of values that are not private", False),
    "evaluation.json": ("scores against real data", False),
    "evaluation": ("pictures of the evaluation, real images among them", False),
    "telemetry.json": ("the run's names at other services", True),
}
"""By name: what it is, and whether the guarantee covers it."""


def write_report(run: Path, output: Path | None = None, *, public: bool = False) -> Path:
    """Write the report of a run.

    Args:
        run: the run folder, finished or not.
        output: the file; `report.html` in the run folder (`report-public.html` if `public`) by default.
        public: leave out every value and picture that the guarantee does not cover.

    Returns:
        The file.

    Raises:
        RunFolderError: no run folder, or a damaged one.
        OutputPathError: the file cannot be written.
    """
    contents = read_contents(run)
    target = output or run / ("report-public.html" if public else "report.html")
    text = render(contents, target.parent, public=public)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputPathError(
            f"{target} cannot be written: {error.strerror}", fix="give a path you may write"
        ) from error
    return target


def render(contents: Contents, beside: Path, *, public: bool = False) -> str:
    """The page as text.

    Args:
        contents: of a run folder.
        beside: the folder that the page will be in, for its links.
        public: as `write_report`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dither.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = _data_uri
    contents = contents.without_folders if public else contents
    style = files("dither.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    contradicted = bool(contents.contradictions)
    return environment.get_template("report.html").render(
        contents=contents,
        certificate=contents.certificate,
        contradicted=contradicted,
        claim=None if contradicted else claim_of(contents.certificate),
        remarks=remarks(contents),
        charts=charts_of(contents.curves, public=public),
        cost=cost_of(contents, public=public),
        evaluation=evaluation_of(contents, public=public),
        files=_files(contents.path, beside, public=public),
        public=public,
        style=style,
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'",
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _data_uri(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def _files(run: Path, beside: Path, *, public: bool) -> Sequence[dict[str, Any]]:
    """The folder's own files; what else lies there is not ours to speak of."""
    here = [(name, run / name, *what) for name, what in FILES.items() if (run / name).exists()]
    return [
        {
            "name": file.name + ("/" if file.is_dir() else ""),
            "link": None if public else quote(os.path.relpath(file, beside).replace(os.sep, "/")),
            "what": what,
            "covered": covered,
        }
        for _, file, what, covered in here
    ]
