"""The stages of a run, in their order. A stage is added by one class, and one line here."""

from rarec.stages.data import IdsStage, NeighboursStage, PrepareStage, ShardsStage
from rarec.stages.export import ExportStage
from rarec.stages.results import EvaluateStage, ReportStage
from rarec.stages.stage import STAGES, Stage
from rarec.stages.train import TrainStage

__all__ = ["STAGES", "Stage"]

_ORDER = (PrepareStage, IdsStage, NeighboursStage, ShardsStage, TrainStage, EvaluateStage, ExportStage, ReportStage)
STAGES |= {stage.name: stage for stage in _ORDER}
