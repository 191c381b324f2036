"""Readers of files and what is done to their files: they succeed or raise an error of ours, whatever is in them.

Each target is called in a process of little memory (see tests/test_fuzz.py); any other exception ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ibp_deepspeed.errors import InterlockingError
from tests.bombs import little_memory
from tests.forks import ROOT
from tests.mutations import mutated

_MEMORY = 2**30


def run(folder: Path, examples: int, random: bool) -> None:
    """All targets, in this process."""
    import deepspeed
    import torch

    deepspeed.utils.logger.setLevel("ERROR")
    torch.set_num_threads(1)
    how = settings(
        max_examples=examples,
        derandomize=not random,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    for make in (configuration, contents, prepared_data, rows, description):
        place = folder / make.__name__
        place.mkdir()
        target = how(make(place))
        with little_memory(_MEMORY):
            target()
        print(f"{make.__name__}: done", flush=True)


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """An error of ours is a sentence."""
    try:
        yield
    except InterlockingError as error:
        assert "\n" not in str(error) and len(str(error)) < 5000, error


def configuration(folder: Path) -> Callable[[], None]:
    """A DeepSpeed JSON with its block, as far as a training checks it before its processes meet."""
    from ibp_deepspeed.commands.training.monitors import monitors_under
    from ibp_deepspeed.config.auto import fill_auto
    from ibp_deepspeed.config.deepspeed import check_ds_config, load_ds_config, resolve_interlocking
    from ibp_deepspeed.config.kinds import parsed_by_deepspeed
    from ibp_deepspeed.config.known_keys import unknown_keys
    from ibp_deepspeed.optimizer.learning_rate import check_schedule
    from ibp_deepspeed.strategy.timeline import Timeline

    presets = [json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))]
    full = presets[0] | {
        "interlocking": {
            "strategy": "nwise", "width": 2, "mode": "window", "exits": [1, 3], "hop_slack": 1, "channel_depth": 9,
            "schedule": [{"from_step": 5, "width": 3}], "global_interval": 4, "mixed": {"width": 3, "fraction": 0.5},
            "aux_head": {"readout": "shared", "blocks": 1, "refresh_interval": 3, "average": 0.5, "negatives": 4},
        }
    }  # fmt: skip
    defaults = {
        "--micro-batch-size": 2, "--gradient-accumulation-steps": 4, "--learning-rate": 1e-3, "--warmup-steps": 2,
        "--steps": 9,
    }  # fmt: skip

    @given(mutated(*presets, full))
    def read(text: str) -> None:
        path = folder / "ds_config.json"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        with ours():
            ds_config = load_ds_config(path)
            interlocking = resolve_interlocking(ds_config)
            filled = fill_auto(ds_config, {}, defaults, 2)
            check_ds_config(filled)
            check_schedule(filled)
            micro_batches = filled.get("gradient_accumulation_steps") or 1
            Timeline(interlocking, 4, micro_batches, interlocking.aux_head is not None).channel_depth()
            unknown_keys(filled)
            monitors_under(folder, filled)
            parsed_by_deepspeed({key: value for key, value in filled.items() if key != "interlocking"})

    return read


def contents(folder: Path) -> Callable[[], None]:
    """A checkpoint's manifest and ``latest``: what a run resumes from, and what a pipeline loads."""
    from ibp_deepspeed.models.runs.checkpoint import Checkpoint
    from ibp_deepspeed.models.runs.resume import checkpoint_to_resume
    from tests.checkpoint.test_store import description as described
    from tests.single_process.test_virtual_pipeline import make

    pipeline, tag = make(), "global_step0"
    pipeline.save_checkpoint(folder, tag, files=described().files())
    path, latest = folder / tag / "contents.json", folder / "latest"
    whole = json.loads(path.read_text())

    @given(mutated(whole), st.just(tag) | st.sampled_from(["..", "/etc", "", "global_step0/..", "x" * 300]) | st.text())
    def read(text: str, named: str) -> None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        latest.write_text(named, encoding="utf-8", errors="surrogatepass")
        with ours():
            checkpoint_to_resume(folder, "auto", described(), 9)
        with ours():
            pipeline.load_checkpoint(folder)
        with ours():
            Checkpoint(folder)
        with ours():
            pipeline.load_checkpoint(folder, tag)

    return read


