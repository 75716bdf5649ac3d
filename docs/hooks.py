"""What mkdocs adds to the pages of this folder when it builds the site.

README, CONTRIBUTING and CHANGELOG stand at the root, where a forge shows them; here they become pages, with their links
turned to the site's. The command reference is the parsers' own help, and the API reference names what `__all__` names,
so neither can fall behind the code.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
AT_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
MODULES = (
    "dither",
    "dither.opacus",
    "dither.diffusion",
    "dither.diffusion.checkpoints",
    "dither.data",
    "dither.release",
    "dither.evaluation",
    "dither.telemetry",
    "dither.accounting",
    "dither.adam",
    "dither.noise",
    "dither.errors",
)
WIDTH = 100
"""Columns of the commands' help: as wide as a page."""


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages that are made at build time."""
    for name, page in AT_ROOT.items():
        files.append(File.generated(config, page, content=site_links((ROOT / name).read_text(), "")))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    for module in MODULES:
        files.append(File.generated(config, f"api/{module}.md", content=api_page(module)))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=notebook_page(notebook)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that leave the docs folder to the site's pages."""
    return site_links(markdown, "../")


def site_links(text: str, to_root: str) -> str:
    """Rewrite the links of one page.

    Args:
        text: Markdown whose links are right on a forge.
        to_root: how the page names the root of the repository: "" or "../".

    Returns:
        The same with links to pages of the site; a link to anything else in the repository becomes its text.
    """
    for name, page in AT_ROOT.items():
        text = re.sub(rf"\]\({re.escape(to_root + name)}(#[^)]*)?\)", rf"]({page}\1)", text)
    if not to_root:
        text = text.replace("](docs/", "](")
    outside = r"(?:examples|benchmarks|tests|src)(?:/[^)]*)?"
    return re.sub(rf"\[([^\]]*)\]\({re.escape(to_root)}{outside}\)", r"`\1`", text)


def commands_page() -> str:
    """The help of every command, as it prints it."""
    from dither.cli.main import COMMANDS, usage

    parts = ["# Commands", "", "What `--help` prints.", "", "```text", usage(), "```"]
    for name in COMMANDS:
        parts += ["", f"## dither {name}", "", "```text", command_help(name), "```"]
    return "\n".join(parts) + "\n"


def command_help(name: str) -> str:
    """What `dither NAME --help` prints."""
    from dither.cli.main import main

    printed, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([name, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    if not printed.getvalue().strip():
        raise RuntimeError(f"dither {name} --help printed nothing")
    return printed.getvalue().rstrip()


def notebook_page(notebook: Path) -> str:
    """The cells of a notebook as a page, with a link to the file; it is kept without outputs."""
    title, *rest = json.loads(notebook.read_text())["cells"]
    parts = ["".join(title["source"]), f"This page is a notebook: [{notebook.name}]({notebook.name}). CI runs it."]
    for cell in rest:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            text = f"```{'sh' if text.startswith('%%bash') else 'python'}\n{text}\n```"
        parts.append(text)
    return "\n\n".join(parts) + "\n"


def api_page(module: str) -> str:
    """One entry for each public name of a module; what is another library's own is only named.

    Without `__all__` its own classes are public.
    """
    found = importlib.import_module(module)
    own = [name for name, value in vars(found).items() if isinstance(value, type) and value.__module__ == module]
    ours, theirs, constants = [], [], []
    for name in getattr(found, "__all__", own):
        home = getattr(getattr(found, name), "__module__", None)
        (constants if home is None else ours if home.startswith("dither") else theirs).append(name)
    parts = [f"# {module}", "", str(found.__doc__).strip(), ""]
    for name in ours:
        # A function may have the name of its file, and the path would then mean the file.
        clash = f"{module}.{name}" in sys.modules
        parts.append(f"::: {module}.{name}.{name}\n" if clash else f"::: {module}.{name}\n")
    if constants:
        parts += ["## Constants", "", ", ".join(f"`{name}`" for name in constants), ""]
    if theirs:
        parts += ["## As they are in Opacus", "", ", ".join(f"`{name}`" for name in theirs), ""]
    return "\n".join(parts)
