"""pytest plugin: Opacus's own test-suite under `dither.opacus.install()`."""

import dither.opacus


def pytest_configure(config):
    dither.opacus.install()
