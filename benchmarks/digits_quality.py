"""Score generated digits: a classifier trained only on them, tested on real held-out digits.

Run it on a folder's samples: `python benchmarks/digits_quality.py samples.pt`, where the file holds a dict
with "images" (N, 1, 8, 8) in [-1, 1] and "labels" (N,).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from dither.data import digits


def digits_score(images: Tensor, labels: Tensor) -> float:
    """Return the accuracy on real held-out digits of an SVC trained on generated ones.

    The classifier is scikit-learn's `SVC()` as it comes; trained on the real training digits it reaches 0.98.

    Args:
        images: generated digits (N, 1, 8, 8) in [-1, 1].
        labels: their classes (N,).
    """
    _, held_out = digits()
    return svc_accuracy(images, labels, *held_out.tensors)


def svc_accuracy(images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> float:
    """Return the accuracy of `SVC()` trained on the first pair and tested on the second."""
    from sklearn.svm import SVC

    classifier = SVC().fit(images.flatten(1).cpu().numpy(), labels.cpu().numpy())
    return float(classifier.score(test_images.flatten(1).cpu().numpy(), test_labels.cpu().numpy()))


if __name__ == "__main__":
    saved = torch.load(sys.argv[1], weights_only=True)
    print(f"{digits_score(saved['images'], saved['labels']):.3f}")
