"""Forms of a bundle for other engines."""

from pathlib import Path


def rarec_client_path() -> Path:
    """Return the stand-alone client, which is copied beside the graphs."""
    return Path(__file__).with_name("rarec_client.py")
