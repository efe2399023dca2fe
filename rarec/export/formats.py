"""The targets that need no graph.

`--to vectors`: items with their vectors, neighbour tables, facts; `--to faiss`: an index of the vectors as well;
`--to peft`: the LoRA weights alone, as stock PEFT loads them; `--to hub`: a model hub's repository.

Shape letters: B users, N catalogue, K items returned, V vectors of a user, F size of the fused vectors.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import HfApi

from rarec.bundle.bundle import TABLES, Bundle, Float32, Rows
from rarec.bundle.parts import Parts, sample_histories
from rarec.data.dataset import PreparedDataset
from rarec.data.tables import write_rows
from rarec.errors import UserError
from rarec.export import Target, raise_if_far
from rarec.models.backbone import FrozenBackbone
from rarec.neighbours.base import SCHEMA, pairs_of
from rarec.neighbours.scores import factor_of_sums
from rarec.ranking.order import CANDIDATES
from rarec.ranking.rank import EvalBatch
from rarec.storage.artefacts import MANIFEST, read_manifest, write_sealed
from rarec.storage.files import read_json, write_json

ITEMS, FACTS, INDEX = "items.parquet", "client.json", "index.faiss"
KINDS = {"flat": "Flat", "hnsw": "HNSW32", "ivf": "IVF{lists},Flat", "sqfp16": "SQfp16"}
"""What `--index` takes, as faiss' factory names it."""
DEPTHS = {"hnsw": "efSearch", "ivf": "nprobe"}
"""What `--depth` is of an index that looks at some items alone, as faiss names it; it is part of the index."""
FIRST_DEPTH, GOOD = 16, 0.99
"""The depth that is tried first, and the share of the exact lists that the default depth finds, if any depth does."""
USERS, K = 200, 10
"""Users, and items of each, whose lists by an approximation are compared with the exact ones."""
CLOSE = 1e-5
"""Largest difference of hidden states between stock PEFT and the bundle, relative to the largest state."""


# ---- what an approximation costs


@dataclass(frozen=True)
class ExactLists:
    """Users for whom approximate lists are compared with the exact ones.

    Attributes:
        parts: of the bundle.
        histories: item rows of each user, oldest first.
        users: who they are.
    """

    parts: Parts
    histories: list[Rows]
    users: str

    @classmethod
    def of(cls, parts: Parts) -> "ExactLists":
        """Return validation users of the run that the bundle is in; made-up ones, if it was moved from there."""
        dataset = _dataset(parts.bundle)
        if dataset is None or not (dataset.validation_U >= 0).any():
            return cls(parts, sample_histories(parts, USERS), f"{USERS} made-up users: the bundle is not in its run")
        row_of = {str(item): row for row, item in enumerate(parts.bundle.catalogue.ids.to_pylist())}
        batch = EvalBatch.of(dataset, dataset.targets("validation", USERS))
        ids = ([str(dataset.item_ids[int(row)]) for row in history] for history in batch.histories)
        rows = [np.array([row_of[item] for item in own if item in row_of], np.int64) for own in ids]
        return cls(parts, [parts.row.asked.known(own) for own in rows], f"{len(rows)} validation users")

    @cached_property
    def queries(self) -> Float32:
        """The users' exact vectors, (B, V, F)."""
        return self.parts.dense.users(self.histories)

    def overlap(self, search: Callable[[Float32, int], Rows], queries: Float32 | None = None) -> float:
        """Return the share of the exact K best items that are in the lists of an approximation.

        Items of equal score count alike.

        Args:
            search: returns the rows of the k items of the largest inner product with queries (V, F); -1 is none.
            queries: approximate vectors of the users, (B, V, F); the exact ones by default.
        """
        form, scores = self.parts.dense, self.parts.scored(self.histories)
        learned = form.row.order is not None
        depth = CANDIDATES if learned else K
        shares = []
        for user, query in enumerate(self.queries if queries is None else queries):
            history = self.histories[user]
            found = search(np.ascontiguousarray(query), min(len(form.items_NF), depth + len(history)))
            ((rows_K, _),) = form.best(query[None], [history], [np.unique(found[found >= 0])], K)
            scores_N = scores.block(slice(user, user + 1))[0].numpy()
            if learned:  # by the same arithmetic as the list: it reads places, which rounding may swap
                scores_N = form.row.whole(form.row.shares(self.queries[user], history), history)
            scores_N[form.row.asked.seen(history)] = -np.inf
            best_K = np.sort(scores_N)[::-1][:K]
            best_K = best_K[best_K > -np.inf]
            if len(best_K):
                least = best_K[-1] - 1e-5 * np.abs(best_K[-1])
                shares.append((scores_N[rows_K] >= least).sum() / len(best_K))
        return float(np.mean(shares))


