"""Files that are replaced whole, also by a process that is killed, and locks between real processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dither import checkpoint
from dither.errors import OutputPathError
from dither.files import held, make_folder, remove_partials, replacing

WRITER = """
import sys, time
from pathlib import Path
from dither.files import replacing

with replacing(Path(sys.argv[1])) as partial:
    with partial.open("w") as file:
        file.write("new " * 1000)
        file.flush()
        print("half", flush=True)
        time.sleep(600)
"""

HOLDER = """
import sys, time
from pathlib import Path
from dither.files import held

with held(Path(sys.argv[1])) as is_held:
    print(is_held, flush=True)
    time.sleep(600)
"""


def started(program: str, *words: object) -> tuple[subprocess.Popen[str], str]:
    """A process of this program, and the first line it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def record(monkeypatch, log: list[tuple[str, str]]) -> None:
    """Note what reaches the disk in which order; all of it still happens."""
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def noted_fsync(descriptor):
        log.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noted_replace(source, target):
        log.append(("replace", Path(target).name))
        replace(source, target)

    def noted_unlink(path, **options):
        log.append(("remove", Path(path).name))
        unlink(path, **options)

    for name, noted in (("fsync", noted_fsync), ("replace", noted_replace), ("unlink", noted_unlink)):
        monkeypatch.setattr(os, name, noted)


def test_a_process_killed_in_the_middle_leaves_the_old_file_whole(tmp_path):
    file = tmp_path / "state[1].json"
    file.write_text("old")
    process, said = started(WRITER, file)
    killed(process)
    assert said == "half" and file.read_text() == "old"
    (left,) = (other for other in tmp_path.iterdir() if other != file)
    assert left.read_text() == "new " * 1000
    other_file = tmp_path / "state[1].json.part"
    other_file.write_text("mine")
    remove_partials(file)
    assert set(tmp_path.iterdir()) == {file, other_file}


def test_a_block_that_raises_changes_nothing(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def fail():
        with replacing(file) as partial:
            partial.write_text("half")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert [other.name for other in tmp_path.iterdir()] == ["file"] and file.read_text() == "old"


def test_a_replaced_file_has_the_permissions_of_any_new_one(tmp_path):
    with replacing(tmp_path / "replaced") as partial:
        partial.write_text("new")
    (tmp_path / "plain").write_text("new")
    assert (tmp_path / "replaced").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see which file is synced")
def test_the_disk_has_content_before_name_and_name_before_the_block_is_over(tmp_path, monkeypatch):
    log: list[tuple[str, str]] = []
    with monkeypatch.context() as patch:
        record(patch, log)
        make_folder(tmp_path / "new" / "run")
        with replacing(tmp_path / "new" / "run" / "file") as partial:
            partial.write_text("content")
    name = partial.name
    assert log == [("sync", tmp_path.name), ("sync", "new"), ("sync", name), ("replace", "file"), ("sync", "run")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see which file is synced")
def test_a_power_cut_finds_a_state_and_its_manifest(tmp_path, monkeypatch):
    """The state is on the disk before the manifest that names it, and that before the old state goes."""
    folder = tmp_path / "state"
    checkpoint.write(folder, {"value": 1}, step=1)
    (old,) = (file.name for file in folder.glob("*.pt"))
    log: list[tuple[str, str]] = []
    with monkeypatch.context() as patch:
        record(patch, log)
        checkpoint.write(folder, {"value": 2}, step=2)
    (new,) = (file.name for file in folder.glob("*.pt"))
    named, synced = log.index(("replace", "checkpoint.json")), ("sync", "state")
    assert log.index(("replace", new)) < log.index(synced) < named
    assert named < log.index(synced, named) < log.index(("remove", old))
    assert checkpoint.read(folder) == {"value": 2}


def test_a_state_takes_away_what_killed_processes_left(tmp_path):
    state, part = "state-00000001-0123abcd.pt", ".4567cdef.part"
    for name in (state, state + part, "checkpoint.json" + part):
        (tmp_path / name).write_text("half")
    (tmp_path / "notes.part").write_text("mine")
    checkpoint.write(tmp_path, {"value": 1}, step=1)
    (kept,) = tmp_path.glob("state-*")
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.json", "notes.part", kept.name}
    assert checkpoint.read(tmp_path) == {"value": 1}


def test_a_failure_after_the_manifest_leaves_the_state_that_it_names(tmp_path, monkeypatch):
    """The disk fails while the manifest's name is waited for: the manifest has taken the old one's place already."""
    checkpoint.write(tmp_path, {"value": 1}, step=1)
    fsync, old = os.fsync, (tmp_path / "checkpoint.json").read_text()

    def failing(descriptor):
        if (tmp_path / "checkpoint.json").read_text() != old:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OutputPathError, match="cannot be written"):
            checkpoint.write(tmp_path, {"value": 2}, step=2)
    assert checkpoint.read(tmp_path) == {"value": 2}


def test_where_there_are_no_locks_the_file_is_not_open(tmp_path):
    """On Windows an open file could not be removed, as a run that cannot begin removes its own."""
    program = "import sys; sys.modules['fcntl'] = None\n" + HOLDER
    process, said = started(program, tmp_path / "lock")
    killed(process)
    assert said == "False" and not (tmp_path / "lock").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")
def test_a_file_is_held_until_its_process_dies(tmp_path):
    file = tmp_path / "lock"
    file.write_text("content")
    process, said = started(HOLDER, file)
    assert said == "True"
    try:
        with pytest.raises(BlockingIOError), held(file):
            pass
    finally:
        killed(process)
    for _ in range(2):
        with held(file) as is_held:
            assert is_held
    assert file.read_text() == "content"
