"""A recommender over a folder of `rarec export BUNDLE --to onnx --to faiss`, by ONNX Runtime. Needs no torch.

Shape letters: B users, N catalogue, V vectors of a user, Z size of a scored vector, F size of the fused vectors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from rarec.bundle.base_recommender import BaseRecommender, Float32, NotOffered
from rarec.bundle.recommended import Catalogue, Rows
from rarec.bundle.row import Part, Row, Table
from rarec.bundle.rules import Asked, Plan
from rarec.config.method import Prompt
from rarec.errors import UserError
from rarec.export import CATALOGUE, ITEM, TABLES, TOKENIZER
from rarec.export.rarec_client import BATCH, Client, run
from rarec.neighbours.scores import factor_of_sums
from rarec.prompts import PromptPair, TextTokenizer, lay_out


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
        self._facts: Mapping[str, Any] = client.facts["recommender"]
        catalogue = Catalogue.read(Path(client.checked(CATALOGUE)).read_bytes())
        super().__init__(self._read_row(row), catalogue, self._facts["date"])
        self.no_place = self._no_place()

    def _read_row(self, name: str) -> Row:
        client = self._client
        own = client.arrays(TABLES)
        parts = {
            name: Part(**part, vectors_NZ=own.get(f"{name}/vectors"), lacking_N=own.get(f"{name}/lacking"))
            for name, part in self._facts["parts"].items()
        }
        exported = {name: client.tables[name] for name in parts if name in client.tables}
        rule: Mapping[str, Any] = next(iter(self._facts["words"].values()), {})
        row = Row(name, parts, exported, client.facts["newest"], client.facts["decay"], self._facts["compared"], **rule)
        tables = {name: self._own_table(row, name) for name in exported}
        return replace(row, tables=tables, order=client.order, asked=Asked(**client.facts["asked"]))

    def _own_table(self, row: Row, name: str) -> Table:
        """Return a neighbour table with its own scores; in the client's they may be times their items' weights."""
        starts, neighbours, values = row.tables[name]
        if self._client.facts["neighbours"][name] != 1:
            return row.tables[name]
        factor_N = factor_of_sums(row.table_weights[name])
        return starts, neighbours, (values / factor_N[neighbours]).astype(np.float32)

    def _no_place(self) -> NotOffered | None:
        if ITEM not in self._client.files:
            return None
        if reads := self._facts["reads_llm"]:
            problem = f"{self._client.folder} has no language model, by which `{reads[0]}` compares new items"
            return NotOffered(problem, "rarec serve BUNDLE --backend torch")
        if TOKENIZER not in self._client.files:
            problem = f"{self._client.folder} lacks {TOKENIZER}: the tokenizer has no such form"
            return NotOffered(problem, "rarec serve BUNDLE --backend torch")
        needed = {"tokenizers": "tokenizers"} | ({"sklearn": "scikit-learn"} if self._facts["words"] else {})
        absent = [package for module, package in needed.items() if not _is_there(module)]
        return NotOffered(f"{absent[0]} is not installed", f"pip install {' '.join(absent)}") if absent else None

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