def _dataset(bundle: Bundle) -> PreparedDataset | None:
    """Return the dataset that a bundle was made from, if it is where the run has it."""
    directory = bundle.directory.resolve().parent / "prepare"
    try:
        made_from = bundle.manifest["made_from"].get("prepare")
        if not (directory / MANIFEST).exists() or read_manifest(directory, "prepare")["hash"] != made_from:
            return None
        return PreparedDataset.open(directory)
    except (UserError, OSError):  # damaged, or without permission: it is only measured with
        return None


# ---- targets


@dataclass(frozen=True)
class Vectors(Target):
    """`items.parquet`, the neighbour tables and `client.json`, for vector databases.

    `items.parquet` has a row for each item: `id`, `values` (its vector), `title`, `text`, `train_count`. The score of
    a user and an item is the inner product of the user's `Recommender.query_vectors` and `values`, plus what the
    neighbour tables add.
    """

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`."""
        row, bundle = parts.dense.row, parts.bundle
        catalogue = bundle.catalogue
        size = row.items_NF.shape[1]
        values = pa.FixedSizeListArray.from_arrays(pa.array(row.items_NF.ravel()), size)
        columns = {"id": catalogue.ids, "values": values, "title": catalogue.titles, "text": catalogue.texts}
        pq.write_table(pa.table({**columns, "train_count": catalogue.counts_N}), directory / ITEMS, compression="zstd")
        weights = dict[str, float]()
        for name, weight_N in row.table_weights.items():
            table_NN, weights[name] = bundle.near[name], row.parts[name].weight
            if (weight_N[table_NN.indices] != weights[name]).any():
                table_NN, weights[name] = table_NN.copy(), 1.0
                table_NN.data *= factor_of_sums(weight_N)[table_NN.indices]
            (directory / TABLES).mkdir(exist_ok=True)
            write_rows([pairs_of(table_NN)], directory / TABLES / f"{name}.parquet", SCHEMA)
        facts = {
            "row": row.name,
            "items": len(catalogue.titles),
            "dim": size,
            "neighbours": weights,
            "newest": row.newest,
            "decay": row.decay,
            "asked": vars(row.asked),
        }
        write_json(directory / FACTS, facts)
        return {}


def add_facts(directory: Path, **facts: Any) -> None:
    """Add fields to `client.json`."""
    write_json(directory / FACTS, {**read_json(directory / FACTS), **facts})


@dataclass(frozen=True)
class Faiss(Target):
    """The item vectors as an index, `index.faiss`.

    Attributes:
        index: its kind, of `KINDS`.
        depth: how many items (hnsw) or lists of items (ivf) a search looks at; by default twice as many as long as a
            share of less than `GOOD` of the exact lists is found.
    """

    index: str = "flat"
    depth: int | None = None
    needs = ("vectors",)
    packages = ("faiss",)

    def __post_init__(self) -> None:
        if self.index not in KINDS:
            raise UserError(f"--index {self.index} is unknown", f"choose from {', '.join(KINDS)}")
        if self.depth is not None and self.index not in DEPTHS:
            problem = f"--depth does nothing with --index {self.index}, which looks at every item"
            raise UserError(problem, f"leave it out, or give --index {' or '.join(DEPTHS)}")

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`. Figures: the kind, the depth, and the share of the exact lists that a search finds."""
        import faiss

        exact = ExactLists.of(parts)
        index, figures = self.indexed(exact)
        if self.index == "flat" and figures[f"overlap@{K}"] < 1:
            problem = f"the index finds {figures[f'overlap@{K}']:.1%} of the items that the bundle finds"
            raise UserError(problem, "report it: this is a bug")
        faiss.write_index(index, str(directory / INDEX))
        return {"index": self.index, **figures, "measured_on": exact.users}

    def indexed(self, exact: ExactLists) -> tuple[Any, dict[str, Any]]:
        """Return the index, and figures of it."""
        import faiss

        vectors_NF = exact.parts.dense.items_NF
        count, size = vectors_NF.shape
        lists = max(1, min(int(4 * count**0.5), count // 39))  # faiss trains each with 39 vectors or more
        index: Any = faiss.index_factory(size, KINDS[self.index].format(lists=lists), faiss.METRIC_INNER_PRODUCT)
        index.train(vectors_NF)
        index.add(vectors_NF)
        if self.index == "ivf":
            index.make_direct_map()
        most = {"hnsw": count, "ivf": lists}.get(self.index, 0)
        depth = self.depth or min(most, FIRST_DEPTH)
        while True:
            if most:
                faiss.ParameterSpace().set_index_parameter(index, DEPTHS[self.index], depth)
            found = exact.overlap(lambda queries, k: index.search(queries, k)[1])
            if self.depth or depth >= most or found >= GOOD:
                return index, {**({"depth": depth} if most else {}), f"overlap@{K}": found}
            depth = min(most, 2 * depth)


@dataclass(frozen=True)
class Peft(Target):
    """The folder of the adapter. Figure: by how much the hidden states of stock PEFT differ, relative to the bundle's.

    Raises:
        UserError: the bundle has no LoRA weights, or PEFT reads others from the files.
    """

    alone = True

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`."""
        bundle = parts.bundle
        model = bundle.facts["model"]
        if not model or not bundle.variant.lora:
            problem = f"{bundle.facts['row']}, which {bundle.directory} holds, has no LoRA weights"
            raise UserError(problem, "export a row of a variant with LoRA, such as per_layer_lora+id")
        # from the model, not the bundle's file: PEFT imports modules that its settings may name
        parts.encoder.model.backbone.model.save_pretrained(directory, safe_serialization=True)
        settings = directory / "adapter_config.json"
        fields = {**json.loads(settings.read_text()), "base_model_name_or_path": model["llm"]["name"]}
        settings.write_text(json.dumps(fields, indent=2, sort_keys=True))
        difference = _difference(parts, directory)
        raise_if_far("adapter_difference", difference, CLOSE)
        return {"adapter_difference": difference}


