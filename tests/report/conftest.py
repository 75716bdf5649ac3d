"""A small real run, made once, and Debian's Chromium without a screen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from dither.cli.main import main
from shortened import TINY

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("report") / "hospital scans"
    assert main(["train", *TINY, "--steps=8", "--epsilon=3", "--telemetry.samples=2", f"--output={output}"]) == 0
    return output


@pytest.fixture(scope="session")
def evaluated(run, tmp_path_factory) -> Path:
    """The same run after an evaluation that left figures, a private score and a picture."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("evaluated") / run.name)
    assert main(["evaluate", str(folder), "--count=4", "--classifiers", "CNN", "--private_score=1"]) == 0
    assert main(["report", str(folder)]) == 0
    return Path(folder)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / run.name))


@pytest.fixture(scope="session")
def browser() -> Browser:
    program = os.environ.get("DITHER_CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.fail("No chromium: apt-get install chromium, as .ci/packages does, or name one in DITHER_CHROMIUM.")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()
