"""The content of a run's shards: selected samples with prompts and text-only states, and the files beside the tars.

`rarec shards --verify` compares the files with their manifest, `--deep` every sample with the dataset; `--repair`
builds what is damaged anew.

Shape letters: S samples, B samples of a shard, N items, L stored blocks, D hidden size.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.data.selection import select_samples
from rarec.data.shards.files import ShardDataset, Tars, open_index
from rarec.data.shards.samples import REPAIR, Sample, fold_of, sample_key
from rarec.data.shards.writing import damaged_files, describe_shards, keep_intact_tars, write_shards, wrong_samples
from rarec.data.tables import map_npy
from rarec.errors import UserError
from rarec.models.build import stored_blocks
from rarec.models.encode import STATES_AT_A_TIME, Split, text_states
from rarec.prompts import Encoded
from rarec.stages.run import Run
from rarec.storage.artefacts import PROGRESS, Manifest, write_manifest
from rarec.storage.directories import claim, drop_listed
from rarec.storage.files import atomic_write, write_json

ITEM_STATES = "item_states.npy"
TARGET_COUNTS = "target_counts.npy"
"""Number of selected samples with each item as target, (N,): the item's chance to be drawn into a batch."""
SELECTION = "selection.json"
_MAX_THREADS = 8


class ShardContent:
    """Makes the samples of a run's shards, and the files beside the tars.

    Args:
        run: the run.

    Attributes:
        selection: the selected samples.
        total: their number.
        folds: the number of parts of the users.
        cut_S: for each, whether its prompt was cut; -1 if it was not made in this process.

    Raises:
        UserError: the selection has something other than training interactions.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        config = run.config
        self.folds = len(config.ids.for_samples)
        self.selection = select_samples(run.dataset, config.shards, config.run.seed, config.ids.held_out, self.folds)
        users, positions = self.selection.user_rows, self.selection.positions
        self.total = len(users)
        self.cut_S = np.full(self.total, -1, np.int8)
        leaks = np.flatnonzero((positions < 1) | (positions >= run.dataset.train_length_U[users]))
        if len(leaks):
            leak = sample_key(int(users[leaks[0]]), int(positions[leaks[0]]))
            problem = f"the selected sample {leak} is no training interaction with a history: validation or test leaks"
            raise UserError(problem, "this is a defect of rarec: please report it, with the configuration")

    @cached_property
    def blocks(self) -> list[int]:
        """The blocks whose states are stored; see `stored_blocks`."""
        return stored_blocks(self.run.config, len(self.run.llm.backbone.blocks))

    @property
    def places(self) -> list[range]:
        """The places of each tar's samples in the selection, all of one part of the users."""
        folds_S = fold_of(self.selection.user_rows, self.folds)
        edges = np.searchsorted(folds_S, np.arange(self.folds + 1)).tolist()
        size = self.run.config.shards.samples_per_shard
        return [range(at, min(at + size, stop)) for start, stop in pairwise(edges) for at in range(start, stop, size)]

    @property
    def sidecars(self) -> dict[str, Callable[[], Any]]:
        """For each file beside the tars and their index, a function that computes it: an array, or JSON."""
        return {
            ITEM_STATES: self._item_states,
            TARGET_COUNTS: self._target_counts,
            SELECTION: lambda: self.selection.report,
        }

    def write(
        self, directory: Path, identity: str, names: Iterable[str]
    ) -> tuple[dict[str, Any], dict[str, str | None]]:
        """Write these of the files beside the tars, then the missing tars and the index.

        Args:
            directory: directory of the shards.
            identity: see `write_shards`.
            names: of the files beside the tars.

        Returns:
            What the manifest says of all: see `describe_shards`.
        """
        run = self.run
        with run.engine.serving(run.llm.backbone):  # on the ranks' device: another one rounds differently
            for name in names:
                self._write_sidecar(directory / name)
            writers = run.config.shards.writers
            records = write_shards(directory, self.places, writers, self.samples, identity, run.world)
        return describe_shards(records, self.sidecars)

    def _write_sidecar(self, path: Path) -> None:
        """Compute a file beside the tars on all ranks, and write it on the main one: an array, or JSON."""
        self.run.world.report(f"making {path.name}")
        made = self.sidecars[path.name]()
        write = write_json if path.suffix == ".json" else _write_npy
        self.run.world.run_on_main(lambda: write(path, made))

    def samples(self, places: range) -> Iterator[Sample]:
        """Yield the samples at these places of the selection, all of one part of the users."""
        run, dataset = self.run, self.run.dataset
        users = self.selection.user_rows[places.start : places.stop]
        positions = self.selection.positions[places.start : places.stop]
        histories = [dataset.history(int(user), int(position)) for user, position in zip(users, positions, strict=True)]
        prompts = [run.prompts.user(history) for history in histories]
        self.cut_S[places.start : places.stop] = [prompt.cut for prompt in prompts]
        states_BLD = self._states(prompts, run.world.in_lockstep)
        sources = run.sample_sources[fold_of(int(users[0]), self.folds)]
        vectors = {name: source.user_vectors(users, histories) for name, source in sources.items()}
        for row, (user, position) in enumerate(zip(users.tolist(), positions.tolist(), strict=True)):
            target = int(dataset.sequence(user)[position])
            own = {name: array[row] for name, array in vectors.items()}
            history_H = histories[row].astype(np.int32)
            prompt = prompts[row]
            yield Sample(user, position, target, history_H, prompt.tokens_T, prompt.marks, states_BLD[row], own)

    def cut_users(self) -> int:
        """Return the number of samples whose prompt was cut; prompts that an earlier process made are made again."""
        cut_S = self.run.world.all_reduce_max_(self.cut_S)
        for place in np.flatnonzero(cut_S < 0):
            user, position = int(self.selection.user_rows[place]), int(self.selection.positions[place])
            cut_S[place] = self.run.prompts.user(self.run.dataset.history(user, position)).cut
        return int(cut_S.sum())

    def _target_counts(self) -> npt.NDArray[np.int64]:
        """Return the number of selected samples with each item as target, (N,)."""
        targets_S = self.run.dataset.items_at(self.selection.user_rows, self.selection.positions)
        return np.bincount(targets_S, minlength=self.run.dataset.n_items)

    def _item_states(self) -> npt.NDArray[np.floating]:
        """Return the states of the catalogue, (N, L, D), some items at a time."""
        run, n_items = self.run, self.run.dataset.n_items
        shape = (n_items, len(self.blocks), run.llm.backbone.hidden_size)
        states_NLD = run.scratch.zeros(shape, run.config.shards.state_dtype)
        for start in range(0, n_items, STATES_AT_A_TIME):
            part = slice(start, start + STATES_AT_A_TIME)
            prompts = [run.prompts.item(row) for row in range(n_items)[part]]
            states_NLD[part] = run.world.all_reduce_sum_(self._states(prompts, run.world.split_in_lockstep))
        return states_NLD

    def _states(self, prompts: list[Encoded], split: Split) -> npt.NDArray[np.floating]:
        llm, dtype = self.run.llm, self.run.config.shards.state_dtype
        return text_states(llm.backbone, prompts, self.blocks, llm.tokenizer.filler, dtype=dtype, split=split)


