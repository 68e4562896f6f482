import getpass
import json
import re
import socket
import subprocess
import types
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from bench import machine, nvml


def test_environment_of_a_cpu():
    found = machine.environment("cpu")
    assert list(found) == [
        "cpu",
        "gpu",
        "python",
        "torch",
        "triton",
        "cuda",
        "commit",
        "dirty",
        "date",
        "platform",
    ]
    assert set(found["cpu"]) == {"model", "cores", "threads", "features"}
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert all(isinstance(name, str) for name in found["cpu"]["features"])
    assert found["gpu"] is None
    assert found["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found
    age = datetime.now(timezone.utc) - datetime.fromisoformat(found["date"])
    assert 0 <= age.total_seconds() < 60
    assert found["date"].endswith("+00:00")


def test_no_names_of_hosts_users_or_directories():
    text = json.dumps(machine.environment("cpu"))
    for name in (str(machine.ROOT), str(Path.home()), socket.gethostname()):
        assert not re.search(rf"\b{re.escape(name)}\b", text)
    if len(getpass.getuser()) > 3:
        assert getpass.getuser() not in text


def test_environment_of_a_gpu(monkeypatch):
    properties = types.SimpleNamespace(name="Fake GPU", total_memory=80 * 2**30, major=9, minor=0, L2_cache_size=50)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(nvml, "driver", lambda: "580.1")
    assert machine.environment("cuda:0")["gpu"] == {
        "name": "Fake GPU",
        "memory_bytes": 80 * 2**30,
        "driver": "580.1",
        "capability": "9.0",
    }
    assert machine.last_level_cache_bytes("cuda:0") == 50


def test_a_missing_package_has_no_version():
    assert machine._version("no-such-package-here") is None
    assert machine._version("torch") is not None


def git(directory, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    run = subprocess.run(["git", *identity, "-C", directory, *arguments], check=True, capture_output=True, text=True)
    return run.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    monkeypatch.setattr(machine, "ROOT", tmp_path.resolve())
    return tmp_path


def commit_and_dirty():
    found = machine.environment("cpu")
    return found["commit"], found["dirty"]


def test_commit_and_dirty(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert commit_and_dirty() == (commit, False)
    (repository / "bench" / "results").mkdir(parents=True)
    (repository / "bench" / "results" / "new.json").write_text("{}")
    assert commit_and_dirty() == (commit, False)  # the report of this very run
    (repository / "bench" / "new.py").write_text("")
    assert commit_and_dirty() == (commit, True)


def test_no_commit_outside_of_a_checkout(repository, monkeypatch):
    inside = repository / "unpacked"
    inside.mkdir()
    monkeypatch.setattr(machine, "ROOT", inside.resolve())
    assert commit_and_dirty() == (None, None)  # the repository around it is another
    monkeypatch.setattr(machine, "ROOT", repository / "nowhere")
    assert commit_and_dirty() == (None, None)


def test_no_commit_without_git_or_without_a_first_commit(repository, monkeypatch):
    with monkeypatch.context() as without_git:
        without_git.setenv("PATH", "")
        assert commit_and_dirty() == (None, None)
    git(repository, "update-ref", "-d", "HEAD")
    assert commit_and_dirty() == (None, None)


def cache(root, cpu, index, level, size, shared):
    directory = root / f"cpu{cpu}" / "cache" / f"index{index}"
    directory.mkdir(parents=True)
    for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
        (directory / name).write_text(f"{text}\n")


def test_caches_of_the_last_level_are_summed_once_each(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUS", tmp_path)
    assert machine.last_level_cache_bytes("cpu") == 64 * 2**20  # unknown
    for cpu in range(4):
        cache(tmp_path, cpu, 2, 2, "512K", cpu)
        cache(tmp_path, cpu, 3, 3, "32M", "0-1" if cpu < 2 else "2-3")
    (tmp_path / "cpufreq").mkdir()
    assert machine.last_level_cache_bytes("cpu") == 64 * 2**20
    (tmp_path / "cpu0" / "cache" / "index3" / "size").write_text("16384K\n")
    (tmp_path / "cpu1" / "cache" / "index3" / "size").write_text("16384K\n")
    assert machine.last_level_cache_bytes("cpu") == 48 * 2**20
    (tmp_path / "cpu3" / "cache" / "index3" / "size").write_text("\n")  # one that is not told twice
    assert machine.last_level_cache_bytes("cpu") == 48 * 2**20
