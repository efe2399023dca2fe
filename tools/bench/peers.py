"""Compare with RecTools, in an environment of its own: training of SASRec by the same recipe, and ranking.

    make bench-peers        # builds .venv-peers, then: python -m tools.bench.peers .venv-peers/bin/python

training: 64 dimensions, one block, one head, dropout .2, batches of 128 sequences of at most 50 items, Adam at .001,
          softmax over all items, the same log, as many epochs; sequences a second of the median epoch, without the
          first, and HR@10 of the item after each user's training part, among all items.
ranking:  the 10 best of 50,000 items for 20,000 users, vectors of 64, 10 seen items left out.

Each runs alone, in turns. Both use PyTorch with the same number of threads.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rarec.config.ids import SasRecConfig
from rarec.config.schema import Prepare
from rarec.data.dataset import PreparedDataset
from rarec.distributed.world import SINGLE
from rarec.ids.objective import Windows
from rarec.ids.trainer import Training
from rarec.ids.validation import Validation
from rarec.ranking.rank import VectorScores, best_scores
from rarec.storage.checkpoint_store import CheckpointStore
from rarec.storage.files import write_json
from tools.bench.measuring import Row, log_section, options, prepare_dataset, print_table, seconds
from tools.make_log import make_log

HERE = Path(__file__).resolve().parent
RECIPE: dict[str, Any] = {"dim": 64, "dropout": 0.2, "batch_size": 128, "max_history": 50, "lr": 0.001}
USERS, ITEMS, SEEN, BEST = 20_000, 50_000, 10, 10
EQUAL = 0.97
"""Share of the other's HR@10 from which quality counts as equal."""


def main() -> None:
    """Measure both sides and print the table."""
    arguments = options(__doc__, "python", epochs=12, rounds=3, json=Path)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        dataset = write_inputs(root, arguments.epochs)
        rows = [*training(root, dataset, arguments), ranking(root, arguments)]
    print(f"tools.bench.peers, {torch.get_num_threads()} threads")
    print_table([row.figure() for row in rows])
    if arguments.json is not None:
        write_json(arguments.json, [row.__dict__ | {"met": row.met} for row in rows])
    raise SystemExit(not all(row.met for row in rows))


def write_inputs(root: Path, epochs: int) -> PreparedDataset:
    """Prepare a log; write what RecTools reads: training interactions, targets, vectors, settings."""
    make_log(root / "log", users=8000, items=3000, interactions=80_000, tastes=16)
    dataset = prepare_dataset(Prepare.model_validate(log_section(root / "log")), root)
    interactions: list[tuple[int, int, int]] = []
    for user in range(dataset.n_users):
        own = dataset.sequence(user)[: int(dataset.train_length_U[user])]
        interactions += [(user, item, position) for position, item in enumerate(own.tolist())]
    np.save(root / "train.npy", np.array(interactions))
    targets = dataset.targets("validation")
    np.save(root / "targets.npy", np.array([targets.user_rows, targets.item_rows]).T)
    rng = np.random.default_rng(0)
    np.save(root / "users.npy", rng.standard_normal((USERS, RECIPE["dim"]), dtype=np.float32))
    np.save(root / "items.npy", rng.standard_normal((ITEMS, RECIPE["dim"]), dtype=np.float32))
    np.save(root / "seen.npy", rng.integers(ITEMS, size=(USERS, SEEN)))
    write_json(root / "settings.json", {**RECIPE, "epochs": epochs, "best": BEST})
    return dataset


def theirs(root: Path, python: Path, part: str) -> dict[str, float]:
    """Run a part of the other side in its own environment."""
    command = [str(python), str(HERE / "peers_rectools.py"), part, str(root), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def training(root: Path, dataset: PreparedDataset, arguments: argparse.Namespace) -> list[Row]:
    """Train on both sides."""
    other = theirs(root, arguments.python, "training")
    recipe = SasRecConfig(**RECIPE, negatives=dataset.n_items, epochs=arguments.epochs)
    windows = Windows(dataset, recipe.max_history)
    torch.manual_seed(0)
    training = Training(recipe, dataset.train_counts_N > 0, 0, CheckpointStore(root / "none", 1, ""), SINGLE)

    def take_epoch(epoch: int) -> None:
        for number, batch in enumerate(windows.batches(recipe.batch_size, np.random.default_rng(epoch)), 1):
            training.step(number, batch)

    spent = [seconds(partial(take_epoch, epoch)) for epoch in range(arguments.epochs)]
    quality = Validation(dataset, 0).of_training(training.encoder, training.table)["hr@10"]
    ours, rectools = (len(windows.targets_U) / each for each in (statistics.median(spent[1:]), other["seconds"]))
    return [
        Row.least("ID training / RecTools' SASRec", ours, rectools, 2, "samples/s"),
        Row.least("its HR@10 / RecTools'", quality, other["hr@10"], EQUAL, ""),
    ]


def ranking(root: Path, arguments: argparse.Namespace) -> Row:
    """Rank on both sides, in turns."""
    users_BD, items_ND, seen_BS = (np.load(root / f"{name}.npy") for name in ("users", "items", "seen"))
    spent = []
    for _ in range(arguments.rounds):
        other = theirs(root, arguments.python, "ranking")["seconds"]
        own = min(seconds(lambda: best_scores(VectorScores(users_BD, items_ND), BEST, list(seen_BS))) for _ in range(2))
        spent.append((USERS / own, USERS / other))
    ours, rectools = (statistics.median(way) for way in zip(*spent, strict=True))
    return Row.least("ranking / RecTools' ranker", ours, rectools, 1, "users/s")


if __name__ == "__main__":
    main()
