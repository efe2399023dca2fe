"""One typed, strict run configuration: YAML in, overrides `a.b=c`, resolved copy out. Knows no torch."""

from rarec.config.load import dump_config, load_config
from rarec.config.method import VARIANTS, Variant
from rarec.config.schema import MODEL_SECTIONS, RunConfig

__all__ = ["MODEL_SECTIONS", "VARIANTS", "RunConfig", "Variant", "dump_config", "load_config"]
