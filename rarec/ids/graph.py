"""Make the vectors of the graph of transitions: its truncated SVD.

Shape letters: N items, E dimension.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.linalg import svds

from rarec.config.logs import Prepare
from rarec.config.neighbours import Graph, Neighbours
from rarec.data.dataset import PreparedDataset
from rarec.data.engines import open_engine
from rarec.errors import UserError
from rarec.ids.source import ITEMS_FILE, LEFT_FILE, Floats, GraphUsers
from rarec.ids.validation import Validation
from rarec.neighbours.counting import Transition


def write_graph(
    graph: Graph,
    neighbours: Neighbours,
    prepare: Prepare,
    holdout: float,
    dataset: PreparedDataset,
    directory: Path,
    seed: int,
) -> dict[str, Any]:
    """Write the files of the source `graph`; return the figures for its manifest.

    Args:
        graph: the section `graph`.
        neighbours: the section `neighbours`: how transitions are counted, and how far back a history is read.
        prepare: the section `prepare`: its engine counts.
        holdout: the newest share of each user's training interactions, which is not counted.
        dataset: prepared.
        directory: to write to.
        seed: of the subset of validation users.

    Raises:
        UserError: there are fewer items than dimensions, or no user has a validation target.
    """
    engine = partial(open_engine, prepare, directory / "spill")
    transitions = Transition(neighbours.config_of("transition"), engine)
    left_NE, right_NE = factors(transitions.fit(dataset, holdout), graph.dim)
    np.save(directory / LEFT_FILE, left_NE)
    np.save(directory / ITEMS_FILE, right_NE)
    users = GraphUsers.of(left_NE, neighbours.newest, neighbours.decay)
    return {"validation": Validation(dataset, seed).of_vectors(right_NE, users)}


def factors(graph_NN: sparse.csr_matrix, dim: int) -> tuple[Floats, Floats]:
    """Return left and right singular vectors (N, E), each times the root of its singular value; zeros without edges.

    Raises:
        UserError: the graph has no more items than dimensions.
    """
    n_items = graph_NN.shape[0]
    if dim >= n_items:
        raise UserError(f"field `graph.dim`: {dim} dimensions of {n_items} items", f"set graph.dim below {n_items}")
    if not graph_NN.nnz:
        return np.zeros((n_items, dim), np.float32), np.zeros((n_items, dim), np.float32)
    start_N = np.random.default_rng(0).standard_normal(n_items)
    left_NE, values_E, right_EN = svds(graph_NN.astype(np.float64), k=dim, v0=start_N)
    signs_E = np.sign(right_EN[np.arange(dim), np.abs(right_EN).argmax(1)])  # a singular vector's sign is arbitrary
    root_E: npt.NDArray[np.float64] = np.sqrt(np.maximum(values_E, 0)) * signs_E
    return _zeroed(left_NE * root_E, graph_NN, 1), _zeroed(right_EN.T * root_E, graph_NN, 0)


def _zeroed(vectors_NE: npt.NDArray[np.float64], graph_NN: sparse.csr_matrix, axis: int) -> Floats:
    """Set the vectors of items without edges, which are rounding, to zero: they stand for missing ones."""
    edges_N = np.asarray((graph_NN != 0).sum(axis)).ravel()
    return np.where(edges_N[:, None] > 0, vectors_NE, 0.0).astype(np.float32)
