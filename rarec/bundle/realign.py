"""A retrained ID model in a bundle without training: its vectors are mapped into the space of the old one.

The alignment was trained on the old vectors. Two trainings of one model differ by little more than a rotation, so a
linear map from new to old vectors, fitted on the items that both know, lets the alignment read the new ones.

Shape letters: N catalogue, R shared items or histories, E dimension of old vectors, S of new ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import orthogonal_procrustes

from rarec.bundle.bundle import ENCODERS, IDS, MODEL, VECTORS, Bundle
from rarec.bundle.facts import FACTS
from rarec.bundle.parts import Parts, sample_histories
from rarec.bundle.write import encoders_of, save_tensors, write_version
from rarec.errors import UserError
from rarec.ids.source import MappedUsers, Source
from rarec.models.encode import Encoder
from rarec.storage.files import write_json

Floats = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
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


@dataclass(frozen=True)
class NewModel:
    """A retrained ID model.

    Attributes:
        source: its vectors, by the rows of its own dataset.
        item_ids: the items of that dataset, in its order.
    """

    source: Source
    item_ids: list[Any]

    def items_NS(self, bundle: Bundle) -> Float32:
        """Return its vectors of a bundle's catalogue; zeros where it has none."""
        row_of = {str(item): row for row, item in enumerate(self.item_ids)}
        rows_N = np.array([row_of.get(str(item), -1) for item in bundle.catalogue.ids.to_pylist()])
        return np.where(rows_N[:, None] >= 0, self.source.items_NE[rows_N.clip(0)], 0).astype(np.float32)


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
    new_mean, old_mean = new_RS.mean(0), old_RE.mean(0)
    apart = new_RS - new_mean
    gram = apart.T @ apart
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    matrix = np.linalg.solve(gram, apart.T @ (old_RE - old_mean))
    return matrix, old_mean - new_mean @ matrix


def realign(parts: Parts, models: Mapping[str, NewModel], directory: Path, least: float = LEAST) -> dict[str, Any]:
    """Write a version of a bundle with retrained ID models; return what was measured.

    Args:
        parts: of the bundle.
        models: the new ID model of each source of the bundle.
        directory: to write to.
        least: see `LEAST`.

    Raises:
        UserError: a source has no new model, or too few items are shared; a map explains too little.
    """
    bundle = parts.bundle
    missing = [name for name in bundle.facts["sources"] if name not in models]
    if missing:
        raise UserError(f"the run has no ID model {missing[0]!r}, which {bundle.directory} needs", "train it there")
    histories = sample_histories(parts, USERS)
    figures = dict[str, Any]()
    sources = dict[str, Source]()
    for name, old in bundle.sources.items():
        sources[name], figures[name] = _realigned(bundle, old, models[name], histories, least)
    vectors = {IDS + name: source.items_NE for name, source in sources.items()}
    if MODEL in bundle.vectors:
        encoder = parts.encoder_over(sources)
        vectors[MODEL] = encoder.items()
        tops = _best(parts.encoder, bundle.vectors[MODEL], histories), _best(encoder, vectors[MODEL], histories)
        shared = [len(np.intersect1d(*rows)) / len(rows[0]) for rows in zip(*tops, strict=True)]
        figures[f"overlap@{K}"] = float(np.mean(shared))
    facts = {**bundle.facts, "sources": {name: _facts(bundle, source) for name, source in sources.items()}}
    changed: dict[str, Callable[[Path], object]] = {
        FACTS: partial(write_json, value=facts),
        VECTORS: partial(save_tensors, vectors),
        ENCODERS: partial(save_tensors, encoders_of(sources)),
    }
    write_version(bundle, directory, changed, {"realigned": figures})
    return figures


def _best(encoder: Encoder, items_NZ: Float32, histories: list[Rows]) -> Rows:
    """Return the variant's 10 best items after each history."""
    users_BZ = encoder.users(np.zeros(len(histories), np.int64), histories)
    return np.argsort(-(users_BZ @ items_NZ.T), 1, kind="stable")[:, :K]


def _facts(bundle: Bundle, source: Source) -> dict[str, Any]:
    users = {"kind": "mapped", "inner": source.manifest["settings"]["users"]}
    return {**bundle.facts["sources"][source.name], "users": users, "hash": source.hash}


def _realigned(
    bundle: Bundle, old: Source, model: NewModel, histories: list[Rows], least: float
) -> tuple[Source, dict[str, Any]]:
    """Return a source of new vectors in the old space, and how well it fits."""
    items_NS = model.items_NS(bundle)
    new = model.source
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
    fitted = {"items_kind": items.kind, "items_explained": items.explained}
    fitted |= {"users_kind": users.kind, "users_explained": users.explained}
    return replace(old, items_NE=items_NE, users=mapped, hash=new.hash, manifest=new.manifest), fitted


def _user_map(old: Source, new: Source, items_NS: Float32, histories: list[Rows]) -> Map:
    """Return the map of user vectors, fitted on histories; K vectors of a user are matched by their mean."""
    unmapped = MappedUsers(new.users, items_NS, np.eye(new.dim, dtype=np.float32), np.zeros(new.dim, np.float32))
    nobody = np.zeros(len(histories), np.int64)
    new_BS, old_BE = (users.vectors(old.items_NE, nobody, histories).mean(1) for users in (unmapped, old.users))
    return fit_map(new_BS, old_BE)
