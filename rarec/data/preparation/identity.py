"""What makes a prepared dataset what it is: the settings that shape it, and the hashes of its tables."""

from typing import Any

from rarec.artefacts import sha256_json
from rarec.config.identity import prepare_settings
from rarec.config.load import without_password
from rarec.config.logs import Prepare
from rarec.data.engines import Named
from rarec.data.engines.files import digest
from rarec.data.preparation.inputs import place_of


def identity(config: Prepare, seed: int) -> tuple[dict[str, Any], dict[str, str]]:
    """What a prepared dataset is made by and from: settings, and hashes of the log and of the catalogue.

    A table of an engine is known by its name and its engine alone: `--fresh` makes it again when its rows have changed.

    Raises:
        UserError: the files are not there.
    """
    hashes = {}
    for name in ("interactions", "items"):
        place = place_of(getattr(config, name), f"prepare.{name}")
        if isinstance(place, Named):
            hashes[name] = sha256_json([without_password(config.engine), place.name])
        else:
            hashes[name] = digest(place)
    return prepare_settings(config, seed), hashes
