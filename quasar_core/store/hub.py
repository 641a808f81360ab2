"""Download models from the Hugging Face hub, and upload verifiers; every failure becomes one sentence.

Only safetensors, configs and tokenizers are downloaded.
"""

import errno
import re
from pathlib import Path

from quasar_core.errors import QuasarError, UsageError
from quasar_core.files import is_file
from quasar_core.foreign_bars import hidden_bars
from quasar_core.store.folders import CARD, is_verifier, own_files

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
# Subfolders and `consolidated` files hold the same weights again in another layout.
_UNWANTED = ["*/*", "consolidated*", "LICENSE*", "USE_POLICY*", "README*"]


def download_model(hub_id: str, typed: str | None = None) -> Path:
    """The folder of hub model `hub_id` in the hub client's cache, downloaded if need be.

    Without a connection, a model that was downloaded before is found in the cache. QuasarError otherwise; where no such
    model is found, it says too that no folder has the name that was typed, which may have meant one.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # what the client raises differs between its versions and shares no base class
        unknown = (errors.RepositoryNotFoundError, errors.LocalEntryNotFoundError, errors.HFValidationError)
        is_known = isinstance(error, errors.GatedRepoError) or not isinstance(error, (*unknown, ConnectionError))
        no_folder = "" if is_known else f"There is no folder {typed or hub_id} here. "
        raise QuasarError(f"{no_folder}{hub_failure(hub_id, error)}") from error
    if not is_file(folder / "config.json"):
        raise QuasarError(f"{hub_id} on the hub holds no model: it has no config.json.")
    if not any(folder.glob("*.safetensors")):
        raise QuasarError(f"{hub_id} on the hub has no safetensors weights; pickled weights are never loaded.")
    return folder


def hub_failure(hub_id: str, error: Exception) -> str:
    """One sentence for whatever the hub client raised about the model or dataset `hub_id`."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"{hub_id} is gated on the hub: accept its terms there, then log in with `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"The hub has no {hub_id}, or it is private: check the name, or log in with `hf auth login`."
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"{hub_id} on the hub lacks a file that is needed here."
    if isinstance(error, errors.HFValidationError):
        return f"{hub_id} is not a hub id."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full: {hub_id} could not be downloaded whole."
    if isinstance(error, PermissionError):
        return f"{hub_id} could not be downloaded: {error.filename} cannot be written."
    if isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError)):
        return f"{hub_id} is not in the hub's cache here, and the hub cannot be reached: check the connection."
    what = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{hub_id} could not be downloaded ({type(error).__name__}: {what})."


_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")  # without an owner it is one's own


def check_can_push(repository: str) -> None:
    """Refuse, before hours of work, what cannot be pushed to: a name that is none, or nobody logged in."""
    from huggingface_hub import HfApi, get_token

    if not _HUB_ID.fullmatch(repository):
        raise UsageError(f"{repository} is not a hub id, such as my-name/Qwen3-8B-gptq-4bit-g128.")
    if get_token() is None:
        raise UsageError("Nobody is logged in to the hub here: run `hf auth login`, or set HF_TOKEN.")
    try:
        HfApi().whoami()
    except Exception as error:  # what the client raises differs between its versions and shares no base class
        raise QuasarError(push_failure(repository, error)) from error


def push_folder(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a verifier's folder as one model and return its address; the repository is made if need be.

    A repository that is there keeps its visibility; a new one is public unless `private` (or its organisation says so).
    The verifier's own files replace those of the same name, and nothing else is uploaded or touched. UsageError for a
    folder that quasar did not write; QuasarError where the hub or the connection refuses.
    """
    from huggingface_hub import HfApi

    if not is_verifier(folder):
        raise UsageError(f"{folder} was not written by quasar (it has no {CARD} of its own), so it is not pushed.")
    check_can_push(repository)
    try:
        with hidden_bars():
            api = HfApi(library_name="quasar-cli")
            created = api.create_repo(repository, private=private or None, exist_ok=True)
            api.upload_folder(
                repo_id=created.repo_id,
                folder_path=folder,
                commit_message=f"Upload {folder.name}",
                allow_patterns=own_files(folder),
            )
    except Exception as error:  # as above
        raise QuasarError(push_failure(repository, error)) from error
    return str(created)


def push_failure(repository: str, error: Exception) -> str:
    """One sentence for whatever the hub client raised while uploading."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "The hub does not know this token: log in again with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"This account may not write to {repository} on the hub: check the name, and the token's rights."
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return f"{repository} could not be uploaded: {error.filename} cannot be read."
    if isinstance(error, errors.HFValidationError):
        return f"{repository} is not a hub id."
    connection = (ConnectionError, TimeoutError, errors.OfflineModeIsEnabled)
    if isinstance(error, connection) or type(error).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout"):
        return f"{repository} could not be uploaded: the hub cannot be reached; check the connection."
    what = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{repository} could not be uploaded ({type(error).__name__}: {what})."
