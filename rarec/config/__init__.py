"""One typed, strict run configuration: YAML in, overrides `a.b=c`, resolved copy out. Knows no torch."""

from rarec.config.load import dump_config, load_config
from rarec.config.schema import RunConfig
from rarec.config.variants import COMPARING, VARIANTS, Variant, VariantName

__all__ = ["COMPARING", "VARIANTS", "RunConfig", "Variant", "VariantName", "dump_config", "load_config"]
