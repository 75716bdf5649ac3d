"""The documentation builds without a warning, asks the network for nothing, and leaves no name and no command out."""

from __future__ import annotations

import html
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dither.opacus
from dither.cli.main import COMMANDS
from dither.cli.options import SHORT, train_parser

ROOT = Path(__file__).parent.parent
PARSERS = {
    name: train_parser if name == "train" else getattr(importlib.import_module(f"dither.cli.{name}"), f"{name}_parser")
    for name in COMMANDS
}
GUIDES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in ("models.md", "opacus-limits.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: the whole command, as `make docs` runs it."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    loads = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'> ]*)")
    assert {page.name: loads.findall(page.read_text()) for page in pages if loads.findall(page.read_text())} == {}
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text()), style


def test_every_command_is_there(site):
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "commands" / "index.html").read_text()))
    assert all(f"dither {name}" in page for name in COMMANDS)
    for name, parser in PARSERS.items():
        missing = [o for action in parser()._actions for o in action.option_strings[-1:] if o not in page]
        assert not missing, name


@pytest.mark.parametrize(
    "module",
    [
        "dither",
        "dither.opacus",
        "dither.diffusion",
        "dither.diffusion.checkpoints",
        "dither.data",
        "dither.release",
        "dither.evaluation",
        "dither.telemetry",
        "dither.accounting",
    ],
)
def test_every_public_name_is_there(site, module):
    page = (site / "api" / module / "index.html").read_text()
    names = [name for name in importlib.import_module(module).__all__ if not name.startswith("__")]
    assert names
    for name in names:
        assert re.search(rf'id="{module}[.a-z]*\.{name}"', page) or f"<code>{name}</code>" in page, name


def test_what_the_guides_import_is_in_the_reference(site):
    text = "\n".join(document.read_text() for document in (ROOT / "README.md", *GUIDES))
    imports = re.findall(r"^from (dither[.\w]*) import ([\w, ]+)", text, re.MULTILINE)
    assert imports
    for module, names in imports:
        page = site / "api" / module / "index.html"
        assert page.is_file(), module
        for name in names.split(","):
            assert re.search(rf"{module}(\.\w+)*\.{name.strip()}\b", page.read_text()), f"{module}.{name}"


def test_links_of_the_root_pages_lead_to_pages(site):
    home = (site / "index.html").read_text()
    assert 'href="contributing/"' in home and 'href="exactness/#limits"' in home
    assert "docs/" not in "".join(re.findall(r'href="([^"]*)"', home))


@pytest.mark.parametrize("document", [ROOT / "README.md", *GUIDES], ids=lambda path: path.name)
def test_commands_in_the_guides_parse(document, monkeypatch):
    """Lines of shell blocks that call dither are words that its own parser takes."""
    monkeypatch.chdir(ROOT)
    text = re.sub(r"^```(?:python|text)\n.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    for block in re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if not line.startswith("dither "):
                continue
            words = shlex.split(line, comments=True)
            assert words[1] in COMMANDS, line
            PARSERS[words[1]]().parse_args(_long(words[1], words[2:]))


def _long(command: str, words: list[str]) -> list[str]:
    """The words with `dither train`'s short options spelled out, as the command reads them."""
    return [SHORT.get(word, word) for word in words] if command == "train" else words


@pytest.mark.parametrize("notebook", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_pages_and_can_be_taken(site, notebook):
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "notebooks" / notebook.stem / "index.html").read_text()))
    code = [cell["source"] for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(lines[-1].strip() in page for lines in code)
    assert (site / "notebooks" / notebook.name).read_bytes() == notebook.read_bytes()


def test_opacus_page_tells_whose_names_they_are(site):
    page = (site / "api" / "dither.opacus" / "index.html").read_text()
    theirs = page[page.rindex("As they are in Opacus") :]
    stock = [n for n in dither.opacus.__all__ if getattr(dither.opacus, n).__class__.__name__ != "str"]
    for name in stock:
        ours = getattr(dither.opacus, name).__module__.startswith("dither")
        assert (f"<code>{name}</code>" in theirs) is not ours, name
