"""`rarec report`: one HTML file from what the run left."""

from pathlib import Path
from typing import Any

from rarec.config import dump_config
from rarec.report.run_files import RunDirectories
from rarec.stages.run import Run
from rarec.stages.stage import Built, Stage
from rarec.storage.artefacts import MANIFEST, check_files, read_manifest
from rarec.version import source


class ReportStage(Stage):
    """`report.html`: figures, intervals, a verdict in words, plots. It needs no other file and no network."""

    name = "report"
    summary = "Write one HTML file of all results."
    cheap = True

    def settings(self) -> dict[str, Any]:
        """See `Stage`: the whole configuration, which the report shows, and the version that writes it."""
        config = self.run.config
        return {"version": source()["version"], "main": config.main_variant.name, "config": dump_config(config)}

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`: the evaluation, and the variants whose curves are shown."""
        return {"evaluate": self.run.stage("evaluate"), **{stage.part: stage for stage in self.run.stages("train")}}

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        self.run.world.run_on_main(lambda: self._write(directory))
        self.run.say(f"report: {self.directory / 'report.html'}")
        return Built()

    def _write(self, directory: Path) -> None:
        from rarec.report.html import write_report

        run = self.run
        run.stage("evaluate").checked()
        for stage, files in (("prepare", []), ("shards", ["selection.json"])):  # which may be elsewhere by now
            place = run.directory(stage)
            if (place / MANIFEST).exists():
                check_files(place, read_manifest(place, stage), names=files)
        write_report(directory, directories(run), run.config, say=run.say)


def directories(run: Run) -> RunDirectories:
    """Return where a run has the files that its report and the terminal show."""
    training = {stage.part: stage.directory for stage in run.stages("train")}
    return RunDirectories(run.directory("evaluate"), run.directory("prepare"), run.directory("shards"), training)
