"""The side of RecTools in peers.py: runs in its own environment, and imports nothing of rarec.

    python peers_rectools.py training|ranking DIR THREADS

Prints one line of JSON.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch


def training(root: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Train, and return the seconds of the median epoch and HR@10."""
    import pytorch_lightning as lightning
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    class Clock(lightning.Callback):  # type: ignore[misc]
        """Notes the duration of each epoch; of the class, because RecTools trains with a copy."""

        spent: ClassVar[list[float]] = []

        def on_train_epoch_start(self, *_: object) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self, *_: object) -> None:
            self.spent.append(time.perf_counter() - self.started)

    clock = Clock()

    def trainer() -> lightning.Trainer:
        return lightning.Trainer(
            max_epochs=settings["epochs"],
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )

    log = pd.DataFrame(np.load(root / "train.npy"), columns=["user_id", "item_id", "place"])
    log["datetime"], log["weight"] = pd.to_datetime(log.pop("place"), unit="D"), 1
    dataset = Dataset.construct(log)
    lightning.seed_everything(0)
    model = SASRecModel(
        n_blocks=1,
        n_heads=1,
        n_factors=settings["dim"],
        dropout_rate=settings["dropout"],
        session_max_len=settings["max_history"],
        loss="softmax",
        lr=settings["lr"],
        batch_size=settings["batch_size"],
        epochs=settings["epochs"],
        get_trainer_func=trainer,
        recommend_torch_device="cpu",
    )
    model.fit(dataset)
    targets = pd.DataFrame(np.load(root / "targets.npy"), columns=["user_id", "item_id"])
    users = targets.user_id.to_numpy()
    best = model.recommend(users=users, dataset=dataset, k=settings["best"], filter_viewed=True)
    hits = best.merge(targets, on=["user_id", "item_id"])
    return {"seconds": statistics.median(clock.spent[1:]), "hr@10": len(hits) / len(targets)}


def ranking(root: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Rank, and return the seconds of the faster of two calls."""
    from rectools.models.rank import Distance, TorchRanker
    from scipy import sparse

    users_BD, items_ND, seen_BS = (np.load(root / f"{name}.npy") for name in ("users", "items", "seen"))
    rows = np.repeat(np.arange(len(users_BD)), seen_BS.shape[1])
    ones = np.ones(len(rows), np.float32)
    seen = sparse.csr_matrix((ones, (rows, seen_BS.flatten())), (len(users_BD), len(items_ND)))
    ranker = TorchRanker(Distance.DOT, "cpu", torch.from_numpy(users_BD), torch.from_numpy(items_ND))
    spent = []
    for _ in range(2):
        started = time.perf_counter()
        ranker.rank(np.arange(len(users_BD)), k=settings["best"], filter_pairs_csr=seen)
        spent.append(time.perf_counter() - started)
    return {"seconds": min(spent)}


if __name__ == "__main__":
    part, root = {"training": training, "ranking": ranking}[sys.argv[1]], Path(sys.argv[2])
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(part(root, json.loads((root / "settings.json").read_text()))))
