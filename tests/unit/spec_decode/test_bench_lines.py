"""A benchmark that was interrupted goes on, and measures anew what depends on something else."""

from __future__ import annotations

from pathlib import Path

from tests.bench.lines import Lines, Result, checksum


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    made: list[str] = []

    def line(lines: Lines, name: str) -> Result:
        def make() -> Result:
            made.append(name)
            return Result(name, None, 4, 40, None, 2.5, 3)

        return lines.line(name, make)

    first = line(Lines(path, "4 drafts"), "judge")
    with path.open("a") as file:
        file.write('{"key": "typical, 4 dra')  # the interruption
    again = Lines(path, "4 drafts")
    assert line(again, "judge") == first
    assert made == ["judge"]
    line(again, "typical")
    line(Lines(path, "8 drafts"), "judge")
    assert made == ["judge", "typical", "judge"]
    assert line(Lines(path, "4 drafts"), "typical").lossy == 3
    assert len(made) == 3


def test_other_weights_have_another_checksum(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(b"weights")
    before = checksum(files)
    assert checksum(files) == before
    files[1].write_bytes(b"Weights")
    assert checksum(files) != before
