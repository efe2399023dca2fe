"""The targets that need no graph.

`--to vectors`: items with their vectors, neighbour tables, facts; `--to faiss`: an index of the vectors as well;
`--to peft`: the LoRA weights alone, as stock PEFT loads them; `--to hub`: a model hub's repository.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import HfApi

from rarec.bundle.bundle import TABLES
from rarec.bundle.parts import DenseForm, Parts, sample_histories
from rarec.data.tables import write_rows
from rarec.errors import UserError
from rarec.export import Target, raise_if_far
from rarec.models.backbone import FrozenBackbone
from rarec.neighbours.base import SCHEMA, pairs_of
from rarec.storage.artefacts import MANIFEST, write_sealed
from rarec.storage.files import read_json, write_json

ITEMS, FACTS, INDEX = "items.parquet", "client.json", "index.faiss"
KINDS = {"flat": "Flat", "hnsw": "HNSW32", "ivf": "IVF{lists},Flat", "sqfp16": "SQfp16"}
"""What `--index` takes, as faiss' factory names it."""
SEARCHED = {"hnsw": "efSearch=128", "ivf": "nprobe=16"}
"""Parameters of the search, which are part of the index."""
CHECKED, K = 200, 10
"""Users, and items of each, for which an index is compared with the exact search."""
CLOSE = 1e-5
"""Largest difference of hidden states between stock PEFT and the bundle, relative to the largest state."""


@dataclass(frozen=True)
class Vectors(Target):
    """`items.parquet`, the neighbour tables and `client.json`, for vector databases.

    `items.parquet` has a row for each item: `id`, `values` (its vector), `title`, `text`, `train_count`. The score of
    a user and an item is the inner product of the user's `Recommender.query_vectors` and `values`, plus what the
    neighbour tables add.
    """

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`."""
        form, bundle = parts.dense, parts.bundle
        catalogue = bundle.catalogue
        size = form.items_NF.shape[1]
        values = pa.FixedSizeListArray.from_arrays(pa.array(form.items_NF.ravel()), size)
        columns = {"id": catalogue.ids, "values": values, "title": catalogue.titles, "text": catalogue.texts}
        pq.write_table(pa.table({**columns, "train_count": catalogue.counts_N}), directory / ITEMS, compression="zstd")
        for name, (ranker, _) in form.sparse.items():
            (directory / TABLES).mkdir(exist_ok=True)
            write_rows([pairs_of(ranker.table_NN)], directory / TABLES / f"{name}.parquet", SCHEMA)
        rule = bundle.facts["neighbours"] or {"newest": 0, "decay": 1.0}
        facts = {
            "row": bundle.facts["row"],
            "items": len(catalogue.titles),
            "dim": size,
            "neighbours": {name: float(weight) for name, (_, weight) in form.sparse.items()},
            "newest": rule["newest"],
            "decay": rule["decay"],
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
    """

    index: str = "flat"
    needs = ("vectors",)
    packages = ("faiss",)

    def __post_init__(self) -> None:
        if self.index not in KINDS:
            raise UserError(f"--index {self.index} is unknown", f"choose from {', '.join(KINDS)}")

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`. Figures: the kind, and the recall of the 10 best items by inner product."""
        import faiss

        form = parts.dense
        count, size = form.items_NF.shape
        lists = max(1, min(int(4 * count**0.5), count // 39))  # faiss trains each with 39 vectors or more
        index: Any = faiss.index_factory(size, KINDS[self.index].format(lists=lists), faiss.METRIC_INNER_PRODUCT)
        index.train(form.items_NF)
        index.add(form.items_NF)
        parameters: Any = faiss.ParameterSpace()
        parameters.set_index_parameters(index, SEARCHED.get(self.index, ""))
        if self.index == "ivf":
            index.make_direct_map()
        recall = _recall(index, form, parts)
        if self.index == "flat" and recall < 1:
            problem = f"the index finds {recall:.1%} of the items that the bundle finds"
            raise UserError(problem, "report it: this is a bug")
        faiss.write_index(index, str(directory / INDEX))
        return {"index": self.index, f"recall@{K}": recall}


def _recall(index: Any, form: DenseForm, parts: Parts) -> float:
    """Return the share of the exact 10 best by inner product that the index finds."""
    users = form.users(sample_histories(parts, CHECKED))
    queries = np.ascontiguousarray(users.reshape(-1, users.shape[-1]), np.float32)
    _, near = index.search(queries, min(K, len(form.items_NF)))
    return float(np.mean([_hit(rows_K, query, form) for rows_K, query in zip(near, queries, strict=True)]))


def _hit(rows_K: npt.NDArray[np.int64], query: npt.NDArray[np.float32], form: DenseForm) -> float:
    """Return the share of an index' items whose score is among the best; items of equal score count alike."""
    scores_N = form.items_NF @ query
    least = np.sort(scores_N)[-len(rows_K)]
    scores_K = scores_N[rows_K[rows_K >= 0]]
    return float((scores_K >= least - 1e-5 * abs(least)).sum() / len(rows_K))


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
