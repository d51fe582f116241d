"""To the hub and from it: no more is downloaded than is read, and a model appears there whole, in one commit."""

from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from mgll_encoder.common.errors import UserError
from mllm_adapters.checkpoint import WEIGHTS
from mllm_adapters.locate import DUPLICATES, UNUSED, cached

_ERRORS = (HfHubHTTPError, HTTPError, HFValidationError, LocalEntryNotFoundError, OSError)


def fetch(hub_id: str) -> Path:
    """The folder of a published model, from the Hugging Face cache or, where that lacks something, downloaded.

    Of weights that are there twice only the safetensors are downloaded, and none of other frameworks.

    Raises:
        UserError: it cannot be downloaded.
    """
    if (folder := cached(hub_id)) is not None:
        return folder
    try:
        names = [file.rfilename for file in HfApi().model_info(hub_id).siblings or ()]
        twice = any(name in names for name in WEIGHTS if "safetensors" in name)
        skipped = [*UNUSED, *(DUPLICATES if twice else ())]
        return Path(snapshot_download(hub_id, ignore_patterns=skipped))
    except _ERRORS as error:
        raise UserError(
            f"'{hub_id}' is no folder here, is not in the Hugging Face cache, and cannot be downloaded "
            f"({_reason(error)}): pass the folder of a downloaded checkpoint"
        ) from None


def check_push(repo: str) -> None:
    """See to it, before hours are spent, that something can be pushed under this name.

    Raises:
        UserError: it is no name of a repository, or nobody is logged in.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}: {_reason(error)}") from None
    if "/" not in repo:
        raise UserError(f"--push-to-hub {repo}: expected OWNER/NAME, such as my-lab/llava-med-mgll")
    if get_token() is None:
        raise UserError("--push-to-hub: nobody is logged in: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a finished checkpoint in one commit.

    Args:
        folder: The checkpoint.
        repo: ``owner/name``; made if it is not there.
        private: Whether it is made private.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub cannot be reached, or does not accept it.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {folder.name}")
    except _ERRORS as error:
        raise UserError(
            f"{folder} is complete, but could not be pushed to {repo} ({_reason(error)}): once that is mended, "
            f"`hf upload {repo} {folder}`"
        ) from None
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:160]
