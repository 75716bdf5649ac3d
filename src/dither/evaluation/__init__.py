"""How good generated images are, measured against real ones. Almost nothing here is private."""

from dither.evaluation.classifiers import CLASSIFIERS, Score, SmallCNN, score
from dither.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from dither.evaluation.neighbours import Neighbours, nearest

__all__ = [
    "CLASSIFIERS",
    "Neighbours",
    "Score",
    "SmallCNN",
    "frechet_distance",
    "kernel_distance",
    "nearest",
    "precision_recall",
    "score",
]