def _write_npy(path: Path, array: npt.NDArray[Any]) -> None:
    with atomic_write(path) as file:
        np.save(file, array, allow_pickle=False)


def verify(run: Run, repair: bool = False, deep: bool = False) -> str:
    """Check `shards/` and, on request, rebuild damaged files.

    Args:
        run: the run.
        repair: rebuild damaged files.
        deep: if every hash is right, compare every sample with the dataset as well.

    Returns:
        A summary for the user.

    Raises:
        UserError: a file is damaged (one line per file) and `repair` is off, or repair is impossible: the manifest is
            missing or damaged, or the shards were made with other settings or from another dataset.
    """
    remote = run.config.train.stream.remote
    if remote is not None:
        raise UserError(
            f"the tars are at {remote}", "verify them on the machine that made them; fetched tars are always verified"
        )
    directory = run.directory("shards")
    manifest = run.stage("shards").require()
    content = ShardContent(run)
    problems = damaged_files(directory, manifest, min(_MAX_THREADS, os.cpu_count() or 1))
    if deep and not problems:
        states_NLD = map_npy(directory / ITEM_STATES, REPAIR)
        samples = ShardDataset(open_index(directory, manifest), Tars(directory))
        problems = wrong_samples(samples, run.dataset, content.selection, states_NLD)
    if not problems:
        size = sum((directory / name).stat().st_size for name in manifest["files"])
        checked = "all files unchanged" + (", all samples match the dataset" if deep else "")
        return f"{len(manifest['shards'])} shards, {manifest['samples']} samples, {size} bytes: {checked}"
    report = [f"{directory} is damaged:", *(f"  {line}" for line in problems.values())]
    if not repair:
        raise UserError(report, REPAIR)
    run.say("\n".join(report))
    return _repair(content, manifest, list(problems))


def _repair(content: ShardContent, manifest: Manifest, damaged: list[str]) -> str:
    """Rebuild the damaged files; return which, and whether they are the same as before."""
    run = content.run
    directory = run.directory("shards")
    old = manifest["files"]
    foreign = [name for name in damaged if name not in old]
    if foreign:
        raise UserError(f"{directory / foreign[0]} is not one of the shards' files", "move it away, and repair again")
    run.stage("shards").require(outside=True)
    notes = [f"{PROGRESS}/"]
    claim(directory, notes)
    keep_intact_tars(directory, manifest, damaged)
    sidecars = [name for name in content.sidecars if name in damaged]
    figures, files = content.write(directory, manifest["hash"], sidecars)
    drop_listed(directory, notes)
    kept = {name: manifest[name] for name in ("settings", "made_from", "state_blocks", "cut_prompts")}
    new = write_manifest(directory, "shards", files=files, **kept, **figures)["files"]
    changed = sorted(name for name in new if new[name] != old.get(name))
    done = f"rebuilt: {', '.join(damaged)}"
    if not changed:
        return f"{done}; every file matches the manifest again"
    return (
        f"{done}\ndifferent from before (another machine rounds differently): {', '.join(changed)}\n"
        "the manifest was updated; training from the old shards will be refused"
    )
