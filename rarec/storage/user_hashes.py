"""What stands for a user in files that others read: a hash under a key that is kept beside them."""

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

KEY = "user.key"
"""Name of the file with the key. Without it, nobody can tell who the users are."""


def read_key(folder: Path, *, create: bool = False) -> bytes:
    """Return the key of a folder.

    Args:
        folder: of the files.
        create: make one if there is none, readable by its owner alone.

    Raises:
        OSError: it cannot be read, or not be made.
    """
    file = folder / KEY
    if create:
        with suppress(FileExistsError):
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w") as new:
                new.write(secrets.token_hex(32))
    return file.read_bytes()


def hash_user(key: bytes, user: str) -> str:
    """Return what stands for a user."""
    return hmac.new(key, user.encode(), hashlib.sha256).hexdigest()[:32]
