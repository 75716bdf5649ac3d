"""What is released of the data once, before any gradient: noisy statistics of each class."""

from dither.release.class_gaussians import ClassGaussians, release_class_gaussians
from dither.release.class_means import ClassMeans, release_class_means
from dither.release.class_mixtures import ClassMixtures, release_class_mixtures, release_sizes
from dither.release.reading import usual_clip_norm

__all__ = [
    "ClassGaussians",
    "ClassMeans",
    "ClassMixtures",
    "release_class_gaussians",
    "release_class_means",
    "release_class_mixtures",
    "release_sizes",
    "usual_clip_norm",
]
