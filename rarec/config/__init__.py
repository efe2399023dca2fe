"""One typed, strict run configuration: YAML in, overrides `a.b=c`, resolved copy out. Knows no torch."""

from rarec.config.arms import ARMS, COMPARING, Arm, ArmName
from rarec.config.load import dump_config, load_config
from rarec.config.schema import RunConfig

__all__ = ["ARMS", "COMPARING", "Arm", "ArmName", "RunConfig", "dump_config", "load_config"]
