"""Files that a crash leaves whole, their digests, and a lock that the end of its process lifts."""

from __future__ import annotations

import errno
import glob
import hashlib
import importlib.util
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PARTIAL = ".part"
_HAS_NO_SUCH_THING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path` to write to, which takes the place of `path` when the block ends.

    Whatever happens, a crash of the process or of the machine, `path` is what it was before or what was written, whole;
    after the block it is the latter, on the disk. A block that raises changes nothing. Only a process that is killed
    leaves its file beside, for `remove_partials`.

    Args:
        path: the file; need not exist.

    Raises:
        OSError: the folder cannot be written.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    partial.open("xb").close()
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def remove_partials(path: Path) -> None:
    """Remove what killed processes left beside `path`; only for files that no other process writes."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.????????{_PARTIAL}"):
        partial.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, that outlast a crash of the machine.

    Raises:
        OSError: it cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names of a folder's files; where the system knows no way to, do nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders; elsewhere one may be written and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _HAS_NO_SUCH_THING:
            raise
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """The digest of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def held(file: Path) -> Iterator[bool]:
    """Keep a file to this process; the system lets it go when the process ends, however it ends.

    Args:
        file: made if missing, not otherwise changed.

    Yields:
        Whether it is held; False where the system or the file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be opened for writing.
    """
    if importlib.util.find_spec("fcntl") is None:  # on Windows, where a file that is open cannot be removed either
        yield False
        return
    with file.open("ab") as opened:
        yield _lock(opened.fileno())


def _lock(descriptor: int) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HAS_NO_SUCH_THING:
            return False
        raise
    return True
