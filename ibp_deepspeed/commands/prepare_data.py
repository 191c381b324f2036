"""Prepares text for training: splits it by document, trains or loads a tokenizer, writes packed tokens.

With --dialogues it prepares rows to fine-tune on, where the loss counts on responses only.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ibp_deepspeed import cli
from ibp_deepspeed.data.corpus import (
    Corpus,
    DocumentSplit,
    hub_corpus,
    open_corpus,
    standard_library,
)
from ibp_deepspeed.data.dialogues import hub_dialogues, open_dialogues
from ibp_deepspeed.data.token_file import (
    Encoder,
    Manifest,
    SplitName,
    SplitRecord,
    check_target,
    open_tokens,
    write_tokens,
)
from ibp_deepspeed.errors import InterlockingError

LENGTHS = (256, 1024, 4096)
"""Of samples, for which the padding is told; --sequence-length of train_lm.py decides."""


def parse_arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    source, tokenizer = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    source.add_argument(
        "--input",
        metavar="PATH",
        type=Path,
        help="text: a folder, or a .txt, .jsonl or .parquet file (default: the running Python's standard library, the "
        "first 20,000 characters of each module, without tests and generated tables)",
    )
    source.add_argument(
        "--dataset",
        metavar="NAME[:CONFIG]",
        help="take this data set of the Hugging Face hub, or a folder that the datasets library reads, instead; only "
        "what is used of it is downloaded (default: none)",
    )
    source.add_argument(
        "--whole-library",
        action="store_true",
        help="the standard library with its tables and modules at their whole length, which docs/learning.md was "
        "measured on (default: as --input says)",
    )
    add(
        "--dialogues",
        action="store_true",
        help='rows of "prompt" and "response" (or "completion"), or of "messages" with "role" and "content", written '
        "with the tokenizer's chat template, if it has one; needs --tokenizer, and .jsonl, .parquet or a data set "
        "(default: text)",
    )
    add("--split", metavar="NAME", help="of the data set, part of which is then held out (default: train)")
    add(
        "--text-field",
        "--text-column",
        metavar="NAME",
        default="text",
        help="field of the text in .jsonl, .parquet and data sets (default: %(default)s)",
    )
    add(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("data"),
        help="folder to write (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace prepared data that --out holds (default: refuse)")
    tokenizer.add_argument(
        "--vocab-size",
        metavar="N",
        type=int,
        default=4096,
        help="most tokens of the byte-level BPE vocabulary that is trained (default: %(default)s)",
    )
    tokenizer.add_argument(
        "--tokenizer",
        metavar="PATH",
        type=Path,
        help="use this tokenizer.json or Hugging Face tokenizer folder (default: train a tokenizer)",
    )
    add(
        "--held-out-fraction",
        metavar="X",
        type=float,
        default=0.05,
        help="share of the documents to hold out, about; at least one (default: %(default)s)",
    )
    add("--max-documents", metavar="N", type=int, help="take the first N documents (default: all)")
    add("--max-bytes", metavar="N", type=int, help="take the first documents, N bytes at most (default: all)")
    add(
        "--workers",
        metavar="N",
        type=int,
        default=None,
        help="processes that encode; what is written does not depend on their number (default: one a core)",
    )
    add("--seed", metavar="N", type=int, default=0, help="decides which are held out (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.split is not None and arguments.dataset is None:
        parser.error("--split needs --dataset")
    if arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers is {arguments.workers}: give 1 or more")
    if arguments.dialogues and arguments.input is None and arguments.dataset is None:
        parser.error("--dialogues needs rows: name them with --input or --dataset")
    if arguments.dialogues and arguments.tokenizer is None:
        parser.error("--dialogues needs the tokenizer of the model to fine-tune: name it with --tokenizer")
    return arguments


def open_source(arguments: argparse.Namespace) -> Corpus[Any]:
    limits = {"max_documents": arguments.max_documents, "max_bytes": arguments.max_bytes}
    if arguments.dataset is not None:
        name, _, config = arguments.dataset.partition(":")
        where: dict[str, Any] = {"config": config or None, "split": arguments.split or "train", **limits}
        where["keep_in"] = arguments.out.resolve().parent
        if arguments.dialogues:
            return hub_dialogues(name, **where)
        return hub_corpus(name, text_field=arguments.text_field, **where)
    if arguments.dialogues:
        return open_dialogues(arguments.input, **limits)
    if arguments.input is not None:
        return open_corpus(arguments.input, text_field=arguments.text_field, **limits)
    return standard_library(whole=arguments.whole_library, **limits)


def prepare(arguments: argparse.Namespace) -> Manifest:
    # Imported here because transformers takes seconds, which --help need not wait for.
    from ibp_deepspeed.data.dialogue_tokenizer import DialogueTokenizer
    from ibp_deepspeed.data.tokenizer import load_tokenizer, train_tokenizer

    check_target(arguments.out, overwrite=arguments.overwrite)  # before the long work, not after it
    tokenizer = None if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    corpus = open_source(arguments)
    # Three passes over the source rather than one copy of it in memory.
    split = DocumentSplit.of(progress(corpus, "reading", None), arguments.held_out_fraction, arguments.seed)
    if tokenizer is None:
        texts = progress(corpus, "training the tokenizer", split.documents)
        # Held-out text must not shape the vocabulary that it is measured in.
        tokenizer = train_tokenizer((t for t in texts if split.side(t) == "train"), arguments.vocab_size)
    encoder: Encoder = DialogueTokenizer(tokenizer) if arguments.dialogues else tokenizer
    return write_tokens(
        arguments.out,
        ((split.side(text), text) for text in progress(corpus, "encoding", split.documents)),
        encoder,
        source=corpus.description,
        seed=arguments.seed,
        held_out_fraction=arguments.held_out_fraction,
        overwrite=arguments.overwrite,
        workers=arguments.workers or len(os.sched_getaffinity(0)),
    )


def progress(documents: Iterable[Any], what: str, total: int | None) -> Iterable[Any]:
    # disable=None: no bar where the output is not a terminal.
    bar: Iterable[Any] = tqdm(documents, desc=what, total=total, unit=" documents", disable=None)
    return bar


def paddings(out: Path, split: SplitName) -> str:
    """The share of padding at some lengths of a sample."""
    from ibp_deepspeed.data.packing import Packing

    bounds = open_tokens(out, split, verify=False).bounds
    assert bounds is not None
    shares = {length: Packing.of(bounds, length).padding for length in LENGTHS}
    return ", ".join(f"{share:.2%} at {length} tokens" for length, share in shares.items())


def report(manifest: Manifest, out: Path) -> None:
    print(f"{out}: {manifest.source}")
    splits: tuple[tuple[str, SplitName, SplitRecord], ...] = (
        ("train", "train", manifest.train),
        ("held-out", "heldout", manifest.heldout),
    )
    for name, split, record in splits:
        if record.marks is None:
            print(f"{name}: {record.documents} documents, {record.tokens} tokens")
            print(f"{name}, padding where documents are packed whole into samples: {paddings(out, split)}")
        else:
            counted, longest = record.marks.counted_tokens, record.marks.longest_row
            print(
                f"{name}: {record.documents} rows, {record.tokens} tokens, {counted} of them count in the loss, "
                f"the longest row has {longest}"
            )
    print(f"vocabulary: {manifest.vocabulary_size} ({manifest.dtype})")
    print(f"unigram entropy of the held-out tokens: {manifest.unigram_entropy_nats:.4f} nats per token")


def main() -> int:
    arguments = parse_arguments()
    try:
        report(prepare(arguments), arguments.out)
    except (InterlockingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run() -> None:
    """The command line."""
    sys.exit(main())


if __name__ == "__main__":
    run()
