"""`--to faiss`: the dense parts as an index."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.bundle.dense import DenseForm
from rarec.bundle.parts import Parts
from rarec.bundle.samples import sample_histories
from rarec.errors import UserError

FILE = "index.faiss"
KINDS = {"flat": "Flat", "hnsw": "HNSW32", "ivf": "IVF{lists},Flat", "sqfp16": "SQfp16"}
"""What `--index` takes, as faiss' factory names it."""
CHECKED, K = 200, 10
"""Users, and items of each, for which an index is compared with the exact search."""
_SEARCHED = {"hnsw": ("efSearch", 128), "ivf": ("nprobe", 16)}


def write_index(parts: Parts, kind: str, directory: Path) -> dict[str, Any]:
    """Write the index; return its kind and the recall of its 10 best items before re-ranking, for the manifest.

    Raises:
        UserError: faiss is not installed; the kind is unknown; a flat index does not give the bundle's items.
    """
    faiss = _faiss()
    if kind not in KINDS:
        raise UserError(f"--index {kind} is unknown", f"choose from {', '.join(KINDS)}")
    form = parts.dense
    count, size = form.items_NF.shape
    index = faiss.index_factory(size, KINDS[kind].format(lists=_lists(count)), faiss.METRIC_INNER_PRODUCT)
    index.train(form.items_NF)
    index.add(form.items_NF)
    if kind in _SEARCHED:
        name, value = _SEARCHED[kind]
        setattr(index.hnsw if kind == "hnsw" else index, name, value)
    if kind == "ivf":
        index.make_direct_map()
    recall = _recall(index, form, parts)
    if kind == "flat" and recall < 1:
        raise UserError(f"the index finds {recall:.1%} of the items that the bundle finds", "report it: this is a bug")
    faiss.write_index(index, str(directory / FILE))
    return {"index": kind, f"recall@{K}": recall}


def _lists(count: int) -> int:
    """Return the number of lists of an inverted file: faiss wants 39 vectors or more for each."""
    return max(1, min(int(4 * count**0.5), count // 39))


def _recall(index: Any, form: DenseForm, parts: Parts) -> float:
    """Return the share of the exact 10 best by inner product that the index finds."""
    histories = sample_histories(parts, CHECKED)
    users = form.users(histories)
    queries = np.ascontiguousarray(users.reshape(-1, users.shape[-1]), np.float32)
    exact = np.argsort(-(queries @ form.items_NF.T), 1, kind="stable")[:, :K]
    _, found = index.search(queries, exact.shape[1])
    return float(np.mean([_hit(near, queries[at], form) for at, near in enumerate(found)]))


def _hit(found: npt.NDArray[np.int64], query: npt.NDArray[np.float32], form: DenseForm) -> float:
    """Return the share of found items whose score is among the best; items of equal score count alike."""
    scores = form.items_NF @ query
    least = np.sort(scores)[-len(found)]
    near = scores[found[found >= 0]]
    return float((near >= least - 1e-5 * abs(least)).sum() / len(found))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("--to faiss needs the package faiss", "pip install 'rarec[serving]'") from None
    return faiss
