"""Compare what serving a bundle costs with the least that its work costs, in one run.

    python -m tools.bench.recommend BUNDLE [--users 512] [--items N] [--rounds 3] [--threads 2] [--client SERVED]
    python -m tools.bench.recommend BUNDLE --rates BUNDLE-OR-SERVED ...

| row | time of | over the time of |
| --- | --- | --- |
| batch | recommending to all users | the language model's forward pass over the same prompts, sorted by length |
| search | scores and the best 10 of each user | the matrix product of their vectors |
| search N | the same among N random items, without neighbour tables | the same |
| one user | recommending to one user, warm | the forward pass of that prompt |
| 100 items | adding 100 items, without writing | the forward pass of their prompts |
| client | a cold process of `rarec_client.py`, CPU seconds | a cold `rarec recommend` (upside down: how much less) |
| onnx | 40 users one by one by the warm client | the graph in a plain session of ONNX Runtime, same prompts |
| onnx CPU | the same, CPU seconds | the same |

With --rates: users a second of one call for all users, and milliseconds of one for one user, by each folder, and by
`query.int8.onnx` where it has one.

SERVED is the folder of `rarec export BUNDLE --to onnx --to faiss`. Rounds are interleaved; medians of seconds, and
ratios of these.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import rarec
from rarec.bundle.parts import Parts, sample_histories
from rarec.bundle.recommender import Recommender
from rarec.export.rarec_client import Client, run
from rarec.models.encode import text_batch
from rarec.prompts import Encoded, by_length
from rarec.ranking.rank import VectorScores, best_scores
from tools.bench.measuring import Action, cpu_seconds, in_turns, options, seconds

Rows = npt.NDArray[np.int64]
GOALS = {"batch": 1 / 0.9, "search": 1.3, "search N": 1.3, "one user": 3.0, "100 items": 1.5, "client": 0.1}
GOALS |= {"onnx": 1.3, "onnx CPU": 1.3}
ONE_BY_ONE = 40
"""Users of the rows `onnx`."""


def forward(parts: Parts, prompts: list[Encoded]) -> Callable[[], None]:
    """Return a forward pass of the language model over prompts, with fillers where slots would be."""
    encoder = parts.encoder
    backbone, filler = encoder.model.backbone, encoder.prompts.tokenizer.filler
    slots = np.full(sum(encoder.model.user.slots.values()), filler, np.int32)
    longer = [Encoded(np.concatenate([prompt.tokens_T, slots]), {}) for prompt in prompts]
    batches = [
        text_batch([longer[row] for row in chunk], filler, backbone.device)
        for chunk in by_length(longer, encoder.batch_size)
    ]

    @torch.no_grad()
    def run() -> None:
        for ids_BT, mask_BT in batches:
            backbone(ids_BT, mask_BT)

    return run


def sample_users(recommender: Recommender, count: int, seed: int = 17) -> tuple[list[Rows], list[list[Any]]]:
    """Return made-up histories, as rows and as item ids."""
    rows = sample_histories(recommender.parts, count, seed)
    return rows, [[recommender.items[row] for row in history] for history in rows]


def workloads(bundle: Path, users: int, n_items: int) -> dict[str, tuple[Action, Action]]:
    """Return, by row, what is measured and what it is compared with."""
    recommender = rarec.load(bundle, device="cpu")
    parts = recommender.parts
    rows, histories = sample_users(recommender, users)
    prompts = parts.encoder.prompts
    encoded = [prompts.user(history) for history in rows]
    scored = parts.scored(rows)
    vectors = torch.from_numpy(parts.dense.users(rows).reshape(users, -1, parts.dense.items_NF.shape[1])[:, 0].copy())
    table = torch.from_numpy(parts.dense.items_NF)
    wide = torch.randn(n_items, table.shape[1])
    new = list(range(min(100, len(recommender.items))))
    titles, texts = ([texts[row] for row in new] for texts in (prompts.titles, prompts.texts))
    blank = {name: np.zeros((len(new), source.dim), np.float32) for name, source in parts.encoder.sources.items()}
    longest = max(range(users), key=lambda user: len(encoded[user].tokens_T))
    return {
        "batch": (lambda: recommender.recommend(histories, 10), forward(parts, encoded)),
        "search": (lambda: best_scores(scored, 10, rows), lambda: vectors @ table.T),
        "search N": (lambda: best_scores(VectorScores(vectors, wide), 10, rows), lambda: vectors @ wide.T),
        "one user": (lambda: recommender.recommend([histories[longest]], 10), forward(parts, [encoded[longest]])),
        "100 items": (
            lambda: parts.model.encode_new(titles, texts, blank),
            forward(parts, [prompts.item(row) for row in new]),
        ),
    }


def client_queries(folder: Path, histories: list[list[Any]], threads: int) -> tuple[Action, Action]:
    """Return recommending to users one by one by the client, and its graph alone over the same prompts."""
    import onnxruntime

    client = Client(folder, threads)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 3
    bare = onnxruntime.InferenceSession(str(folder / "query.onnx"), settings, providers=["CPUExecutionProvider"])
    rows = [[client.row_of[str(item)] for item in history] for history in histories]
    inputs = [client.inputs([history]) for history in rows]

    def recommend() -> None:
        for history in histories:
            client.recommend([history], 10)

    def query() -> None:
        for given in inputs:
            run(bare, given)

    return recommend, query


def rates(folders: list[Path], histories: list[list[Any]]) -> None:
    """Print the rate of each folder, a bundle or one with the ONNX client."""
    print(f"{'folder':40}{'users/s':>10}{'one, ms':>10}{'MB':>8}")
    for folder in folders:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        for name, recommend in recommenders(folder):
            recommend(histories[:8])
            single = statistics.median(seconds(partial(recommend, [history])) for history in histories[:40])
            rate = len(histories) / seconds(partial(recommend, histories))
            print(f"{name:40}{rate:10.0f}{1000 * single:10.1f}{size:8.0f}")


def recommenders(folder: Path) -> Iterator[tuple[str, Callable[[list[list[Any]]], object]]]:
    """Yield the recommender of a bundle, or one for each query graph of a folder with the client."""
    graphs = sorted(path.name for path in folder.glob("query*.onnx"))
    for graph in graphs:
        yield f"{folder.name} {graph}", Client(folder, graph=graph).recommend
    if not graphs:
        recommender = rarec.load(folder, device="cpu")
        yield f"{folder.name} {recommender.bundle.facts['row']}", recommender.recommend


def main() -> None:
    """Measure, and print the table."""
    sizes = {"users": 512, "items": 50_000, "rounds": 3, "threads": torch.get_num_threads()}
    arguments = options(__doc__, "bundle", **sizes, client=Path, rates=[Path])
    torch.set_num_threads(arguments.threads)
    if arguments.rates:
        rates(arguments.rates, sample_users(rarec.load(arguments.bundle, device="cpu"), arguments.users)[1])
        return
    pairs = workloads(arguments.bundle, arguments.users, arguments.items)
    spent = in_turns(arguments.rounds, {(row, side): pair[side] for row, pair in pairs.items() for side in (0, 1)})
    if arguments.client:
        users = sample_users(rarec.load(arguments.bundle, device="cpu"), ONE_BY_ONE)[1]
        actions = dict(enumerate(client_queries(arguments.client, users, arguments.threads)))
        for row, clock in (("onnx", time.perf_counter), ("onnx CPU", time.process_time)):
            spent |= {(row, side): took for side, took in in_turns(arguments.rounds, actions, clock).items()}
        item = str(rarec.load(arguments.bundle).items[0])
        client = [sys.executable, str(arguments.client / "rarec_client.py"), str(arguments.client), item]
        command = [sys.executable, "-m", "rarec", "recommend", str(arguments.bundle), "--history", item]
        for side, words in enumerate((client, command)):
            spent["client", side] = np.array([cpu_seconds(words) for _ in range(arguments.rounds)])
    print(f"{'row':12}{'own, s':>10}{'other, s':>10}{'ratio':>8}{'goal':>8}")
    for row, goal in GOALS.items():
        if (row, 0) in spent:
            own, other = (float(np.median(spent[row, side])) for side in (0, 1))
            print(f"{row:12}{own:10.3f}{other:10.3f}{own / other:8.2f}{goal:8.2f}")


if __name__ == "__main__":
    main()
