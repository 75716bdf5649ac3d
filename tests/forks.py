"""Scripts and modules in processes of their own, without importing torch anew for each.

A server imports what is named and runs nothing else. For each program it forks, and the child goes on as
`python WORDS` would: its own arguments, folder, environment, output and exit code. What Python reads only as it starts
(PYTHONHASHSEED, PYTHONPATH) is the server's, given when it is made.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


class Server:
    """Forks programs, one at a time.

    Args:
        modules: imported before the first program. A module that does not import is left to the programs.
        environment: added to this process's.
    """

    def __init__(self, *modules: str, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, __file__, *modules]
        everything = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(environment or {})}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=everything
        )

    def run(
        self,
        *words: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        before: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """What `python WORDS` does: a script's path, `-m` and a module, or `-c` and code, and its arguments.

        Args:
            words: of the command line, without options of Python's own.
            cwd: the folder it runs in.
            environment: added to the server's.
            before: code that runs before the program, as a `sitecustomize` would.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("out", "err")]
            request = {
                "words": [str(word) for word in words],
                "cwd": str(cwd or Path.cwd()),
                "environment": dict(environment or {}),
                "before": before,
                "files": [str(file) for file in files],
            }
            assert self._process.stdin is not None and self._process.stdout is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            try:
                code = int(self._process.stdout.readline())
            except BaseException:  # a time limit, Ctrl-C: the next reply would be this program's
                self.close()
                raise
            out, err = (file.read_text(encoding="utf-8") for file in files)
            return subprocess.CompletedProcess(words, code, out, err)

    def close(self) -> None:
        """End the server, and what it runs."""
        self._process.kill()
        self._process.wait()


def serve(modules: list[str]) -> None:
    """Import, then fork a program for each line of standard input, and answer with its exit code."""
    replies = os.fdopen(os.dup(1), "w")
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            print(f"{module} is left to the programs: {error!r}", file=sys.stderr)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=replies, flush=True)


def become(request: dict) -> None:
    """Run the requested program in this process, which ends with it."""
    for descriptor, file in enumerate(request["files"], start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    exec(request["before"], {"__name__": "sitecustomize"})
    first, *rest = request["words"]
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], request["cwd"]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[0] = rest, request["cwd"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1:])
