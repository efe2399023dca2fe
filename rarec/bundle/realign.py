"""A retrained ID model in a bundle without training: its vectors are mapped into the space of the old one.

The alignment was trained on the old vectors. Two trainings of one model differ by little more than a rotation, so a
linear map from new to old vectors, fitted on the items that both know, lets the alignment read the new ones.

Shape letters: N catalogue, R shared items or histories, E dimension of old vectors, S of new ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import Ridge

from rarec.bundle.bundle import IDS, MODEL, Float32, Rows
from rarec.bundle.parts import Parts, sample_histories
from rarec.bundle.write import encoders_of, write_version
from rarec.errors import UserError
from rarec.ids.source import MappedUsers, Source
from rarec.models.encode import Encoder

Floats = npt.NDArray[np.float64]
LEAST = 0.5
"""Default of the explained share of the variance of held-out items' vectors below which a model is refused."""
HELD_OUT, RIDGE, USERS, K = 0.1, 1e-3, 256, 10


class Map(NamedTuple):
    """x M + b, and the share of the variance of held-out rows that it explains."""

    kind: str
    matrix_SE: Floats
    bias_E: Floats
    explained: float

    def __call__(self, vectors: npt.NDArray[Any]) -> Float32:
        """Return mapped vectors."""
        mapped: Float32 = (vectors @ self.matrix_SE + self.bias_E).astype(np.float32)
        return mapped


def fit_map(new_RS: npt.NDArray[Any], old_RE: npt.NDArray[Any], seed: int = 17) -> Map:
    """Return the map from new to old vectors that explains held-out rows best: scaled rotation or ridge regression.

    Args:
        new_RS: new vectors.
        old_RE: old vectors of the same items or histories.
        seed: of the rows that are held out.
    """
    new, old = new_RS.astype(np.float64), old_RE.astype(np.float64)
    held = np.random.default_rng(seed).permutation(len(new)) < max(1, int(HELD_OUT * len(new)))
    fits = {"rotation": _rotation, "ridge": _ridge} if new.shape[1] == old.shape[1] else {"ridge": _ridge}
    explained = {}
    for kind, fit in fits.items():
        matrix, bias = fit(new[~held], old[~held])
        left = ((old[held] - new[held] @ matrix - bias) ** 2).sum()
        total = ((old[held] - old[~held].mean(0)) ** 2).sum()
        explained[kind] = float(1 - left / total) if total else 0.0
    best = max(explained, key=lambda kind: explained[kind])
    return Map(best, *fits[best](new, old), explained[best])


def _rotation(new_RS: Floats, old_RE: Floats) -> tuple[Floats, Floats]:
    """Orthogonal Procrustes with a scale (Schönemann 1966), without a shift: inner products keep their order."""
    rotation, singular = orthogonal_procrustes(new_RS, old_RE)
    return rotation * (singular / (new_RS**2).sum()), np.zeros(old_RE.shape[1])


def _ridge(new_RS: Floats, old_RE: Floats) -> tuple[Floats, Floats]:
    """Ridge regression; the penalty is a share of the mean square of the new vectors' dimensions."""
    fit = Ridge(RIDGE * len(new_RS) * new_RS.var(0).mean()).fit(new_RS, old_RE)
    return fit.coef_.T, fit.intercept_


