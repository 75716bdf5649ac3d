"""Data sets for private training."""

from dither.data.digits import digits as digits
from dither.data.image_data import ImageData as ImageData
from dither.data.image_data import Latents as Latents
from dither.data.reading import classes_are_folders as classes_are_folders
from dither.data.reading import read_images as read_images

__all__ = ["ImageData", "Latents", "classes_are_folders", "digits", "read_images"]
