"""Make ID vectors that know less: of an ID model trained on some of the users, and with random vectors for some items.

    python -m tools.make_weak_ids CONFIG --out DIR [--shares 1.0 0.3 0.1] [--random 0.5 0.9]

DIR/share-SHARE.npy are the item vectors of CONFIG's ID model, trained on the older half (`ids.holdout`) of the
interactions of that share of the users; in DIR/random-SHARE.npy that share of the items of the first have random
vectors instead. Beside each lie the item ids, as `ids.imported` takes them. configs/sweeps/beauty_weak.yaml reads them.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rarec.config.ids import OLDER
from rarec.entry import open_run
from rarec.stages.run import Run
from rarec.storage.directories import new_directory

Ids = list[Any]
Vectors = np.ndarray[Any, np.dtype[np.float32]]
SEED = 17


def main() -> None:
    """Make the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.3, 0.1])
    parser.add_argument("--random", type=float, nargs="*", default=[0.5, 0.9])
    options = parser.parse_args()
    run = open_run(options.config)
    log = pq.read_table(run.config.prepare.interactions.path)
    with new_directory(options.out, replace=False) as made:
        runs = {share: trained(run, options.config, log, share) for share in options.shares}
        tables = {f"share-{share}": table for share, table in runs.items()}
        first = runs[options.shares[0]]
        tables |= {f"random-{share}": (first[0], randomised(first[1], share)) for share in options.random}
        for name, (ids, vectors_NE) in tables.items():
            np.save(made / f"{name}.npy", vectors_NE, allow_pickle=False)
            (made / f"{name}.txt").write_text("".join(f"{item}\n" for item in ids), encoding="utf-8")
            print(f"{options.out / name}.npy: {len(ids):,} items")


def trained(run: Run, config: Path, log: pa.Table, share: float) -> tuple[Ids, Vectors]:
    """Return the items of a log of some users, and their vectors by an ID model that is trained on it."""
    user = log[run.config.prepare.interactions.user]
    users = user.unique()
    kept = users.take(np.sort(np.random.default_rng(SEED).permutation(len(users))[: round(share * len(users))]))
    with tempfile.TemporaryDirectory(prefix="rarec-") as place:
        pq.write_table(log.filter(pc.is_in(user, kept)), Path(place, "log.parquet"))
        overrides = [f"run.dir={place}/run", "run.shared=null", f"prepare.interactions.path={place}/log.parquet"]
        part = open_run(config, overrides)
        part.run(["prepare"])
        part.make("ids", OLDER)
        return part.dataset.item_ids.whole().to_pylist(), np.array(part.source(OLDER).items_NE)


def randomised(vectors_NE: Vectors, share: float) -> Vectors:
    """Return vectors of which a share are drawn anew, each number from the normal distribution of its column."""
    rng = np.random.default_rng(SEED)
    rows = rng.permutation(len(vectors_NE))[: round(share * len(vectors_NE))]
    drawn_NE = vectors_NE.copy()
    noise = rng.normal(size=(len(rows), vectors_NE.shape[1]))
    drawn_NE[rows] = vectors_NE.mean(0) + vectors_NE.std(0) * noise
    return drawn_NE


if __name__ == "__main__":
    main()
