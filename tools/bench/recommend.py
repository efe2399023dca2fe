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

With --rates: users a second of one call for all users, and milliseconds of one for one user, by each folder, and by
`query.int8.onnx` where it has one.

SERVED is the folder of `rarec export BUNDLE --to onnx --to faiss`. Rounds are interleaved; medians of seconds, and
ratios of these.
"""

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import rarec
from rarec.bundle.parts import Parts, sample_histories
from rarec.export.rarec_client import Client
from rarec.models.encode import text_batch
from rarec.prompts import Encoded, by_length
from rarec.ranking.rank import VectorScores, best_scores
from tools.bench.measuring import seconds

Rows = npt.NDArray[np.int64]
GOALS = {"batch": 1 / 0.9, "search": 1.3, "search N": 1.3, "one user": 3.0, "100 items": 1.5, "client": 0.1}


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


def workloads(bundle: Path, users: int, n_items: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return, by row, what is measured and what it is compared with."""
    recommender = rarec.load(bundle, device="cpu")
    parts, items = recommender.parts, recommender.items
    rows = sample_histories(parts, users)
    histories = [[items[row] for row in history] for history in rows]
    prompts = parts.encoder.prompts
    encoded = [prompts.user(history) for history in rows]
    scored = parts.scored(rows)
    vectors = torch.from_numpy(parts.dense.users(rows).reshape(users, -1, parts.dense.items_NF.shape[1])[:, 0].copy())
    table = torch.from_numpy(parts.dense.items_NF)
    wide = torch.randn(n_items, table.shape[1])
    new = list(range(min(100, len(items))))
    titles, texts = ([of[row] for row in new] for of in (prompts.titles, prompts.texts))
    blank = {name: np.zeros((len(new), source.dim), np.float32) for name, source in parts.encoder.sources.items()}
    one = max(range(users), key=lambda at: len(encoded[at].tokens_T))
    return {
        "batch": (lambda: recommender.recommend(histories, 10), forward(parts, encoded)),
        "search": (lambda: best_scores(scored, 10, rows), lambda: vectors @ table.T),
        "search N": (lambda: best_scores(VectorScores(vectors, wide), 10, rows), lambda: vectors @ wide.T),
        "one user": (lambda: recommender.recommend([histories[one]], 10), forward(parts, [encoded[one]])),
        "100 items": (
            lambda: parts.encode_new(titles, texts, blank),
            forward(parts, [prompts.item(row) for row in new]),
        ),
    }


def rates(folders: list[Path], histories: list[list[Any]]) -> None:
    """Print the rate of each folder, a bundle or one with the ONNX client."""
    print(f"{'folder':40}{'users/s':>10}{'one, ms':>10}{'MB':>8}")
    for folder in folders:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        for name, recommend in recommenders(folder):
            recommend(histories[:8])
            one = statistics.median(seconds(partial(recommend, [history])) for history in histories[:40])
            rate = len(histories) / seconds(partial(recommend, histories))
            print(f"{name:40}{rate:10.0f}{1000 * one:10.1f}{size:8.0f}")


def recommenders(folder: Path) -> Iterator[tuple[str, Callable[[list[list[Any]]], object]]]:
    """Yield the recommender of a bundle, or one for each query graph of a folder with the client."""
    graphs = sorted(path.name for path in folder.glob("query*.onnx"))
    for graph in graphs:
        yield f"{folder.name} {graph}", Client(folder, graph=graph).recommend
    if not graphs:
        recommender = rarec.load(folder, device="cpu")
        yield f"{folder.name} {recommender.bundle.facts['row']}", recommender.recommend


def cold(command: list[str]) -> float:
    """Return the CPU seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--users", type=int, default=512)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--client", type=Path, help="folder of --to onnx --to faiss")
    parser.add_argument("--rates", type=Path, nargs="+", help="folders to compare instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.rates:
        recommender = rarec.load(arguments.bundle, device="cpu")
        rows = sample_histories(recommender.parts, arguments.users)
        rates(arguments.rates, [[recommender.items[row] for row in history] for history in rows])
        return
    pairs = workloads(arguments.bundle, arguments.users, arguments.items)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for own, other in pairs.values():  # warm
        own(), other()
    for _ in range(arguments.rounds):
        for name, (own, other) in pairs.items():
            found[name].append((seconds(own), seconds(other)))
    if arguments.client:
        item = str(rarec.load(arguments.bundle).items[0])
        client = [sys.executable, str(arguments.client / "rarec_client.py"), str(arguments.client), item]
        command = [sys.executable, "-m", "rarec", "recommend", str(arguments.bundle), "--history", item]
        found["client"] = [(cold(client), cold(command)) for _ in range(arguments.rounds)]
    print(f"{'row':12}{'own, s':>10}{'other, s':>10}{'ratio':>8}{'goal':>8}")
    for name, times in found.items():
        own_s, other_s = (statistics.median(of) for of in zip(*times, strict=True))
        print(f"{name:12}{own_s:10.3f}{other_s:10.3f}{own_s / other_s:8.2f}{GOALS[name]:8.2f}")


if __name__ == "__main__":
    main()
