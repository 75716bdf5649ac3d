"""What evaluation.json holds: every figure of `dither evaluate`, with its mark."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor

    from dither.data import ImageData
    from dither.evaluation.inception import Inception


def figures(
    options: Namespace,
    generated: Tensor,
    labels: Tensor,
    training: ImageData,
    held_out: ImageData,
    output: Path,
    earlier: list[float],
    inception: Inception | None,
    console: Console,
) -> dict[str, Any]:
    """Compare generated images with real ones, and write the picture of the nearest.

    Args:
        options: of the command.
        generated: (N, C, H, W) in [-1, 1].
        labels: (N,) int64.
        training: what the generator was trained on.
        held_out: real images that it never saw.
        output: the folder of results.
        earlier: noise multipliers of private scores that were released from the same held-out images.
        inception: whose features distances are measured on; None for a CNN's.
        console: where it says what it does.

    Returns:
        Each figure as {"value", "private"}, by name.
    """
    from dither import evaluation
    from dither.evaluation.pictures import save_neighbours

    found: dict[str, Any] = {
        "images": {"generated": _public(len(generated)), "held_out": _public(len(held_out))},
        "accuracy_on_held_out_images": {},
    }
    (images, image_labels), (test, test_labels) = training.batch(), held_out.batch()
    names, rights = training.class_names, []
    for name in options.classifiers:
        with console.status(f"{name}: training on generated images"):
            score = evaluation.score(name, generated, labels, test, test_labels, len(names))
        rights.append(round(score.accuracy * len(test)))
        found["accuracy_on_held_out_images"][name] = {
            "all": _open(score.accuracy),
            **{f"class {class_name}": _open(value) for class_name, value in zip(names, score.by_class, strict=True)},
        }
    if inception is None:
        said, ours, real = _cnn_features(generated, test, images, image_labels, len(names), console)
    else:
        said, ours, real = _inception_features(inception, generated, test, console)
    found["distance_to_held_out_images"] = {**said, **_distances(ours, real, console)}
    with console.status("nearest training images"):
        near = evaluation.nearest(generated, images, test)
    (output / "evaluation").mkdir(exist_ok=True)
    save_neighbours(near, generated, images, output / "evaluation" / "nearest-training-images.png")
    found["nearest_training_image"] = {
        "median_distance": _open(float(near.distances.median())),
        "median_distance_of_held_out_images": _open(float(near.usual.median())),
        "generated_nearer_than_999_of_1000_held_out": _open(len(near.suspicious)),
    }
    found["private_score"] = _private(options, rights, len(test), earlier)
    return found


def _cnn_features(
    generated: Tensor, test: Tensor, images: Tensor, labels: Tensor, classes: int, console: Console
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What the features are, and those of the generated and of the held-out images."""
    from dither.evaluation.classifiers import features, train_cnn

    with console.status("features of a CNN trained on the real training images"):
        network = train_cnn(images, labels, classes)
        ours, real = features(network, generated), features(network, test)
    said = {"features": _public("the last hidden layer of a small CNN trained on the real training images")}
    return said, ours, real


def _inception_features(
    inception: Inception, generated: Tensor, test: Tensor, console: Console
) -> tuple[dict[str, Any], Tensor, Tensor]:
    with console.status("Inception's features") as status:

        def show(done: int, total: int) -> None:
            status.update(f"Inception's features: {done} of {total} images")

        ours, real = (inception.features(part, show) for part in (generated, test))
    said = {"features": _public(inception.description), "weights_sha256": _public(inception.sha256)}
    return said, ours, real


def _distances(ours: Tensor, real: Tensor, console: Console) -> dict[str, Any]:
    """Distances of the features (N, d) of generated images to those (M, d) of held-out ones."""
    from dither import evaluation

    with console.status("distances"):
        kernel, error = evaluation.kernel_distance(ours, real)
        precision, recall = evaluation.precision_recall(ours, real)
        return {
            "frechet_distance": _open(evaluation.frechet_distance(ours, real)),
            "kernel_distance": _open(kernel),
            "kernel_distance_standard_error": _open(error),
            "precision": _open(precision),
            "recall": _open(recall),
        }


def _private(options: Namespace, rights: list[int], count: int, earlier: list[float]) -> dict[str, Any]:
    from dither.accounting import Event, Ledger
    from dither.evaluation.private_score import private_score

    if options.private_score is None:
        if not earlier:
            return {}
        spent = Ledger(Event(1.0, noise, 1) for noise in earlier).epsilon(options.private_delta)
        return {
            "epsilon_spent_on_held_out_images": _public(spent),
            "delta": _public(options.private_delta),
            "noise_multipliers": _public(earlier),
        }
    score = private_score(rights[-1], count, options.private_score, options.private_delta, earlier)
    return {
        "accuracy": _public(score.accuracy),
        "classifier": _public(options.classifiers[-1]),
        "protects": _public("one held-out image, added or removed; their number is taken as public"),
        "epsilon_spent_on_held_out_images": _public(score.epsilon),
        "delta": _public(score.delta),
        "noise_multipliers": _public([*earlier, score.noise_multiplier]),
    }


def _open(value: object) -> dict[str, Any]:
    """A figure computed from real images without noise; JSON knows no number that is none."""
    return {"value": None if isinstance(value, float) and not math.isfinite(value) else value, "private": False}


def _public(value: object) -> dict[str, Any]:
    """A figure that is public, or was released with noise."""
    return {"value": value, "private": True}