@torch.no_grad()
def _difference(parts: Parts, directory: Path) -> float:
    from peft import PeftModel

    backbone = parts.encoder.model.backbone
    ids = torch.arange(5, 21)[None].to(backbone.device)
    own = backbone(ids, torch.ones_like(ids))
    stock = PeftModel.from_pretrained(backbone.model.unload(), str(directory))
    other = FrozenBackbone(stock, backbone.pool, sink=backbone.sink).eval()(ids, torch.ones_like(ids))
    return float((own - other).abs().max() / own.abs().max())


@dataclass(frozen=True)
class Hub(Target):
    """A copy of the bundle, whose card a hub reads; it is checked as any bundle that is opened.

    Attributes:
        push: repository to upload it to, `NAME/REPOSITORY`; it is made, and private, if it is not there.
    """

    push: str | None = None
    alone = True

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`."""
        bundle = parts.bundle
        bundle.copy(bundle.manifest["files"], directory)
        write_sealed(directory / MANIFEST, bundle.manifest)
        return {}

    def publish(self, directory: Path) -> str:
        """Upload the folder, with the token that `hf auth login` has saved; return its address.

        Raises:
            UserError: the hub refuses, or cannot be reached; the folder stays.
        """
        if self.push is None:
            return ""
        api: Any = HfApi()
        try:
            address = api.create_repo(self.push, private=True, exist_ok=True)
            api.upload_folder(repo_id=self.push, folder_path=str(directory), ignore_patterns=[".*"])
        except Exception as error:  # the hub refuses, its client does, or the network
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            remedy = "log in with hf auth login, check the name, and give --push again with another --out"
            raise UserError(f"--push {self.push}: {first[:200]}", remedy) from None
        return str(address)
