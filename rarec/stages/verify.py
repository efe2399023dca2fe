"""`rarec shards --verify`: check shards against the manifest and the dataset; `--repair` rebuilds broken files."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rarec.data.columns import map_npy
from rarec.data.shards.checks import Problem, verify_shards
from rarec.data.shards.index import INDEX, REBUILD, REPAIR
from rarec.data.shards.tar_members import all_finite
from rarec.data.shards.writing import finish_shards, repair_shards
from rarec.errors import UserError
from rarec.stages.run import Run
from rarec.stages.shard_content import (
    ITEM_STATES,
    SELECTION,
    TARGET_COUNTS,
    ShardContent,
    sample_spec,
    write_sidecar,
)
from rarec.storage.artefacts import check_made_from, check_settings, read_manifest
from rarec.storage.files import read_json

MOST_THREADS = 8
_ROWS = 4096
"""Item states checked at a time."""


def verify(run: Run, repair: bool = False, deep: bool = False) -> str:
    """Check `shards/` and, on request, rebuild broken files.

    Args:
        run: the run.
        repair: rebuild broken files.
        deep: parse every sample, not only those with a wrong hash.

    Returns:
        A summary for the user.

    Raises:
        UserError: a file is broken (one line per file) and `repair` is off, or repair is impossible: the manifest is
            missing or malformed, or the shards were made with other settings or from another dataset.
    """
    remote = run.config.train.stream.remote
    if remote is not None:
        raise UserError(
            f"the tars are at {remote}", "verify them on the machine that made them; fetched tars are always verified"
        )
    directory, manifest, parts = run.directory("shards"), _manifest(run), ShardContent(run)
    began = time.monotonic()
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    beside = {problem.file: problem for problem in _sidecar_problems(parts, directory, manifest)}
    sound = ITEM_STATES not in beside
    states = map_npy(directory / ITEM_STATES, REPAIR).shape[1:] if sound else (len(manifest["state_blocks"]),)
    problems = verify_shards(directory, manifest, parts.expected(sample_spec(run, states)), threads, deep)
    known = {problem.file for problem in problems}
    problems += [beside[file] for file in beside.keys() - known]
    if not problems:
        return _summary(directory, manifest, time.monotonic() - began, deep)
    report = [f"{directory} is damaged:", *(f"  {problem.line}" for problem in problems)]
    if not repair:
        raise UserError(report, REPAIR)
    run.say("\n".join(report))
    return _repair(parts, manifest, {problem.file for problem in problems})


def _manifest(run: Run) -> dict[str, Any]:
    """Read the manifest, and check that this configuration and dataset could have produced it."""
    directory = run.directory("shards")
    try:
        manifest = read_manifest(directory, "shards")
    except UserError as error:
        raise UserError(f"{error.problem}; shards cannot be verified or repaired without it", REBUILD) from None
    check_made_from(directory, manifest, {"prepare": run.dataset.hash})
    check_settings(directory, manifest, run.stage("shards").settings())
    beside = sorted(name for name in manifest["files"] if not name.endswith(".tar"))
    known = sorted([INDEX, ITEM_STATES, SELECTION, TARGET_COUNTS])
    if beside != known:
        raise UserError(
            f"the manifest of {directory} lists {', '.join(beside)} besides tars, not {', '.join(known)}", REBUILD
        )
    blocks, chosen = manifest.get("state_blocks"), run.config.shards.state_blocks
    if not isinstance(blocks, list) or blocks != (list(range(len(blocks))) if chosen is None else sorted(set(chosen))):
        raise UserError(f"the manifest of {directory}: `state_blocks` is {blocks}", REBUILD)
    return manifest


def _sidecar_problems(parts: ShardContent, directory: Path, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield problems of the files besides the tars that their hashes do not show."""
    checks = {ITEM_STATES: _item_states, TARGET_COUNTS: _target_counts, SELECTION: _selection}
    for name, check in checks.items():
        try:
            what = check(parts, directory / name, manifest)
        except (UserError, OSError) as error:
            what = error.problem if isinstance(error, UserError) else str(error.strerror)
        if what:
            yield Problem(name, f"{name}: {what}")


def _item_states(parts: ShardContent, path: Path, manifest: Mapping[str, Any]) -> str | None:
    states_NLD, wanted = map_npy(path, REPAIR), parts.run.config.shards.state_dtype
    shape = (parts.run.dataset.n_items, len(manifest["state_blocks"]))
    if states_NLD.ndim != 3 or states_NLD.shape[:2] != shape or states_NLD.dtype != wanted:
        return f"{states_NLD.dtype} of shape {states_NLD.shape}, not {wanted} of {shape} and a width"
    for start in range(0, len(states_NLD), _ROWS):
        part_nLD = states_NLD[start : start + _ROWS]
        if not all_finite(part_nLD):
            row = start + int(np.flatnonzero(~np.isfinite(part_nLD).all((1, 2)))[0])
            return f"item row {row} has NaN or infinity"
    return None


def _target_counts(parts: ShardContent, path: Path, manifest: Mapping[str, Any]) -> str | None:
    counts_N, wanted_N = map_npy(path, REPAIR), parts.target_counts_N
    same = counts_N.dtype == wanted_N.dtype and np.array_equal(counts_N, wanted_N)
    return None if same else "differs from the target counts of the selected samples"


def _selection(parts: ShardContent, path: Path, manifest: Mapping[str, Any]) -> str | None:
    same = read_json(path) == json.loads(json.dumps(parts.selection.report))
    return None if same else "differs from the report of the selection"


def _repair(parts: ShardContent, manifest: Mapping[str, Any], broken: set[str]) -> str:
    """Rebuild the broken files; return which, and whether they are the same as before."""
    run, config = parts.run, parts.run.config.shards
    directory = run.directory("shards")
    foreign = sorted(broken - manifest["files"].keys())
    if foreign:
        raise UserError(f"{directory / foreign[0]} is not one of the shards' files", "move it away, and repair again")
    run.stage("shards").require(outside=True)
    with run.engine.serving(run.llm.backbone):  # on the device that made them: others round differently
        for name in parts.sidecars.keys() & broken:
            write_sidecar(directory / name, parts.sidecars[name]())
        size, samples = config.samples_per_shard, parts.samples
        records = repair_shards(directory, manifest, broken, parts.total, size, samples, run.say, config.writers)
    kept = {"state_blocks": parts.blocks, "cut_prompts": manifest.get("cut_prompts")}
    new = finish_shards(directory, records, manifest["settings"], manifest["made_from"], parts.sidecars, **kept)
    return _repair_summary(manifest["files"], new["files"], broken)


def _repair_summary(old: Mapping[str, str], new: Mapping[str, str], broken: set[str]) -> str:
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    done = f"rebuilt: {', '.join(sorted(broken))}"
    if not changed:
        return f"{done}; every file matches the manifest again"
    return (
        f"{done}\ndifferent from before (another machine rounds differently): {', '.join(changed)}\n"
        "the manifest was updated; training from the old shards will be refused"
    )


def _summary(directory: Path, manifest: Mapping[str, Any], seconds: float, deep: bool) -> str:
    size = sum((directory / name).stat().st_size for name in manifest["files"])
    counts = f"{len(manifest['shards'])} shards, {manifest['samples']} samples, {size} bytes"
    found = "all files unchanged" + (", all samples match the dataset" if deep else "")
    return f"{counts}: {found} ({size / 1e6 / seconds:.0f} MB/s)"
