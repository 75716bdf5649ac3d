"""What `dither evaluate` left in the run folder: figures from evaluation.json, pictures from evaluation/.

A figure is a number or a text, or {"value": ..., "private": true or false}, at any depth. One that does not say that
it is private is shown as not private.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dither.errors import RunFolderError
from dither.report.contents import Contents
from dither.report.score import NAME, ScoreClaim, score_claim


@dataclass(frozen=True)
class Figure:
    """One figure, by the names that lead to it."""

    name: str
    value: str
    private: bool


@dataclass(frozen=True)
class Evaluation:
    """Figures, pictures with their names, and the private score; none of the pictures counts as private."""

    figures: tuple[Figure, ...]
    pictures: tuple[tuple[str, Path], ...]
    score: ScoreClaim | None


def evaluation_of(contents: Contents, *, public: bool) -> Evaluation | None:
    """The evaluation; None if there is none, or nothing of it may be shown.

    Args:
        contents: of a run folder.
        public: only figures that say that they are private.

    Raises:
        RunFolderError: the private score is damaged.
    """
    score = score_of(contents)
    others = {name: node for name, node in (contents.evaluation or {}).items() if name != NAME}
    figures = tuple(figure for figure in _figures(others) if figure.private or not public)
    files = () if public else sorted(file for file in (contents.path / "evaluation").glob("*.png") if file.is_file())
    pictures = tuple((file.stem.replace("-", " ").replace("_", " "), file) for file in files)
    return Evaluation(figures, pictures, score) if figures or pictures or score else None


def score_of(contents: Contents) -> ScoreClaim | None:
    """The private score of a run folder; None if there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    try:
        return score_claim(contents.evaluation)
    except ValueError as error:
        raise RunFolderError(f"{contents.path / 'evaluation.json'}: {error}", fix="restore it from a copy") from error


def has_exposed_figures(contents: Contents) -> bool:
    """Whether an evaluation left figures or pictures that no guarantee covers."""
    found = evaluation_of(contents, public=False)
    return found is not None and (bool(found.pictures) or not all(figure.private for figure in found.figures))


def _figures(node: object, name: str = "", private: bool = False) -> Iterator[Figure]:
    if isinstance(node, Mapping):
        private = node.get("private", private) is True
        for key, value in node.items():
            if key != "private":
                yield from _figures(value, name if key == "value" else f"{name} {key}".strip(), private)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _figures(value, f"{name} {index}".strip(), private)
    elif node is not None:
        yield Figure(name.replace("_", " "), _said(node), private)


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
