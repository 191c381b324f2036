"""The text of the second study, made of packages that are the very ones."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality import corpus
from benchmarks.quality.corpus import LONGEST, SOURCES, Source, cut, fetch, write
from ibp_deepspeed.errors import DataError

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="packages are made and read with dpkg-deb")


def package(folder: Path, files: dict[str, bytes]) -> Source:
    """A package of these files, as a source that takes them all."""
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    control = "Package: words\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: words\n"
    (tree / "DEBIAN" / "control").write_text(control)
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    target = folder / "debs" / "words_1_all.deb"
    target.parent.mkdir()
    subprocess.run(["dpkg-deb", "-b", tree, target], check=True, capture_output=True)
    checksum = hashlib.sha256(target.read_bytes()).hexdigest()
    return Source("words", "1", checksum, "none", "words", "usr/*.txt", 1)


def test_a_corpus_is_what_its_packages_hold_up_to_an_amount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"usr/{i}.txt": f"text {i} ".encode() * 50 for i in range(9)} | {"usr/other": b"not taken" * 99}
    source = package(tmp_path, files)
    written = []
    for out, amount in (("all", 1.0), ("again", 1.0), ("half", 0.002)):
        monkeypatch.setattr(corpus, "SOURCES", (replace(source, megabytes=amount),))
        write(tmp_path / out, tmp_path / "debs")
        written.append((tmp_path / out / "corpus.jsonl").read_text().splitlines())
    everything, again, half = ([json.loads(line)["text"] for line in lines] for lines in written)
    assert sorted(everything) == sorted(files[f"usr/{i}.txt"].decode() for i in range(9)) and again == everything
    assert 0 < len(half) < 9 and set(half) < set(everything) and sum(map(len, half)) <= 2000
    assert source.sha256 in (tmp_path / "all" / "SOURCES.md").read_text()


def test_another_package_is_refused_with_its_checksum(tmp_path: Path) -> None:
    source = package(tmp_path, {"usr/a.txt": b"a"})
    with pytest.raises(DataError, match=f"has no words of version 1 .checksum {'0' * 64}., but {source.sha256}"):
        fetch(replace(source, sha256="0" * 64), tmp_path / "debs")


def test_without_apt_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="apt-get failed .*snapshot.debian.org"):
        fetch(SOURCES[0], tmp_path)


def test_texts_are_read_out_of_their_formats() -> None:
    page = b"<head><title>no</title></head><p>One &amp; <b>two</b></p><script>no()</script><li>three</li>"
    assert corpus._page(page) == "One & two\n\nthree"
    assert corpus._dictionary(gzip.compress(b"word")) == "word"
    strings = b"".join(b"\x00\x04\x00\x09" + len(t).to_bytes(4) + t for t in (b"It is a truth", b"", b"acknowledged"))
    assert corpus._r_strings(b"\x00\x00\x00\x01" + zlib.compress(b"RDX" + strings)) == "It is a truth\n\nacknowledged"


def test_long_texts_are_cut_at_lines_and_remains_left_out() -> None:
    line = "x" * 99 + "\n"
    pieces = list(cut(line * 450))
    assert "".join(pieces) == line * 450 and [len(piece) for piece in pieces] == [LONGEST, LONGEST, 5000]
    assert list(cut("short\n")) == []
