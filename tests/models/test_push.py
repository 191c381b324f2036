"""Exports are uploaded by huggingface_hub; what goes wrong there leaves the folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from ibp_deepspeed.models import ModelError
from ibp_deepspeed.models.hf.push import check_repo, push
from tests.commands import assert_one_sentence, real
from tests.models.test_export import checkpoint


def test_a_folder_is_uploaded_into_a_repository_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arguments that the library has: the calls are checked against its signatures."""
    calls: list[tuple[str, Any]] = []
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, recording(name, calls))
    address = push(tmp_path / "first", "me/first", private=True)
    assert address.endswith("/me/first") and [name for name, _ in calls] == ["create_repo", "upload_folder"]
    made, uploaded = (given for _, given in calls)
    assert made == {"repo_id": "me/first", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/first" and uploaded["folder_path"] == tmp_path / "first"


def recording(name: str, calls: list[tuple[str, Any]]) -> Any:
    import inspect

    signature = inspect.signature(getattr(HfApi, name))

    def call(self: HfApi, *args: Any, **kwargs: Any) -> None:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        given.pop("self")
        calls.append((name, given))

    return call


@pytest.mark.parametrize("name", ["me/first/second", "me first", "-me"])
def test_names_that_no_repository_has(name: str) -> None:
    with pytest.raises(ModelError, match=f"--push-to-hub {name}: .*; write it as user/name"):
        check_repo(name)


def test_without_a_network_the_folder_stays(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", "llama")
    words = ("export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "hf", "--push-to-hub", "me/first")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
    done = real(sys.executable, "scripts/convert_hf.py", *words, environment=nowhere)
    assert_one_sentence(done, f"{tmp_path / 'hf'} is written and was not pushed to me/first (")
    assert "hf upload me/first" in done.stderr and (tmp_path / "hf" / "model.safetensors").exists()
