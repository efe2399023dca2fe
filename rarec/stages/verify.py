"""`rarec shards --verify`: are they what was written, and what the dataset says? `--repair` makes the others again."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rarec.artefacts import check_made_from, check_settings, read_manifest
from rarec.data.shards.index import FRESH, INDEX, REMAKE, is_tar_name, map_npy
from rarec.data.shards.members import finite
from rarec.data.shards.tar_check import Problem
from rarec.data.shards.verify import verify_shards
from rarec.data.shards.writing import finish_shards, repair_shards
from rarec.errors import UserError
from rarec.files import read_json
from rarec.stages.run import Run
from rarec.stages.shard_content import (
    ITEM_STATES,
    SELECTION,
    TARGET_COUNTS,
    ShardContent,
    sample_form,
    write_sidecar,
)

MOST_THREADS = 8
_ROWS = 4096
"""Item states looked at together."""


def verify(run: Run, repair: bool = False, deep: bool = False) -> str:
    """Check `shards/` and, if asked to, make again what is broken; returns what was done.

    Args:
        run: the run.
        repair: make again what is broken.
        deep: look into every sample, not only where a hash differs.

    Raises:
        UserError: something is broken (one line a file) and is not to be repaired, or cannot be: the manifest is
            missing or garbled, or the shards were made by other settings or from another dataset.
    """
    remote = run.config.train.stream.remote
    if remote is not None:
        raise UserError(f"the tars lie at {remote}", "verify them where they were made; what is fetched is verified")
    directory, manifest, parts = run.directory("shards"), _manifest(run), ShardContent(run)
    began = time.monotonic()
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    beside = {problem.file: problem for problem in _sidecar_problems(parts, directory, manifest)}
    sound = ITEM_STATES not in beside
    states = map_npy(directory / ITEM_STATES).shape[1:] if sound else (len(manifest["state_blocks"]),)
    problems = verify_shards(directory, manifest, parts.truth(sample_form(run, states)), threads, deep)
    known = {problem.file for problem in problems}
    problems += [beside[file] for file in beside.keys() - known]
    if not problems:
        return _summary(directory, manifest, time.monotonic() - began, deep)
    lines = "".join(f"\n  {problem.line}" for problem in problems)
    told = f"{directory} is not as it should be:{lines}"
    if not repair:
        raise UserError(told, REMAKE)
    run.say(told)
    return _repair(parts, manifest, {problem.file for problem in problems})


def _manifest(run: Run) -> dict[str, Any]:
    """The manifest of shards that the configuration and the dataset could have made."""
    directory = run.directory("shards")
    try:
        manifest = read_manifest(directory, "shards")
    except UserError as error:
        raise UserError(f"{error.problem}; without it nothing can be verified or repaired", FRESH) from None
    check_made_from(directory, manifest, {"prepare": run.dataset.hash})
    check_settings(directory, manifest, run.stage("shards").settings())
    beside = sorted(name for name in manifest["files"] if not name.endswith(".tar"))
    if beside != sorted([INDEX, ITEM_STATES, SELECTION, TARGET_COUNTS]):
        raise UserError(f"the manifest of {directory} names the files {', '.join(beside)} beside tars", FRESH)
    blocks, chosen = manifest.get("state_blocks"), run.config.shards.state_blocks
    if not isinstance(blocks, list) or blocks != (list(range(len(blocks))) if chosen is None else sorted(set(chosen))):
        raise UserError(f"the manifest of {directory}: `state_blocks` is {blocks}", FRESH)
    return manifest


def _sidecar_problems(parts: ShardContent, directory: Path, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong inside the files beside the tars, where their hashes tell nothing."""
    checks = {ITEM_STATES: _item_states, TARGET_COUNTS: _target_counts, SELECTION: _selection}
    for name, check in checks.items():
        try:
            what = check(parts, directory / name, manifest)
        except (UserError, OSError) as error:
            what = error.problem if isinstance(error, UserError) else str(error.strerror)
        if what:
            yield Problem(name, f"{name}: {what}")


def _item_states(parts: ShardContent, path: Path, manifest: Mapping[str, Any]) -> str | None:
    states_NLD, wanted = map_npy(path), parts.run.config.shards.state_dtype
    shape = (parts.run.dataset.n_items, len(manifest["state_blocks"]))
    if states_NLD.ndim != 3 or states_NLD.shape[:2] != shape or states_NLD.dtype != wanted:
        return f"{states_NLD.dtype} of shape {states_NLD.shape}, not {wanted} of {shape} and a width"
    for start in range(0, len(states_NLD), _ROWS):
        part_nLD = states_NLD[start : start + _ROWS]
        if not finite(part_nLD):
            row = start + int(np.flatnonzero(~np.isfinite(part_nLD).all((1, 2)))[0])
            return f"item row {row} holds NaN or infinity"
    return None


def _target_counts(parts: ShardContent, path: Path, manifest: Mapping[str, Any]) -> str | None:
    counts_N, wanted_N = map_npy(path), parts.target_counts_N
    same = counts_N.dtype == wanted_N.dtype and np.array_equal(counts_N, wanted_N)
    return None if same else "not the counts of the selected samples' targets"


def _selection(parts: ShardContent, path: Path, manifest: Mapping[str, Any]) -> str | None:
    same = read_json(path) == json.loads(json.dumps(parts.selection.report))
    return None if same else "not the report of the selection"


def _repair(parts: ShardContent, manifest: Mapping[str, Any], broken: set[str]) -> str:
    """Make the broken files again; returns which, and whether they came out as they were."""
    run, config = parts.run, parts.run.config.shards
    directory = run.directory("shards")
    foreign = sorted(name for name in broken - manifest["files"].keys() if not is_tar_name(name))
    if foreign:
        raise UserError(f"{directory / foreign[0]} is no part of the shards", "move it away, and repair again")
    run.stage("shards").require(outside=True)
    with run.engine.serving(run.llm.backbone):  # where they were made, not elsewhere: there it rounds otherwise
        for name in parts.sidecars.keys() & broken:
            write_sidecar(directory / name, parts.sidecars[name]())
        size, samples = config.samples_per_shard, parts.samples
        records = repair_shards(directory, manifest, broken, parts.total, size, samples, run.say, config.writers)
    kept = {"state_blocks": parts.blocks, "cut_prompts": manifest.get("cut_prompts")}
    new = finish_shards(directory, records, manifest["settings"], manifest["made_from"], parts.sidecars, **kept)
    return _told(manifest["files"], new["files"], broken)


def _told(old: Mapping[str, str], new: Mapping[str, str], broken: set[str]) -> str:
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    done = f"made again: {', '.join(sorted(broken & new.keys()))}"
    gone = sorted(broken - new.keys())
    done += f"; dropped: {', '.join(gone)}" if gone else ""
    if not changed:
        return f"{done}; every file is again what the manifest names"
    return (
        f"{done}\nnot what the manifest named (another machine rounds otherwise): {', '.join(changed)}\n"
        "the manifest is written anew; what was trained from the old shards will be refused"
    )


def _summary(directory: Path, manifest: Mapping[str, Any], seconds: float, deep: bool) -> str:
    size = sum((directory / name).stat().st_size for name in manifest["files"])
    counts = f"{len(manifest['shards'])} shards, {manifest['samples']} samples, {size} bytes"
    found = "all as written" + (", and every sample as the dataset says" if deep else "")
    return f"{counts}: {found} ({size / 1e6 / seconds:.0f} MB/s)"
