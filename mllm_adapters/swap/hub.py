"""Uploads a model to the hub in one commit."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mgll_encoder.common.errors import InvalidArgumentError, StorageError
from mgll_encoder.common.hub import hub_errors, hub_reason


def check_push(repo: str) -> None:
    """Check, before a long run, that the hub accepts uploads under this name.

    Raises:
        UserError: it is not a repository name, or nobody is logged in.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise StorageError(f"`push_to_hub={repo}`: {hub_reason(error)}") from None
    if "/" not in repo:
        raise InvalidArgumentError(
            f"`push_to_hub={repo}`: expected OWNER/NAME, such as my-lab/llava-med-mgll"
        )
    if get_token() is None:
        raise StorageError("`push_to_hub`: nobody is logged in: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a finished checkpoint in one commit.

    Args:
        folder: The checkpoint.
        repo: ``owner/name``; created if it does not exist.
        private: Whether to create it as private.

    Returns:
        The URL of the commit.

    Raises:
        UserError: the hub cannot be reached, or rejects it.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {folder.name}")
    except hub_errors() as error:
        raise StorageError(
            f"{folder} is complete, but could not be pushed to {repo} ({hub_reason(error)}): after fixing "
            "this, run "
            f"`hf upload {repo} {folder}`"
        ) from None
    return str(commit.commit_url)
