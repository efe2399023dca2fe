"""The stages of a run, in their order. A stage is added by one file, and one line here."""

from rarec.stages.evaluate import EvaluateStage
from rarec.stages.export import ExportStage
from rarec.stages.ids import IdsStage
from rarec.stages.neighbours import NeighboursStage
from rarec.stages.prepare import PrepareStage
from rarec.stages.report import ReportStage
from rarec.stages.shards import ShardsStage
from rarec.stages.stage import STAGES, Stage
from rarec.stages.train import TrainStage

__all__ = ["STAGES", "Stage"]

_ORDER = (PrepareStage, IdsStage, NeighboursStage, ShardsStage, TrainStage, EvaluateStage, ExportStage, ReportStage)
STAGES |= {stage.name: stage for stage in _ORDER}
