"""Models from the Hugging Face hub: safetensors, configs and tokenizers only, and every failure as one sentence."""

import errno
from pathlib import Path

from quasar_core.errors import QuasarError
from quasar_core.files import is_file

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
# Subfolders and `consolidated` files hold the same weights again in another layout.
_UNWANTED = ["*/*", "consolidated*", "LICENSE*", "USE_POLICY*", "README*"]


def download_model(hub_id: str) -> Path:
    """The folder of hub model `hub_id` in the hub client's cache, downloaded if need be.

    Without a connection, a model that was downloaded before is found in the cache. QuasarError otherwise.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # what the client raises differs between its versions and shares no base class
        raise QuasarError(hub_failure(hub_id, error)) from error
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