def realign(
    parts: Parts, models: Mapping[str, Source], item_ids: Sequence[Any], directory: Path | None, least: float = LEAST
) -> tuple[Path, dict[str, Any]]:
    """Write a version of a bundle with retrained ID models; return its folder and what was measured.

    Args:
        parts: of the bundle.
        models: the new ID model of each source of the bundle, by the rows of its own dataset.
        item_ids: the items of that dataset, in its order.
        directory: to write to; by default the next version beside the bundle.
        least: see `LEAST`.

    Raises:
        UserError: a source has no new model, or too few items are shared; a map explains too little.
    """
    bundle = parts.bundle
    missing = [name for name in bundle.facts["sources"] if name not in models]
    if missing:
        raise UserError(f"the run has no ID model {missing[0]!r}, which {bundle.directory} needs", "train it there")
    row_of = {str(item): row for row, item in enumerate(item_ids)}
    rows_N = np.array([row_of.get(str(item), -1) for item in bundle.catalogue.ids.to_pylist()])
    histories = sample_histories(parts, USERS)
    figures = dict[str, Any]()
    sources = dict[str, Source]()
    facts = {**bundle.facts, "sources": dict(bundle.facts["sources"])}
    for name, old in bundle.sources.items():
        sources[name], figures[name] = _realigned(old, models[name], rows_N, histories, least)
        users = {"kind": "mapped", "inner": models[name].manifest["settings"]["users"]}
        facts["sources"][name] = {**facts["sources"][name], "users": users, "hash": models[name].hash}
    vectors = {**bundle.vectors, **{IDS + name: source.items_NE for name, source in sources.items()}}
    if MODEL in bundle.vectors:
        encoder = parts.model.encoder_over(sources)
        vectors[MODEL] = encoder.items()
        tops = _best(parts.encoder, bundle.vectors[MODEL], histories), _best(encoder, vectors[MODEL], histories)
        shared = [len(np.intersect1d(*rows)) / len(rows[0]) for rows in zip(*tops, strict=True)]
        figures[f"overlap@{K}"] = float(np.mean(shared))
    version = write_version(bundle, directory, {"realigned": figures}, vectors, encoders_of(sources), facts=facts)
    return version, figures


def _best(encoder: Encoder, items_NZ: Float32, histories: list[Rows]) -> Rows:
    """Return the variant's 10 best items after each history."""
    users_BZ = encoder.users(np.zeros(len(histories), np.int64), histories)
    return np.argsort(-(users_BZ @ items_NZ.T), 1, kind="stable")[:, :K]


def _realigned(
    old: Source, new: Source, rows_N: Rows, histories: list[Rows], least: float
) -> tuple[Source, dict[str, Any]]:
    """Return a source of new vectors in the old space, and how well it fits; `rows_N` are the new model's, or -1."""
    items_NS = np.where(rows_N[:, None] >= 0, new.items_NE[rows_N.clip(0)], 0).astype(np.float32)
    name = f"ID model {old.name!r}"
    known_N = (items_NS != 0).any(1)
    shared_N = known_N & (old.items_NE != 0).any(1)
    if new.vectors_per_user != old.vectors_per_user:
        problem = f"{name} gives {new.vectors_per_user} vectors a user, and not {old.vectors_per_user}"
        raise UserError(problem, "train a bundle for the new ID model")
    needed = 2 * max(old.dim, new.dim)
    if shared_N.sum() < needed:
        problem = f"{name}: {shared_N.sum()} items have both an old and a new vector"
        raise UserError(problem, f"a map needs {needed} of them or more: retrain on a log of the same items")
    items = fit_map(items_NS[shared_N], old.items_NE[shared_N])
    if items.explained < least:
        problem = f"{name}: the map explains {items.explained:.2f} of held-out items' vectors"
        raise UserError(problem, f"train a bundle for the new ID model, or accept it: --least {items.explained:.2f}")
    users = _user_map(old, new, items_NS, histories)
    mapped = MappedUsers(new.users, items_NS, users.matrix_SE.astype(np.float32), users.bias_E.astype(np.float32))
    items_NE = items(items_NS) * known_N[:, None]
    fits = {"items": items, "users": users}
    figures = {f"{side}_{field}": getattr(fit, field) for side, fit in fits.items() for field in ("kind", "explained")}
    return replace(old, items_NE=items_NE, users=mapped), figures


def _user_map(old: Source, new: Source, items_NS: Float32, histories: list[Rows]) -> Map:
    """Return the map of user vectors, fitted on histories; K vectors of a user are matched by their mean."""
    unmapped = MappedUsers(new.users, items_NS, np.eye(new.dim, dtype=np.float32), np.zeros(new.dim, np.float32))
    nobody = np.zeros(len(histories), np.int64)
    new_BS, old_BE = (users.vectors(old.items_NE, nobody, histories).mean(1) for users in (unmapped, old.users))
    return fit_map(new_BS, old_BE)
