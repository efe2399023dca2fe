"""The targets that need no graph.

`--to vectors`: items with their vectors, neighbour tables, facts; `--to faiss`: an index of the vectors as well;
`--to peft`: the LoRA weights alone, as stock PEFT loads them; `--to hub`: a model hub's repository.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import HfApi

from rarec.bundle.bundle import TABLES
from rarec.bundle.parts import Parts
from rarec.data.tables import write_rows
from rarec.errors import UserError
from rarec.export import Target, raise_if_far
from rarec.export.approximation import ExactLists, K
from rarec.models.backbone import FrozenBackbone
from rarec.neighbours.base import SCHEMA, pairs_of
from rarec.storage.artefacts import MANIFEST, write_sealed
from rarec.storage.files import read_json, write_json

ITEMS, FACTS, INDEX = "items.parquet", "client.json", "index.faiss"
KINDS = {"flat": "Flat", "hnsw": "HNSW32", "ivf": "IVF{lists},Flat", "sqfp16": "SQfp16"}
"""What `--index` takes, as faiss' factory names it."""
DEPTHS = {"hnsw": "efSearch", "ivf": "nprobe"}
"""What `--depth` is of an index that looks at some items alone, as faiss names it; it is part of the index."""
FIRST_DEPTH, GOOD = 16, 0.99
"""The depth that is tried first, and the share of the exact lists that the default depth finds, if any depth does."""
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
