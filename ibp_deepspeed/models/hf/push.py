"""An exported folder onto the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ibp_deepspeed.errors import first_line
from ibp_deepspeed.models.errors import ModelError


def check_repo(repo: str) -> None:
    """That it can be a repository's name: no network is asked.

    Raises:
        ModelError: it can't.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ModelError(f"--push-to-hub {repo}: {first_line(error).rstrip('.')}; write it as user/name.") from None


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Make a repository of models on the hub, unless it is there, and upload a folder to it. Returns its address.

    Raises:
        ModelError: no network, no rights, or no login; the folder is as it was.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Export of {folder.name}")
    except Exception as error:  # the library and the network have many kinds
        raise ModelError(
            f"{folder} is written and was not pushed to {repo} ({first_line(error).rstrip('.')}): log in with `hf auth "
            f"login` and upload it with `hf upload {repo} {folder}`."
        ) from error
    return f"{api.endpoint}/{repo}"
