"""Help, versions, unknown commands, --debug; as a process where the process matters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dither
from dither.cli.main import COMMANDS, main
from dither.errors import ConfigurationError

BASELINE = Path(__file__).parents[2] / "benchmarks" / "baseline.json"


def test_help_names_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "examples" in out
    assert f"dither {command}" in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dither {dither.__version__}\n"


def test_unknown_command(failure):
    assert "'trian'" in failure("trian")


def test_debug_shows_the_traceback():
    with pytest.raises(ConfigurationError):
        main(["--debug", "budget"])


def test_as_a_process_without_traceback():
    done = subprocess.run([sys.executable, "-m", "dither", "budget"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Fix:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output:
        command = [sys.executable, "-m", "dither", "bench", "--load", str(BASELINE)]
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_missing_package_is_named(failure, monkeypatch):
    monkeypatch.setitem(sys.modules, "dither.cli.budget", None)
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "dither.cli.budget")
    assert "jsonargparse is not installed" in failure("budget")
