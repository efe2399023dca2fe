"""A retrained ID model in a bundle without training: its vectors are mapped into the space of the old one.

The alignment was trained on the old vectors. Two trainings of one model differ by little more than a rotation, so a
linear map from new to old vectors, fitted on the items that both know, lets the alignment read the new ones.

Shape letters: N catalogue, R shared items or histories, E dimension of old vectors, S of new ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from scipy.linalg import orthogonal_procrustes

from rarec.bundle.bundle import ENCODERS, FACTS, IDS, MODEL, VECTORS, Bundle
from rarec.bundle.parts import Parts
from rarec.bundle.samples import sample_histories
from rarec.bundle.versions import new_version
from rarec.errors import UserError
from rarec.ids.mapped import MappedUsers
from rarec.ids.source import Source
from rarec.storage.files import write_json

Floats = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
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

    def rows(self, bundle: Bundle) -> npt.NDArray[np.int64]:
        """Return the row of each item of a bundle's catalogue, (N,); -1 where it has none."""
        row_of = {str(item): row for row, item in enumerate(self.item_ids)}
        return np.array([row_of.get(str(item), -1) for item in bundle.catalogue.ids.to_pylist()])


def fit_map(new_RS: npt.NDArray[Any], old_RE: npt.NDArray[Any], seed: int = 17) -> Map:
    """Return the map from new to old vectors that explains held-out rows best: scaled rotation or ridge regression.

    Args:
        new_RS: new vectors.
        old_RE: old vectors of the same items or histories.
        seed: of the rows that are held out.
    """
    new, old = new_RS.astype(np.float64), old_RE.astype(np.float64)
    held = np.random.default_rng(seed).permutation(len(new)) < max(1, int(HELD_OUT * len(new)))
    tried = []
    for kind, fit in {"rotation": _rotation, "ridge": _ridge}.items():
        if kind == "rotation" and new.shape[1] != old.shape[1]:
            continue
        matrix, bias = fit(new[~held], old[~held])
        left = ((old[held] - new[held] @ matrix - bias) ** 2).sum()
        total = ((old[held] - old[~held].mean(0)) ** 2).sum()
        tried.append((float(1 - left / total) if total else 0.0, kind, fit))
    explained, kind, fit = max(tried, key=lambda one: one[0])
    return Map(kind, *fit(new, old), explained)


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
    histories, figures, sources = sample_histories(parts, USERS), dict[str, Any](), dict[str, Source]()
    for name, old in bundle.sources.items():
        sources[name], figures[name] = _realigned(bundle, old, models[name], histories, least)
    vectors = {IDS + name: source.items_NE for name, source in sources.items()}
    if MODEL in bundle.vectors:
        before = [parts.encoder.users(np.zeros(len(histories), np.int64), histories), bundle.vectors[MODEL]]
        encoder = parts.encoder_over(sources)
        vectors[MODEL] = encoder.items()
        after = [encoder.users(np.zeros(len(histories), np.int64), histories), vectors[MODEL]]
        figures[f"overlap@{K}"] = _overlap(before, after)
    _write(bundle, directory, sources, vectors, figures)
    return figures


def _realigned(
    bundle: Bundle, old: Source, model: NewModel, histories: list[npt.NDArray[np.int64]], least: float
) -> tuple[Source, dict[str, Any]]:
    """Return a source of new vectors in the old space, and how well it fits."""
    rows, new = model.rows(bundle), model.source
    items_NS = np.where(rows[:, None] >= 0, new.items_NE[rows.clip(0)], 0).astype(np.float32)
    shared = (items_NS != 0).any(1) & (old.items_NE != 0).any(1)
    if new.vectors_per_user != old.vectors_per_user:
        problem = f"ID model {old.name!r} gives {new.vectors_per_user} vectors a user, and not {old.vectors_per_user}"
        raise UserError(problem, "train a bundle for the new ID model")
    wanted = 2 * max(old.dim, new.dim)
    if shared.sum() < wanted:
        problem = f"ID model {old.name!r}: {shared.sum()} items have both an old and a new vector"
        raise UserError(problem, f"a map needs {wanted} of them or more: retrain on a log of the same items")
    of_items = fit_map(items_NS[shared], old.items_NE[shared])
    if of_items.explained < least:
        problem = f"ID model {old.name!r}: the map explains {of_items.explained:.2f} of held-out items' vectors"
        raise UserError(problem, f"train a bundle for the new ID model, or accept it: --least {of_items.explained:.2f}")
    known = (items_NS != 0).any(1)[:, None]
    inner = new.users
    users = _user_map(old, inner, items_NS, histories)
    mapped = MappedUsers(inner, items_NS, users.matrix_SE.astype(np.float32), users.bias_E.astype(np.float32))
    source = replace(old, items_NE=of_items(items_NS) * known, users=mapped, hash=new.hash, manifest=new.manifest)
    of = {"items": of_items, "users": users}
    return source, {f"{name}_{what}": getattr(one, what) for name, one in of.items() for what in ("kind", "explained")}


def _user_map(old: Source, inner: Any, items_NS: Float32, histories: list[npt.NDArray[np.int64]]) -> Map:
    """Return the map of user vectors, fitted on histories; K vectors of a user are matched to the nearest old ones."""
    identity = np.eye(items_NS.shape[1], dtype=np.float32)
    plain = MappedUsers(inner, items_NS, identity, np.zeros(len(identity), np.float32))
    nobody = np.zeros(len(histories), np.int64)
    new = plain.vectors(old.items_NE, nobody, histories).mean(1)
    return fit_map(new, old.users.vectors(old.items_NE, nobody, histories).mean(1))


def _overlap(before: list[Float32], after: list[Float32]) -> float:
    """Return the share of the variant's 10 best items that stay."""
    tops = [np.argsort(-(users @ items.T), 1, kind="stable")[:, :K] for users, items in (before, after)]
    shared = [len(set(one) & set(other)) / len(one) for one, other in zip(*tops, strict=True)]
    return float(np.mean(shared))


def _write(
    bundle: Bundle, directory: Path, sources: Mapping[str, Source], vectors: Mapping[str, Float32], figures: Any
) -> None:
    of_sources = {
        name: {
            **bundle.facts["sources"][name],
            "users": {"kind": "mapped", "inner": source.manifest["settings"]["users"]},
            "hash": source.hash,
        }
        for name, source in sources.items()
    }
    tensors = {f"{name}/{key}": t for name, source in sources.items() for key, t in source.users.tensors.items()}
    with new_version(bundle, directory, (FACTS, VECTORS, ENCODERS), {"realigned": figures}) as temporary:
        write_json(temporary / FACTS, {**bundle.facts, "sources": of_sources})
        save_file({name: torch.from_numpy(np.array(table)) for name, table in vectors.items()}, temporary / VECTORS)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / ENCODERS)
