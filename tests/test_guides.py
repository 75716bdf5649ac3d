"""Whatever the pages show as Python runs, page by page and in order; README.md and others with a set-up of their own
are in test_documents.py.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dither.cli.main import main
from shortened import TINY

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("python", "text", "yaml", "")
ELSEWHERE = {
    "README.md": "test_documents.py: a model and data that the text takes as given",
    "CONTRIBUTING.md": "test_documents.py: registers a rule, which must be taken back",
    "exactness.md": "test_documents.py, with what it prints",
    "native.md": "test_documents.py, with what it prints",
    "from-opacus.md": "test_documents.py: a script on Opacus that the text takes as given",
    "flash-clipping.md": "test_documents.py: the same",
    "verify.md": "cli/test_verify.py: its first block is a file for the command",
}
"""Pages whose Python is run by another test, and why."""

NOT_RUN = {
    "import dither.diffusion.pipelines": "checkpoints.md: wants an exported run; cli/test_export.py does this with one",
}
"""First lines of blocks that do not run here, and why."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block, those within lists too."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)


def python(page: Path) -> list[str]:
    return [code for language, code in blocks(page) if language == "python"]


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


@named([page for page in PAGES if python(page) and page.name not in ELSEWHERE])
def test_python_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for number, code in enumerate(python(page), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_pages_run_elsewhere_have_python(name):
    assert [page for page in PAGES if page.name == name and python(page)]
    test = ROOT / "tests" / ELSEWHERE[name].partition(":")[0].partition(",")[0]
    assert name in test.read_text()


@named(PAGES)
def test_blocks_say_what_they_are(page):
    """No block escapes by a language that nobody runs; one without is for the shell, so it is not Python."""
    for language, code in blocks(page):
        assert language in LANGUAGES, code
        if not language and code.splitlines()[0] not in NOT_RUN:
            assert not re.search(r"^(?:import|from|def|class|with) ", code, re.MULTILINE), code


SMALL = {"train": [*TINY, "--steps=3"], "sample": ["--count=2"], "evaluate": ["--count=3"]}
"""Words after those of the page, so that its commands take seconds."""


def test_commands_of_quickstart_and_evaluate_print_what_the_pages_say(tmp_path, monkeypatch, capsys):
    """Each command runs, in order, in one folder; the pages' outputs are found again but for the figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for page in (ROOT / "docs" / "quickstart.md", ROOT / "docs" / "evaluate.md"):
        lines = [line for language, code in blocks(page) if not language for line in code.splitlines()]
        commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dither ")]
        assert len(commands) > 3
        for words in commands:
            small = [] if words[1].endswith(".npz") else SMALL.get(words[0], [])
            assert main([*words, *small]) == 0, words
        printed = {without_figures(line) for line in capsys.readouterr().out.splitlines()}
        said = [line for language, code in blocks(page) if language == "text" for line in code.splitlines()]
        missing = [line for line in said if line != "..." and without_figures(line) not in printed]
        assert len(said) > 10 and not missing


def without_figures(line: str) -> str:
    """A line with every number as #, and single spaces."""
    return " ".join(re.sub(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", "#", line).split())
