"""A small random autoencoder, saved as diffusers saves them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pictures import save_autoencoder


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))
