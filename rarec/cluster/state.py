"""The progress of a sweep's runs, from manifests alone: it takes milliseconds, loads no model and hashes no file.

The stages look closer when they are run: at the contents of logs, of imported vectors and of the language model.
"""

from collections.abc import Sequence
from typing import Literal

from rarec.cluster.definition import SweepRun
from rarec.config import RunConfig
from rarec.config.load import read_tree
from rarec.errors import UserError
from rarec.stages.run import Run
from rarec.stages.shards import LLM

State = Literal["done", "begun", "to do"]


def state_of(run: SweepRun, stages: Sequence[str]) -> tuple[State, str]:
    """Return whether a run is done, and the stage it has reached: the last of these, or the first that is not done."""
    stage = first_to_do(run.config, stages)
    if stage is None:
        return "done", stages[-1]
    return ("begun" if Run(run.config).config_file.exists() else "to do"), stage


def first_to_do(config: RunConfig, stages: Sequence[str]) -> str | None:
    """Return the first of these stages that is not finished as the configuration says; None if all are."""
    run = Run(config)
    for name in stages:
        if name == "train" and not _same_llm(run):
            return name
        if not all(stage.is_done() for stage in run.stages(name)):
            return name
    return None


def _same_llm(run: Run) -> bool:
    """Return whether the run's resolved configuration names the same language model; its weights are not compared."""
    try:
        recorded = read_tree(run.config_file).get("llm")
    except UserError:
        return False
    wanted = run.config.llm.model_dump(mode="json", include=set(LLM))
    return isinstance(recorded, dict) and all(recorded.get(name) == value for name, value in wanted.items())
