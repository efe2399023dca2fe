"""Checkpoint directories: written whole, checked by hash, free of pickle. ID models and variants both use them.

A checkpoint is a directory `step-00000040` with tensors in safetensors, `state.json` with the loop's state, and a
manifest with the sha256 of every file and the hash of the training that it belongs to.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarec.errors import UserError
from rarec.storage.artefacts import check_files, read_manifest, write_manifest
from rarec.storage.directories import discard, new_directory
from rarec.storage.files import read_json, remove_stale, write_json

KIND = "checkpoint"
STATE = "state.json"
_PREFIX = "step-"
_NAME = re.compile(rf"{_PREFIX}(\d{{8,18}})", re.ASCII)
Say = Callable[[str], None]


class CorruptCheckpoint(UserError):
    """A checkpoint with a missing or altered file."""


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one training.

    Attributes:
        directory: holds one directory per checkpoint.
        keep: number of newest checkpoints to keep, beside the best.
        belongs_to: hash of the training's settings and inputs.
    """

    directory: Path
    keep: int
    belongs_to: str

    def path(self, step: int) -> Path:
        """Return the directory of the checkpoint after `step` steps."""
        return self.directory / f"{_PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, oldest first; each was whole when it was written."""
        named = (_NAME.fullmatch(path.name) for path in self.directory.glob(f"{_PREFIX}*"))
        return sorted(int(match[1]) for match in named if match)

    @contextmanager
    def writing(self, step: int, state: Mapping[str, Any], best: int | None = None) -> Iterator[Path]:
        """Yield a directory for the tensors; then write the rest, fsync, rename, and delete checkpoints to drop.

        Args:
            step: of the checkpoint.
            state: of the loop, as plain JSON values.
            best: a step whose checkpoint is kept however old it is.
        """
        with new_directory(self.path(step)) as temporary:
            yield temporary
            write_json(temporary / STATE, dict(state))
            write_manifest(temporary, KIND, settings={}, made_from={"train": self.belongs_to})
        kept = {*self.steps()[-self.keep :], best}
        for other in self.steps():
            if other not in kept:
                discard(self.path(other))

    def newest(self, say: Say) -> int | None:
        """Return the step of the newest checkpoint from which the training ends as if nothing had happened.

        Corrupt ones, and those whose best is lost, are reported and, if rarec made all in them, deleted. If none can be
        used, none is deleted: training never restarts silently. Only one process may call this.

        Returns:
            The step, or None where there is no checkpoint at all.

        Raises:
            UserError: there are checkpoints, but none can be used; or one belongs to another training.
        """
        remove_stale(self.directory)
        lost = self._lost()
        usable = [step for step in self.steps() if step not in lost]
        if lost and not usable:
            problem = f"{next(iter(lost.values()))}; no other checkpoint can be used either"
            remedy = f"move {self.directory} away, and run the same command: it trains from the beginning"
            raise UserError(problem, remedy)
        for step, problem in sorted(lost.items()):
            say(f"{problem}: not used, resuming from {self.path(usable[-1]).name}")
            discard(self.path(step))
        return max(usable, default=None)

    def _lost(self) -> dict[int, str]:
        """Return what is wrong with each checkpoint that cannot be used."""
        lost: dict[int, str] = {}
        for step in self.steps():
            try:
                self.verify(step)
            except CorruptCheckpoint as error:
                lost[step] = error.problem
        last_corrupt = max(lost, default=0)
        whole = set(self.steps()) - set(lost)
        for step in sorted(whole):
            best = self.read_state(step).get("best_step")
            replaced = best not in lost and step < last_corrupt  # by a better one, which was kept in its stead
            if best is not None and best not in whole and not replaced:
                lost[step] = f"{self.path(step)} needs {self.path(best).name}, the best, which is corrupt or missing"
        return lost

    def verify(self, step: int) -> None:
        """Check every file of a checkpoint against its manifest, and that it belongs to this training.

        Raises:
            CorruptCheckpoint: a file is missing or altered.
            UserError: it belongs to another training: other data, another model, or other settings.
        """
        directory = self.path(step)
        try:
            manifest = read_manifest(directory, KIND)
            check_files(directory, manifest)
        except UserError as error:
            raise CorruptCheckpoint(error.problem, f"move {directory} away to use the checkpoint before it") from None
        if manifest["made_from"].get("train") != self.belongs_to:
            problem = f"{directory} belongs to another training: other data, another model, or other settings"
            raise UserError(problem, f"move it away; {self.directory} holds only checkpoints of this training")

    def read_state(self, step: int) -> dict[str, Any]:
        """Read the state of the loop."""
        state: dict[str, Any] = read_json(self.path(step) / STATE)
        return state