def prepared_data(folder: Path) -> Callable[[], None]:
    """A manifest, and token files of another length or content: up to the micro-batches of a training."""
    from ibp_deepspeed.data import HeldOut, MicroBatchLoader, open_tokens
    from ibp_deepspeed.data.dialogue_tokenizer import DialogueTokenizer
    from ibp_deepspeed.data.token_file import write_tokens
    from ibp_deepspeed.data.tokenizer import train_tokenizer
    from tests.data.test_dialogues import ANSWER, QUESTION, dialogue
    from tests.prepared_data import DOCUMENTS

    tokenizer = train_tokenizer(DOCUMENTS, 300)
    about: dict[str, Any] = {"source": "t", "seed": 0, "held_out_fraction": 0.5}
    splits: list[Any] = [("train", text) for text in DOCUMENTS] + [("heldout", text) for text in DOCUMENTS]
    write_tokens(folder / "text", splits, tokenizer, **about)
    pairs: list[Any] = [(split, dialogue(QUESTION, ANSWER, is_pair=True)) for split, _ in splits]
    write_tokens(folder / "chat", pairs, DialogueTokenizer(tokenizer), **about)
    kinds = {name: json.loads((folder / name / "manifest.json").read_text()) for name in ("text", "chat")}
    position = {"epoch": 0, "samples": 4}

    @given(st.data())
    def read(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(kinds)))
        given_ = folder / "given"
        shutil.rmtree(given_, ignore_errors=True)
        shutil.copytree(folder / name, given_)
        (given_ / "manifest.json").write_text(data.draw(mutated(kinds[name])), encoding="utf-8", errors="surrogatepass")
        for file in sorted(given_.glob("*.bin")):
            _spoil(data, file)
        verify = data.draw(st.booleans())
        with ours():
            train = open_tokens(given_, "train", verify=verify)
            held_out = open_tokens(given_, "heldout", verify=verify)
            train.check_vocabulary(300)
            loader = MicroBatchLoader(train, 8, 2, data_parallel_size=2)
            with ours():
                loader.load_state_dict(json.loads(data.draw(mutated(position).filter(_is_json))))
            for _ in range(3):
                next(loader)
            next(iter(HeldOut(held_out, 8, 2)))
            train.counts(300)

    return read


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _spoil(data: st.DataObject, path: Path) -> None:
    what = data.draw(st.sampled_from(["nothing", "nothing", "longer", "shorter", "other"]))
    content = path.read_bytes()
    if what == "shorter":
        os.truncate(path, data.draw(st.integers(0, len(content))))
    elif what == "longer":
        os.truncate(path, len(content) + data.draw(st.sampled_from([1, 2, 10 * 2**30])))  # a hole takes no room
    elif what == "other":
        place = data.draw(st.integers(0, len(content) - 1))
        path.write_bytes(content[:place] + data.draw(st.binary(min_size=1, max_size=4)) + content[place + 4 :])


def rows(folder: Path) -> Callable[[], None]:
    """Lines of a .jsonl file as dialogues, with a chat template and without, up to their tokens."""
    from ibp_deepspeed.data.dialogue_tokenizer import DialogueTokenizer
    from ibp_deepspeed.data.dialogues import open_dialogues
    from ibp_deepspeed.data.tokenizer import train_tokenizer
    from tests.data.test_dialogues import ANSWER, PAIR, QUESTION, chat
    from tests.prepared_data import DOCUMENTS

    tokenizer = train_tokenizer(DOCUMENTS, 300)
    encoders = [DialogueTokenizer(tokenizer), chat(tokenizer)]
    whole = [PAIR, {"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER | {"tool_calls": [{"id": 1}]}]}]

    @given(st.lists(mutated(*whole), min_size=1, max_size=3), st.binary(max_size=3))
    def read(texts: list[str], tail: bytes) -> None:
        path = folder / "rows.jsonl"
        path.write_bytes("\n".join(texts).encode("utf-8", errors="surrogatepass") + tail)
        with ours():
            dialogues = list(open_dialogues(path))
            for encoder in encoders:
                for each in dialogues:
                    with ours():
                        encoder.rows([each])

    return read


def description(folder: Path) -> Callable[[], None]:
    """What a checkpoint says of its model, and its strategy."""
    from ibp_deepspeed.config.interlocking import InterlockingConfig
    from ibp_deepspeed.models.runs.description import Description
    from tests.forks import ROOT

    earlier = ROOT / "tests/checkpoint/earlier_run/checkpoint/global_step3/interlocked_model.json"
    whole = json.loads(earlier.read_text())

    @given(mutated(whole))
    def read(text: str) -> None:
        (folder / "interlocked_model.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        with ours():
            found = Description.read(folder)
            found.hf_config()
            InterlockingConfig.parse(found.interlocking)

    return read
