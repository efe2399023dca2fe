"""`--to hub`: the layout of a model hub's repository, and its upload."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from rarec.bundle.bundle import Bundle
from rarec.errors import UserError
from rarec.storage.artefacts import MANIFEST
from rarec.storage.directories import new_directory


def write_repository(bundle: Bundle, directory: Path) -> None:
    """Copy a bundle's files, whose card a hub reads; the copy is checked as any bundle that is opened."""
    with new_directory(directory) as temporary:
        for name in (*bundle.manifest["files"], MANIFEST):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.directory / name, temporary / name)
        Bundle.open(temporary, bundle.trusted)


def upload(directory: Path, repository: str, api: Any = None) -> str:
    """Upload a repository's files; return its address.

    Args:
        directory: as `write_repository` has made it.
        repository: `NAME/REPOSITORY`.
        api: of the hub; by default with the token that `hf auth login` has saved.

    Raises:
        UserError: the hub refuses, or cannot be reached; the folder stays.
    """
    api = api or HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(directory), ignore_patterns=[".*"])
    except Exception as error:  # the hub refuses, its client does, or the network
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        remedy = "log in with hf auth login, check the name, and give --push again with another --out"
        raise UserError(f"--push {repository}: {first[:200]}", remedy) from None
    return str(address)
