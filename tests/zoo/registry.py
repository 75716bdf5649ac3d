"""Every architecture of the zoo, by library."""

from __future__ import annotations

import importlib
import logging

from zoo import ENTRIES, Entry

MODULES = {
    "diffusers": (
        "diffusers_images",
        "diffusers_images_more",
        "diffusers_video",
        "diffusers_unets",
        "diffusers_autoencoders",
    ),
    "timm": ("timm_vits", "timm_others"),
    "transformers": ("transformers_text", "transformers_moe", "transformers_vision", "transformers_other"),
    "torchvision": ("torchvision_models",),
    "peft": ("peft_models",),
}


def load() -> tuple[list[Entry], dict[str, str]]:
    """Import the registry files; the entries, and the libraries that are not installed with what is missing."""
    missing = {}
    for library, modules in MODULES.items():
        try:
            for module in modules:
                importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing[library] = str(error)
        # They log which of their layers would like to stay float32, and which kernels are not installed.
        logging.getLogger(library).setLevel(logging.ERROR)
    return [e for library in MODULES for e in ENTRIES if e.library == library], missing
