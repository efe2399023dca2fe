"""`rarec report`: one HTML file from what the run left."""

from pathlib import Path
from typing import Any

from rarec.config import dump_config
from rarec.stages.stage import Built, Stage
from rarec.version import source


class ReportStage(Stage):
    """`report.html`: figures, intervals, a verdict in words, plots. It needs no other file and no network."""

    name = "report"
    summary = "Write one HTML file of everything that was found."
    cheap = True

    def settings(self) -> dict[str, Any]:
        """See `Stage`: the whole configuration, which the report shows, and the version that writes it."""
        config = self.run.config
        return {"version": source()["version"], "main": config.main_variant.name, "config": dump_config(config)}

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`."""
        return {"evaluate": self.run.stage("evaluate")}

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        from rarec.evaluation.record import RunDirectories
        from rarec.evaluation.report import write_report

        run = self.run
        run.stage("evaluate").check_files()
        training = {stage.part: stage.directory for stage in run.stages("train")}
        directories = RunDirectories(
            run.directory("evaluate"), run.directory("prepare"), run.directory("shards"), training
        )
        write_report(directory, directories, run.config, say=run.say)
        run.say(f"report: {self.directory / 'report.html'}")
        return Built()
