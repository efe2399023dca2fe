"""What the scripts in `launch/` share: the arguments of a stage that `accelerate launch` starts."""

import argparse

from rarec.cli import guarded, run_stage


def start(stage: str) -> None:
    """Parse `--config CONFIG [--fresh] [section.field=value ...]` and run the stage."""
    parser = argparse.ArgumentParser(description=f"Run the stage `{stage}`.")
    parser.add_argument("--config", required=True, help="run configuration, YAML")
    parser.add_argument("--fresh", action="store_true", help="make it again, replacing what was made before")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    guarded(lambda: run_stage(stage, arguments.config, arguments.overrides, arguments.fresh))
