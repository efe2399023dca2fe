"""A recommender over a folder of `rarec export BUNDLE --to onnx --to faiss`, by ONNX Runtime. Needs no torch.

Shape letters: B users, N catalogue, V vectors of a user, Z size of a scored vector, F size of the fused vectors.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from rarec.bundle.base_recommender import BaseRecommender, Float32, NotOffered, Part, Rows
from rarec.bundle.catalogue import COLUMNS, Catalogue
from rarec.bundle.rules import Plan
from rarec.config.method import Prompt
from rarec.errors import UserError
from rarec.export import AGAIN, CATALOGUE, ITEM, TABLES, TOKENIZER
from rarec.export.rarec_client import BATCH, Client, run
from rarec.prompts import PromptPair, TextTokenizer, lay_out

NEED_PARTS = ("similar", "explain", "compare", "place", "diversify")
"""What needs the single parts of the row, which earlier exports lack."""


class OnnxRecommender(BaseRecommender):
    """See `BaseRecommender`.

    Args:
        folder: of the export.
        row: name of the row that is served.
        threads: that compute a query; 0 for one a core.
        batch: histories of similar length that go through the graph together; by default as many as in the client.
    """

    def __init__(self, folder: Path, row: str, threads: int = 0, batch: int | None = None) -> None:
        self._client = client = Client(folder, threads, batch=batch or BATCH)
        self._facts: Mapping[str, Any] = client.facts.get("recommender", {"parts": {}, "compared": None, "date": None})
        self._parts = self._read_parts()
        if self._parts:
            catalogue = Catalogue.read(Path(client.checked(CATALOGUE)).read_bytes())
        else:
            items = pq.read_table(client.checked("items.parquet"), columns=["id", "title", "text", "train_count"])
            catalogue = Catalogue.of(items.rename_columns(list(COLUMNS)))
        compared = self._parts.get(self._facts["compared"] or "")
        vectors = compared.vectors_NZ if compared else None
        if compared and vectors is not None and compared.lacking_N is not None:
            vectors = np.where(compared.lacking_N[:, None], np.float32(0), vectors)
        super().__init__(row, catalogue, self._facts["date"], vectors, lists=False)
        self.missing = self._missing()

    def _read_parts(self) -> dict[str, Part]:
        facts = self._facts["parts"]
        own: dict[str, npt.NDArray[Any]] = {}
        if facts:
            with np.load(self._client.checked(TABLES), allow_pickle=False) as tables:
                own = dict(tables)
        return {
            name: Part(**part, vectors_NZ=own.get(f"{name}/vectors"), lacking_N=own.get(f"{name}/lacking"))
            for name, part in facts.items()
        }

    def _missing(self) -> dict[str, NotOffered]:
        if not self._parts:
            error = NotOffered(f"{self._client.folder} was written by an earlier version: it lacks single parts", AGAIN)
            return dict.fromkeys(NEED_PARTS, error)
        if ITEM not in self._client.files:
            return {}
        if TOKENIZER not in self._client.files:
            problem = f"{self._client.folder} lacks {TOKENIZER}: the tokenizer has no such form"
            return {"place": NotOffered(problem, "rarec serve BUNDLE --backend torch")}
        needed = {"tokenizers": "tokenizers"} | ({"sklearn": "scikit-learn"} if self._facts["words"] else {})
        absent = [package for module, package in needed.items() if not _is_there(module)]
        if absent:
            return {"place": NotOffered(f"{absent[0]} is not installed", f"pip install {' '.join(absent)}")}
        return {}

    def best(self, plans: Sequence[Plan]) -> list[tuple[Rows, Float32]]:
        """See `BaseRecommender`."""
        histories = [plan.history.tolist() for plan in plans]
        best = []
        for plan, history, query in zip(plans, histories, self._client.queries(histories), strict=True):
            among = None if plan.excluded_N is None else np.flatnonzero(~plan.excluded_N)
            found = self._client.best(query, history, plan.candidates, plan.seen, among)
            best.append((np.array([row for row, _ in found], np.int64), np.array([s for _, s in found], np.float32)))
        return best

    def queries(self, histories: Sequence[Rows]) -> Float32:
        """See `BaseRecommender`."""
        queries: Float32 = self._client.queries([history.tolist() for history in histories])
        return queries

    def part_scores(self, history: Rows) -> dict[str, Float32]:
        """See `BaseRecommender`."""
        (query_VF,) = self.queries([history])
        scores = dict[str, Float32]()
        start = 0
        for name, part in self._parts.items():
            if part.vectors_NZ is None:
                scores[name] = self._client.table_scores(name, history.tolist()) / self._factors_N.get(name, 1)
            else:
                end = start + part.vectors_NZ.shape[1]
                scores[name] = np.einsum("nz,vz->nv", part.vectors_NZ, query_VF[:, start:end]).max(1)
                start = end
        return scores

    @cached_property
    def _factors_N(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return by what the exported table of the first part exceeds its own scores, (N,); see `DenseForm.of`."""
        (name, first), *others = self._parts.items()
        added = [
            part.weight * part.slope * part.lacking_N
            for _, part in others
            if part.lacking_N is not None and part.lacking_N.any() and part.weight * part.slope
        ]
        if first.vectors_NZ is not None or not added:
            return {}
        factor_N = first.weight + np.sum(added, axis=0)
        return {name: np.where(factor_N > 0, factor_N, 1.0)}

    @property
    def row_parts(self) -> Mapping[str, Part]:
        """See `BaseRecommender`."""
        return self._parts

    @cached_property
    def new_items(self) -> Mapping[str, Any]:
        """See `BaseRecommender`."""
        if not self._facts["words"]:
            return {}
        from scipy.sparse import csr_matrix

        from rarec.neighbours.lexical import Lexical

        known, count = self.catalogue, len(self.items)
        finders = {}
        for name, rule in self._facts["words"].items():
            starts, neighbours, scores = self._client.tables[name]
            table_NN = csr_matrix((scores, neighbours, starts), (count, count))
            finders[name] = Lexical.new_items(known.titles, known.texts, rule["untitled"], table_NN, rule["top"])
        return finders

    @property
    def newest_and_decay(self) -> tuple[int, float]:
        """See `BaseRecommender`."""
        return self._client.facts["newest"], self._client.facts["decay"]

    def encode_new(self, title: str, text: str) -> Float32:
        """See `BaseRecommender`."""
        if self._item is None:
            raise UserError(f"{self.row} has no language model", "export a row with a variant: VARIANT+id")
        facts, tokenizer, session = self._item
        slots, length, kind = facts["slots"], facts["context_length"], facts["kind"]
        prompts = PromptPair(Prompt(**facts["prompt"]), tokenizer, [title], [text], slots, length, kind)
        laid = lay_out([prompts.item(0)], facts["counts"], tokenizer.filler)
        given = {"input_ids": laid.ids_BT, "attention_mask": laid.mask_BT, "slot_positions": laid.positions_BK}
        vectors = {f"vectors_{name}": np.zeros((1, 1, dim), np.float32) for name, dim in facts["sources"].items()}
        encoded: Float32 = run(session, {**given, **vectors})[0]
        return encoded

    @cached_property
    def _item(self) -> "tuple[Mapping[str, Any], TextTokenizer, Any] | None":
        facts = self._facts["item"]
        if facts is None:
            return None
        tokenizer = ExportedTokenizer(self._client.checked(TOKENIZER), facts["tokenizer"])
        return facts, tokenizer, self._client.session(ITEM)

    def neighbours(self, row: int) -> Rows:
        """See `BaseRecommender`."""
        tables = sorted(self._client.tables, key=lambda name: (name != "cooccurrence", name))
        if not tables:
            return np.empty(0, np.int64)
        starts, neighbours, scores = self._client.tables[tables[0]]
        own = slice(starts[row], starts[row + 1])
        return np.asarray(neighbours[own][np.argsort(-scores[own])], np.int64)


class ExportedTokenizer(TextTokenizer):
    """A tokenizer by the package `tokenizers` alone.

    Args:
        path: of `tokenizer.json`.
        facts: the other attributes of the one that was exported.
    """

    def __init__(self, path: str, facts: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        self._by_plain = {plain: Tokenizer.from_file(path) for plain in (False, True)}
        for plain, core in self._by_plain.items():
            core.no_truncation()
            core.no_padding()
            core.encode_special_tokens = plain
        self.prefix, self.suffix = (np.array(facts[name], np.int32) for name in ("prefix", "suffix"))
        self.filler, self.adds_space = facts["filler"], facts["adds_space"]
        self._anchor = self._ids("\n")

    def _ids(self, text: str, **options: bool) -> list[int]:
        core = self._by_plain[options.get("split_special_tokens", False)]
        ids: list[int] = core.encode(text, add_special_tokens=False).ids
        return ids


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # hidden
        return False
