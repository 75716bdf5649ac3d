"""What a run planned and what it cost, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dither.report.contents import Contents
from dither.telemetry.names import SECONDS


@dataclass(frozen=True)
class Row:
    """One fact; `private` says whether the guarantee covers it."""

    name: str
    value: str
    private: bool = True


def cost_of(contents: Contents, *, public: bool) -> list[Row]:
    """The plan from certificate and options, and times from the log.

    Args:
        contents: of a run folder.
        public: only what the guarantee covers: times tell how large the batches were.
    """
    rows = _plan(contents.certificate) if contents.certificate is not None else []
    rows += _options(contents.config)
    rows += _measured(contents)
    return [row for row in rows if row.private or not public]


def _plan(certificate: Mapping[str, Any]) -> list[Row]:
    expected, size = certificate["expected_batch_size"], certificate["dataset_size"]
    return [
        *_public(certificate.get("public", {})),
        Row("Steps", f"{certificate['steps_done']:,} of {certificate['steps_planned']:,}"),
        Row(
            "Expected batch", f"{expected:,.6g} of {size:,} examples: each joins with probability {expected / size:.4g}"
        ),
        Row("Passes over the data, expected", f"{certificate['steps_done'] * expected / size:,.1f}"),
        Row(
            "Bound on one example's gradient", f"{certificate['max_grad_norm']:g} ({certificate['clipping']} clipping)"
        ),
        Row("Noise multiplier", f"{certificate['noise_multiplier']:.4g}"),
        Row("Versions", ", ".join(f"{name} {version}" for name, version in certificate["versions"].items())),
    ]


def _public(public: Mapping[str, Any]) -> list[Row]:
    rows = []
    if checkpoint := public.get("checkpoint"):
        digests = ", ".join(f"{name}: SHA-256 {digest}" for name, digest in checkpoint["sha256"].items())
        rows.append(Row("Checkpoint, taken as public", f"{checkpoint['path']} ({digests})"))
    if data := public.get("pretraining"):
        digest = f", SHA-256 {data['sha256']}" if data["sha256"] else ""
        rows.append(Row("Data set, taken as public", f"{data['path']}: {data['examples']:,} examples{digest}"))
        rows.append(Row("Public steps, without noise", f"{data['steps']:,}"))
    if tuning := public.get("fine_tuning"):
        share = f"{tuning['trained_numbers']:,} of {tuning['all_numbers']:,} numbers"
        rows.append(Row("Trained in private", f"{tuning['mode']}: {share}"))
    return rows


def _options(config: Mapping[str, Any]) -> list[Row]:
    recipe, performance = config.get("recipe") or {}, config.get("performance") or {}
    rows = []
    if model := _model(config):
        rows.append(Row("Model", model))
    if recipe.get("multiplicity"):
        rows.append(Row("Noise draws per image, free in privacy", str(recipe["multiplicity"])))
    if performance.get("strategy"):
        rows.append(Row("Strategy of clipping", str(performance["strategy"])))
    return rows


def _model(config: Mapping[str, Any]) -> str:
    """What was trained; the recipe names it only where it built it."""
    model = config.get("model", "dit")
    if isinstance(model, Mapping):
        return str(model.get("class_path", ""))
    if model != "dit":
        return str((config.get("unet") or {}).get("kind", model))
    if (config.get("finetune") or {}).get("from"):
        return "DiT, of the checkpoint"
    return str((config.get("recipe") or {}).get("model") or "")


def _measured(contents: Contents) -> list[Row]:
    seconds = [value for _, value in contents.curves.get(SECONDS, ())]
    if not seconds:
        return []
    rows = [Row("Time in steps", duration(sum(seconds)), private=False)]
    if contents.certificate is not None and sum(seconds) > 0:
        speed = contents.certificate["expected_batch_size"] * len(seconds) / sum(seconds)
        rows.append(Row("Images a second, of the expected batch", f"{speed:,.0f}", private=False))
    middle = sorted(seconds)[len(seconds) // 2]
    rows.append(Row("Middle step", f"{middle:.3g} s", private=False))
    return rows


def duration(seconds: float) -> str:
    """In words: 3725 is "1 h 2 min"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s"
    return f"{seconds:.1f} s"
