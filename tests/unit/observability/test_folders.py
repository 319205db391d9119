"""Folders of front ends: whatever lies in the temporary directory, a server gets its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.server import environment
from vllm_parallel_think.observability.metrics import folders

SERVER = """
import sys
from pathlib import Path
from vllm_parallel_think.observability.metrics import folders

print("ready", flush=True)
sys.stdin.readline()  # all start together
parent = Path(sys.argv[1])
folders.remove_left_behind(parent)
print(folders.make(parent), flush=True)
sys.stdin.readline()
"""


def start(parent: Path) -> subprocess.Popen[str]:
    """Start what stands for a server; it waits for a line before it makes its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def folder_of(process: subprocess.Popen[str]) -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def dead_pid() -> int:
    died = subprocess.Popen([sys.executable, "-c", ""])
    died.wait()
    return died.pid


def test_what_a_killed_server_left_goes_whatever_its_number(tmp_path: Path) -> None:
    for pid in (dead_pid(), os.getpid(), 0, 99999999999999999999):
        unlocked = tmp_path / f"{folders.PREFIX}{pid}-unlocked"
        without = tmp_path / f"{folders.PREFIX}{pid}-without"
        for folder in (unlocked, without):
            folder.mkdir()
            (folder / "counter_1.db").write_bytes(b"x" * 100)
        (unlocked / folders.LOCK).touch()
    folders.remove_left_behind(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_keeps_its_folder_until_it_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path)
    tell(process)
    folder = folder_of(process)
    # As seen from another container: no such process there.
    elsewhere = tmp_path / f"{folders.PREFIX}{dead_pid()}-abc"
    folder.rename(elsewhere)
    folders.remove_left_behind(tmp_path)
    assert elsewhere.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    folders.remove_left_behind(tmp_path)
    assert not elsewhere.exists()


def test_what_is_not_a_folder_of_ours_stays_and_harms_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    dead = dead_pid()
    (tmp_path / f"{folders.PREFIX}{dead}-file").touch()
    (tmp_path / f"{folders.PREFIX}{dead}-dangling").symlink_to("/nonexistent")
    (tmp_path / f"{folders.PREFIX}{dead}-link").symlink_to(kept)
    (tmp_path / f"{folders.PREFIX}notes").mkdir()
    parent = tmp_path / f"{folders.PREFIX}{os.getppid()}-just-being-made"
    parent.mkdir()
    pipe = tmp_path / f"{folders.PREFIX}{dead}-pipe"
    pipe.mkdir()
    os.mkfifo(pipe / folders.LOCK)
    before = {path.name for path in tmp_path.iterdir()} - {pipe.name}
    folders.remove_left_behind(tmp_path)
    assert before <= {path.name for path in tmp_path.iterdir()}
    assert folders.make(tmp_path).is_dir()


def test_servers_that_start_together_each_get_a_folder(tmp_path: Path) -> None:
    stale = [tmp_path / f"{folders.PREFIX}{dead_pid()}-{number}" for number in range(100)]
    for folder in stale:
        folder.mkdir()
        (folder / "counter_1.db").write_bytes(b"x" * 100)
    processes = [start(tmp_path) for _ in range(4)]
    try:
        for process in processes:
            tell(process)
        made = {folder_of(process) for process in processes}
        assert len(made) == 4 and all((folder / folders.LOCK).exists() for folder in made)
        assert set(tmp_path.iterdir()) == made
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_stale_folder_that_somebody_else_removes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = tmp_path / f"{folders.PREFIX}{dead_pid()}-abc"
    stale.mkdir()
    (tmp_path / f"{folders.PREFIX}{dead_pid()}-def").mkdir()
    lstat = Path.lstat

    def racing(path: Path) -> os.stat_result:
        shutil.rmtree(stale, ignore_errors=True)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", racing)
    folders.remove_left_behind(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["before the lock", "behind it"])
def test_a_folder_that_is_taken_for_stale_while_it_is_made(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers with one temporary directory, where every server has the same number."""
    taken: list[str] = []
    mkdtemp, flock = tempfile.mkdtemp, folders.fcntl.flock

    def take(folder: str) -> None:
        if not taken:
            taken.append(folder)
            shutil.rmtree(folder)

    def made(**how: str) -> str:
        folder = mkdtemp(**how)
        if moment == "before the lock":
            take(folder)
        return folder

    def locked(lock: int, how: int) -> None:
        flock(lock, how)
        (folder,) = tmp_path.iterdir()
        take(str(folder))

    monkeypatch.setattr(folders.tempfile, "mkdtemp", made)
    if moment == "behind it":
        monkeypatch.setattr(folders.fcntl, "flock", locked)
    folder = folders.make(tmp_path)
    assert taken and str(folder) not in taken
    assert (folder / folders.LOCK).exists()


def test_killed_processes_are_known_for_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert folders.is_alive(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not folders.is_alive(process.pid)
    assert not folders.is_alive(10**20)
    assert not folders.is_alive(0)
