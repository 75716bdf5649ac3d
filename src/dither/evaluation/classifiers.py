"""Classifiers trained on generated images and tested on real ones: do the samples teach what the data would?

Settings are fixed and public: nothing is chosen by looking at the real images. Legend: N images of C x H x W.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PASSES = 200_000  # images seen in training a CNN, in 3 to 10 epochs
_BATCH = 64
_LEARNING_RATE = 2e-3
_FEATURES = 128


@dataclass(frozen=True)
class Score:
    """Accuracy on images that the classifier was not trained on.

    Attributes:
        accuracy: share of all that are classified rightly.
        by_class: the same of each class, by label; nan where the test has none of it.
    """

    accuracy: float
    by_class: tuple[float, ...]


class SmallCNN(nn.Module):
    """Two convolutions and two linear maps.

    Args:
        channels: C.
        size: side in pixels, at least 4.
        classes: number of classes.
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.hidden = nn.Linear(64 * (size // 4) ** 2, _FEATURES)
        self.classes = nn.Linear(_FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees, (N, 128)."""
        return F.relu(self.hidden(self.convolutions(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes)."""
        logits: Tensor = self.classes(self.features(images))
        return logits


def train_cnn(images: Tensor, labels: Tensor, classes: int, *, seed: int = 0) -> SmallCNN:
    """A small CNN trained on images (N, C, H, W) with labels (N,), by Adam; 3 epochs of many images, 10 of few."""
    epochs = max(3, min(10, _PASSES // max(1, len(images))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCNN(images.shape[1], images.shape[-1], classes)
        optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
        batches = -(-len(images) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=epochs * batches)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(_BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def predict(model: SmallCNN, images: Tensor) -> Tensor:
    """Classes (N,) int64."""
    with torch.inference_mode():
        return torch.cat([model(part).argmax(1) for part in images.split(1024)])


def features(model: SmallCNN, images: Tensor) -> Tensor:
    """What the model's last layer sees, (N, 128)."""
    with torch.inference_mode():
        return torch.cat([model.features(part) for part in images.split(1024)]).clone()


def _cnn(images: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    return predict(train_cnn(images, labels, classes), test)


def _scikit(make: Callable[[], object]) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    def predicted(images: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if len(labels.unique()) == 1:  # scikit-learn fits no boundary around one class
            return labels[:1].expand(len(test))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the number of passes is a fixed setting
            fitted = make_pipeline(StandardScaler(), make()).fit(images.flatten(1).numpy(), labels.numpy())
        return torch.as_tensor(np.asarray(fitted.predict(test.flatten(1).numpy())))

    return predicted


def _logistic_regression() -> object:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.01, max_iter=200)


def _mlp() -> object:
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier((200,), max_iter=15, early_stopping=False, random_state=0)


CLASSIFIERS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "logistic regression": _scikit(_logistic_regression),
    "MLP": _scikit(_mlp),
    "CNN": _cnn,
}
"""By name: (images, labels, test images, classes) to predicted labels."""


def score(name: str, images: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> Score:
    """Train a classifier on one set and test it on another.

    Args:
        name: of CLASSIFIERS.
        images: generated, (N, C, H, W) in [-1, 1].
        labels: (N,) int64.
        test: real, (M, C, H, W).
        test_labels: (M,).
        classes: size of the label set.
    """
    right = CLASSIFIERS[name](images, labels, test, classes) == test_labels
    by_class = tuple(float(right[test_labels == label].double().mean()) for label in range(classes))
    return Score(float(right.double().mean()), by_class)
