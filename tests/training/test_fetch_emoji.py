"""scripts/fetch_emoji.py: what it takes out of a package, and its errors in one line."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_emoji.py"


def fetch(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=environment or None
    )


def write_tarball(path, names):
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 2
            archive.addfile(member, io.BytesIO(b"[]"))


def test_only_what_is_needed_is_extracted(tmp_path):
    wanted = ["package/emoji.json", "package/img/google/64/1f600.png"]
    others = ["package/img/google/sheets/a.png", "package/index.js", "package/img/google/64/../../../../../evil.png"]
    write_tarball(tmp_path / "p.tgz", wanted + others)
    done = fetch("--from-tarball", tmp_path / "p.tgz", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()) == [
        "emoji.json",
        "img/google/64/1f600.png",
    ]
    assert not list(tmp_path.rglob("evil.png"))


def test_errors_are_one_line(tmp_path):
    (tmp_path / "broken.tgz").write_bytes(b"no tarball")
    write_tarball(tmp_path / "empty.tgz", ["package/index.js"])
    for done in (
        fetch("--from-tarball", tmp_path / "absent.tgz", "--out", tmp_path / "out"),
        fetch("--from-tarball", tmp_path / "broken.tgz", "--out", tmp_path / "out"),
        fetch("--from-tarball", tmp_path / "empty.tgz", "--out", tmp_path / "out"),
        fetch("--out", tmp_path / "out", PATH=str(tmp_path)),  # no npm there
    ):
        assert done.returncode == 1
        assert done.stderr.startswith("fetch_emoji: ") and done.stderr.count("\n") == 1, done.stderr
