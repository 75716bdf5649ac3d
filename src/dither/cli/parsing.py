"""What the commands' parsers share: help that can be read, and dither's own error for words that do not parse."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from dither.errors import ConfigurationError


class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples, calls a value by the last part of its option's name, lists no classes."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.rsplit(".", 1)[-1].upper()

    def _expand_help(self, action: argparse.Action) -> str:
        """Without the names of every class that happens to be loaded, hundreds where any module is taken."""
        return re.sub(r", known subclasses: [^()]*(?=\))", "", super()._expand_help(action))


def parse(parser: ArgumentParser, words: Sequence[str], **settings: Any) -> Namespace:
    """`parser.parse_args`, with dither's own error in place of a usage message.

    Raises:
        ConfigurationError: an unknown option or a value of the wrong type.
    """
    try:
        return parser.parse_args(list(words), **settings)
    except argparse.ArgumentError as error:
        what = _plain(str(error))
        raise ConfigurationError(_of_file(what, words), fix=_fix(parser, what)) from None


_KINDS = {
    "float": "a finite number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "a text",
    "Path": "a path",
}
"""Types of values, in words."""


def _of_file(what: str, words: Sequence[str]) -> str:
    """Say in which file the matter is, where it is the file's and not an option's."""
    file = re.search(r"(?:^|\n)--config[=\n](.*)", "\n".join(words))
    return f"{file[1]}: {what}" if file and re.match(r"Problems parsing|Option '|Unexpected config", what) else what


def _fix(parser: ArgumentParser, what: str) -> str:
    """Where to look, and the option that an unknown name is closest to."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|Option '([\w.]+)' is not accepted", what)
    names: dict[str, str] = {}
    for name in parser.get_defaults(skip_validation=True).keys() if unknown else ():
        names.setdefault(name.rpartition(".")[2], name)
        names[name] = name
    close = difflib.get_close_matches(unknown[1] or unknown[2], names, 1) if unknown else []
    return f"{f'did you mean --{names[close[0]]}? ' if close else ''}see {parser.prog} --help"


def _plain(message: str) -> str:
    """Say an error of jsonargparse in the words of a user: the option, the value, what it may be."""
    message = " ".join(message.split())
    problem = re.search(r"Problem with given class_path '(.*?)': (.*?)(?: Given value type: |$)", message)
    if problem:
        return f"{problem[1]} cannot be used: {problem[2]}"
    found = re.search(r'^Parser key "([\w.]+)".*(?:Given|Got) value: (.*)$', message)
    if not found:
        return re.sub(r'^Parser key "([\w.]+)":', r"--\1:", message)
    choices = re.findall(r"Expected (?:an? )?(?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", message)
    allowed = [_KINDS.get(name, name) or literals for name, literals in choices if name != "NoneType"]
    return f"--{found[1]} {found[2]} is not known; it may be: {' or '.join(allowed)}"
