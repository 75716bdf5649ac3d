"""A written page as its reader sees it."""

from __future__ import annotations

import html
import re
from pathlib import Path


def words(file: Path) -> str:
    """The page's visible text in one line."""
    body = file.read_text().partition("<body>")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())
