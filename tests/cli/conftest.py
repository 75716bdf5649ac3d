"""A run made once, for every test that only reads one."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers.utils import logging

from dither.cli.main import main
from pictures import save_autoencoder
from shortened import TINY

logging.get_logger("diffusers")  # its handler keeps today's stderr: a test's own is closed after that test


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *TINY, "--steps=3", "--epsilon=10", f"--output={output}"]) == 0
    return output


@pytest.fixture
def failure(capsys):
    """Run a command that must refuse: exit code 2, message and fix on stderr, no traceback."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("dither: ")
        assert "\n  Fix: " in error
        assert "Traceback" not in error
        return error

    return run


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """A small random autoencoder, saved as diffusers saves them."""
    return save_autoencoder(tmp_path_factory.mktemp("vae"))
