"""What `dither evaluate` left in the run folder: figures from evaluation.json, pictures from evaluation/.

A figure is a number or a text, or {"value": ..., "private": true or false}, at any depth. One that does not say that
it is private is shown as not private.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dither.report.contents import Contents


@dataclass(frozen=True)
class Figure:
    """One figure, by the names that lead to it."""

    name: str
    value: str
    private: bool


@dataclass(frozen=True)
class Evaluation:
    """Figures, and pictures with their names; none of the pictures counts as private."""

    figures: tuple[Figure, ...]
    pictures: tuple[tuple[str, Path], ...]


def evaluation_of(contents: Contents, *, public: bool) -> Evaluation | None:
    """The evaluation; None if there is none, or nothing of it may be shown.

    Args:
        contents: of a run folder.
        public: only figures that say that they are private.
    """
    figures = tuple(figure for figure in _figures(contents.evaluation or {}) if figure.private or not public)
    files = () if public else sorted((contents.path / "evaluation").glob("*.png"))
    pictures = tuple((file.stem.replace("-", " ").replace("_", " "), file) for file in files)
    return Evaluation(figures, pictures) if figures or pictures else None


def _figures(node: object, name: str = "", private: bool = False) -> Iterator[Figure]:
    if isinstance(node, Mapping):
        private = node.get("private") is True or private
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
