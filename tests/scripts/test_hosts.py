"""Several hosts: all processes of a job hear of it when one of them can't train, or has something else than the first.

Each host is a process here; tests/scripts/test_several_hosts.py has real ones.
"""

from __future__ import annotations

import platform
import socket
from pathlib import Path

import pytest

from ibp_deepspeed.commands.training.hosts import spans_hosts, unreachable
from tests.commands import Done, on_hosts
from tests.scripts.settings import SMALL


def words(config: Path, data: Path, output: Path, *more: object) -> list[object]:
    return ["--deepspeed_config", config, "--data", data, "--output", output, *SMALL, "--steps", 2, *more]


def assert_both_say(done: Done, sentence: str) -> None:
    """Each host ends with code 1 and the same line."""
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(said) == 2 and said[0] == said[1] and sentence in said[0], done.stderr


def test_a_host_without_data_ends_all(config: Path, data: Path, tmp_path: Path) -> None:
    """Where torch's rendezvous would wait for half an hour, and the test would not."""
    done = on_hosts("train_lm.py", words(config, data, tmp_path / "out"), words(config, tmp_path, tmp_path / "out"))
    assert_both_say(done, "has no manifest.json: name a folder that")
    assert "error: rank 1 on " in done.stderr, "who can't train"


def test_what_stops_the_first_host_stops_the_others(config: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "file"
    output.write_text("")
    done = on_hosts("train_lm.py", words(config, data, output), words(config, data, tmp_path / "out"))
    assert_both_say(done, "file is a file: give a folder")
    assert not (tmp_path / "out").exists()


def test_checkpoints_need_one_folder(config: Path, data: Path, tmp_path: Path) -> None:
    """Without a file system in common; nothing is trained, and no folder is left on the other host."""
    done = on_hosts("train_lm.py", words(config, data, tmp_path / "a"), words(config, data, tmp_path / "b"))
    assert_both_say(done, f"--output {tmp_path / 'b'} is not the folder that rank 0 on ")
    assert not (tmp_path / "b").exists() and not (tmp_path / "a" / "history.jsonl").exists()


def test_options_and_configurations_are_the_same_on_all_hosts(config: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(
        config.read_text().replace('"train_micro_batch_size_per_gpu": 2', '"train_micro_batch_size_per_gpu": 4')
    )
    assert other.read_text() != config.read_text()
    done = on_hosts("train_lm.py", words(config, data, tmp_path / "a"), words(other, data, tmp_path / "a"))
    assert_both_say(done, "the DeepSpeed configuration: ")
    done = on_hosts(
        "train_lm.py", words(config, data, tmp_path / "a"), words(config, data, tmp_path / "a", "--seed", 1)
    )
    assert_both_say(done, "--seed: 1 here, 0 on ")


def test_a_host_that_would_listen_at_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """As /etc/hosts of Debian has it; gloo takes the first address."""
    addresses = {"host-a": ["127.0.1.1", "10.0.0.1"], "master": ["10.0.0.2"], "localhost": ["127.0.0.1"]}
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port: [(0, 0, 0, "", (a, 0)) for a in addresses[name]])
    monkeypatch.setattr(platform, "node", lambda: "host-a")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "master")
    assert "set GLOO_SOCKET_IFNAME to the interface" in unreachable()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert not unreachable()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert not unreachable(), "all of them are on this machine"
    monkeypatch.setenv("MASTER_ADDR", "master")
    addresses["host-a"].reverse()
    assert not unreachable()


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])  # torchrun's, DeepSpeed's launcher's
def test_a_job_on_one_host_asks_nobody(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for local in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(local, raising=False)
    assert not spans_hosts(), "nobody says"
    monkeypatch.setenv(name, "4")
    assert not spans_hosts()
    monkeypatch.setenv(name, "2")
    assert spans_hosts()
