"""Recipes on the Hub: a small repository with ``coat_config.json`` and a card. Data only: nothing of it is run."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..card import recipe_card


def fetch(
    repo_id: str,
    file: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local path of a repository's file, from the cache or fetched into it.

    Raises:
        OSError: Where there is no such repository, revision or file, or none of it can be reached; with the remedy.
        ValueError: For a name that no repository can have.
    """
    validate_repo_id(repo_id)
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(hf_hub_download(repo_id, file, revision=revision, token=token, local_files_only=local_files_only))
    except GatedRepoError as error:  # a RepositoryNotFoundError too
        reason = "is gated: ask for access on its page, and log in or pass token="
        raise OSError(f"{repo_id!r} on the Hub {reason}") from error
    except RepositoryNotFoundError as error:
        reason = "is no repository on the Hub that this token may read: check the name; for a private one log in with "
        raise OSError(f"{repo_id!r} {reason}`hf auth login`, or pass a token= that may read it") from error
    except RevisionNotFoundError as error:
        raise OSError(f"{repo_id!r} on the Hub has no revision {revision!r}: name a branch, tag or commit") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:  # the first is an EntryNotFoundError too
        reason = "is not in the local cache, and the Hub cannot be reached (or this is offline mode)"
        raise OSError(f"{file} of {repo_id!r}{at} {reason}: fetch it once with a connection") from error
    except EntryNotFoundError as error:
        raise OSError(f"{repo_id!r} on the Hub{at} has no {file}: it holds no recipe of hf_coat") from error
    except HfHubHTTPError as error:
        raise OSError(f"the Hub refused {file} of {repo_id!r}{at}: {error}") from error


def push_recipe(
    settings: dict[str, Any],
    file: str,
    repo_id: str,
    *,
    commit_message: str = "Upload recipe of hf_coat",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Put a recipe and its card into a repository, which is made if need be, in one commit.

    A card that is there already is replaced; other files are left alone.

    Returns:
        The address of the commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    files = {file: json.dumps(settings, indent=2) + "\n", "README.md": recipe_card(settings, repo_id)}
    operations = [CommitOperationAdd(name, text.encode()) for name, text in files.items()]
    return api.create_commit(
        repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
    ).commit_url
