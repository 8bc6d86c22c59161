# SPDX-License-Identifier: Apache-2.0
"""Files and folders are written whole or not at all, by one process at a time."""

import hashlib
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgxport.errors import DiskError, UsageError
from pgxport.files import StagedFolder, disk_errors, locked, write_new, write_whole, writing

HELD = "somebody has it; wait"
# Holds the lock of a folder until its stdin ends.
HOLDER = """
import sys
from pathlib import Path
from pgxport.files import locked
with locked(Path(sys.argv[1]), "held"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_file_has_its_name_only_once_it_is_whole(tmp_path: Path):
    file = tmp_path / "a.json"
    write_whole(file, "old")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ZeroDivisionError), writing(file) as out:
        out.write(bytes(1 // len(os.listdir(tmp_path / "nothing"))))
    assert file.read_text() == "old"
    with writing(file) as out:
        out.write(b"new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["a.json", "nothing"]


def test_a_new_file_never_replaces_one_and_keeps_its_mode(tmp_path: Path):
    file = tmp_path / "key"
    assert write_new(file, [b"ab", memoryview(b"c")], 0o600) == (hashlib.sha256(b"abc").hexdigest(), 3)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_new(file, [b"x"])
    assert file.read_bytes() == b"abc"


def test_a_lock_is_one_processs_and_free_once_that_is_dead(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match=HELD), locked(tmp_path, HELD):
            pass
        holder.kill()
    with locked(tmp_path, HELD):
        pass


def test_a_lock_without_a_message_is_waited_for(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = HOLDER.replace('"held"', "None").replace("sys.stdin.read()", "")
    file = tmp_path / "a.lock"
    with locked(file, HELD):
        waiter = subprocess.Popen([sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True, env=environment)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not waits(waiter.pid, file):
            time.sleep(0.01)
        assert waiter.poll() is None
    assert waiter.communicate(timeout=60)[0] == "locked\n"


def waits(pid: int, file: Path) -> bool:
    """Whether a process has the file open, as it does from just before it asks for the lock."""
    try:
        return any(os.path.realpath(opened) == str(file) for opened in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def test_a_folder_has_its_name_only_once_it_is_published(tmp_path: Path):
    path = tmp_path / "b"
    with StagedFolder(path, HELD) as staged:
        write_new(staged.staging / "one", [b"1"])
        assert not path.exists()
        with pytest.raises(UsageError, match=HELD):
            StagedFolder(path, HELD).open()
        staged.publish()
    assert (path / "one").read_bytes() == b"1"
    with StagedFolder(path, HELD) as staged:
        write_new(staged.staging / "two", [b"2"])
    assert os.listdir(path) == ["one"]
    with StagedFolder(path, HELD) as staged:
        write_new(staged.staging / "two", [b"2"])
        staged.publish()
    assert os.listdir(path) == ["two"]
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("resume", [False, True])
def test_what_was_left_is_deleted_unless_it_is_resumed(tmp_path: Path, resume: bool):
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "half").touch()
    with StagedFolder(tmp_path / "b", HELD, resume=resume) as staged:
        assert (staged.staging / "half").exists() is resume
    assert (tmp_path / "b.partial").exists() is resume


def test_a_link_at_the_folders_name_is_replaced_and_what_it_leads_to_stays(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "elsewhere")
    with StagedFolder(tmp_path / "b", HELD) as staged:
        staged.publish()
    assert not (tmp_path / "b").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["b", "elsewhere"]


def test_an_error_of_the_disk_says_what_why_and_the_remedy(tmp_path: Path):
    with pytest.raises(DiskError) as raised, disk_errors("cannot write b", "choose another -o"):
        (tmp_path / "no" / "a").write_text("")
    assert str(raised.value) == "cannot write b: No such file or directory; choose another -o"
    missing = tmp_path / "missing"
    with pytest.raises(DiskError, match=f"^cannot read {missing}: No such file"), disk_errors("cannot read", path=tmp_path):
        missing.read_text()
    with pytest.raises(DiskError, match=f"^cannot read {tmp_path}: it is broken"), disk_errors("cannot read", path=tmp_path):
        raise OSError("it is broken")
