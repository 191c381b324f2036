"""The repository's commands: in forks, which have everything imported, or as the real processes that a user starts."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from tests.forks import ROOT, end, fork
from tests.rendezvous import place, rendezvous

Done = subprocess.CompletedProcess[str]


def script(name: str, *words: object, folder: Path = ROOT) -> Done:
    """Run ``scripts/<name>`` with these arguments as the main program of a fork, in ``folder``."""
    with rendezvous() as meeting:  # for --one-process
        return _forked([meeting], folder, _run_script, str(ROOT / "scripts" / name), [str(word) for word in words])


def ranks(processes: int, name: str, *words: object) -> Done:
    """The same in all processes of one job, as a launcher would start them; output in the order of ranks."""
    with rendezvous() as meeting:
        places = [meeting | place(rank, processes) for rank in range(processes)]
        return _forked(places, ROOT, _run_script, str(ROOT / "scripts" / name), [str(word) for word in words])


def on_hosts(name: str, *words: Sequence[object]) -> Done:
    """One process for each of these lists of arguments, as if each were started on a host of its own."""
    with rendezvous() as meeting:
        alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        places = [meeting | place(rank, len(words)) | alone for rank in range(len(words))]
        each = [[str(word) for word in row] for row in words]
        return _forked(places, ROOT, _run_script_of_rank, str(ROOT / "scripts" / name), each, to_the_end=True)


def speed_benchmark(*words: object) -> Done:
    """``python -m benchmarks.speed`` in a fork, its processes forks of that one."""
    return _forked([{}], ROOT, _run_benchmark, "benchmarks.speed", [str(word) for word in words])


def gpu_part(*words: object) -> Done:
    """``python -m benchmarks.gpu`` in the same way, on the CPU at tiny shapes."""
    return _forked([{}], ROOT, _run_benchmark, "benchmarks.gpu", [*(str(word) for word in words), "--small"])


def real(*words: object, timeout: float = 240, environment: Mapping[str, str] | None = None) -> Done:
    """A process that starts from nothing, in the repository; training in one process meets itself at our store."""
    command = [str(word) for word in words]
    with rendezvous() as meeting:
        everything = {**_ENVIRONMENT, **meeting, **(environment or {})}
        return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=timeout)


def deepspeed(
    processes: int, *words: object, timeout: float = 240, environment: Mapping[str, str] | None = None
) -> Done:
    """DeepSpeed's launcher as the README starts it; in this ``environment`` and nothing else, if one is given."""
    launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--quiet"]
    launcher += ["--num_accelerators", str(processes)]
    with rendezvous() as meeting:
        command = [*launcher, "--master_port", meeting["MASTER_PORT"], *map(str, words)]
        everything = {**(_ENVIRONMENT if environment is None else environment), **meeting}
        return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=timeout)


def torchrun(processes: int, *words: object) -> Done:
    """torch's launcher, which finds a port itself."""
    options = ("--standalone", "--nproc_per_node", str(processes))
    command = [sys.executable, "-m", "torch.distributed.run", *options, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=_ENVIRONMENT, capture_output=True, text=True, timeout=240)


def assert_one_sentence(done: Done, sentence: str) -> None:
    """A user's mistake ends a command with code 1 and one line that says it."""
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(said) == 1 and sentence in said[0], done.stderr


_ENVIRONMENT = dict(os.environ)  # before any test has changed it
_TIME_IS_UP = 124


def _forked(
    environments: Sequence[Mapping[str, str]],
    folder: Path,
    function: Callable[..., None],
    *arguments: Any,
    to_the_end: bool = False,
) -> Done:
    """Run ``function`` in one process for each of these additions to a user's environment.

    The first that fails ends all, which is what launchers do, unless all are left ``to_the_end``.
    """
    with tempfile.TemporaryDirectory() as name:
        streams = [(Path(name, f"{number}.out"), Path(name, f"{number}.err")) for number in range(len(environments))]
        processes = [
            fork(function, *arguments, environment={**_ENVIRONMENT, **more}, stdout=out, stderr=err, folder=folder)
            for more, (out, err) in zip(environments, streams, strict=True)
        ]
        codes = end(processes, 240, with_first_failure=not to_the_end)
        stdout, stderr = ("".join(map(_text, paths)) for paths in zip(*streams, strict=True))
    failed = next((code for code in codes if code), None)
    code = failed or (_TIME_IS_UP if None in codes else 0)
    return subprocess.CompletedProcess([str(word) for word in arguments], code, stdout, stderr)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _run_script(path: str, words: list[str]) -> None:
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


def _run_script_of_rank(path: str, words: list[list[str]]) -> None:
    _run_script(path, words[int(os.environ["RANK"])])


def _run_benchmark(module: str, words: list[str]) -> None:
    from benchmarks.speed import harness

    sys.argv = [module, *words]
    with mock.patch.object(harness, "spawn", _fork_all):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _fork_all(processes: int, function: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> list[Any]:
    """In the place of the benchmarks' ``spawn``: what ``function`` returns in each process of a job."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    with rendezvous() as meeting:
        pipes = [context.Pipe(duplex=False) for _ in range(processes)]
        children = [
            context.Process(target=_send, args=(sender, {**meeting, **place(rank, processes)}, function, arguments))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for child, (_, sender) in zip(children, pipes, strict=True):
            child.start()
            sender.close()  # so that the end of the child is the end of the pipe
        results = [receiver.recv() for receiver, _ in pipes]
        for child in children:
            child.join()
    return results


def _send(sender: Any, environment: dict[str, str], function: Callable[[Any], Any], arguments: Any) -> None:
    os.environ.update(environment)
    sender.send(function(arguments))
