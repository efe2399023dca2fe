"""Parts `ranking` and `growth` of `python -m tools.bench`.

ranking: a whole catalogue beside the bare matrix product, and beside generation.

- bare product: the scores of the same users, a block at a time into one buffer: no ranks, no seen items.
- generation: a decoder of SmolLM2's shape writes one of 20 candidate titles behind the history, which is then matched:
  what LLaRA does for a user. rarec encodes such histories by the same model, and ranks 12,000 items.

growth: ten times as much of something takes at most ten times as long, and memory stays.

- samples: an epoch of the stream, over ten times as many shards, by one process and by one of two; and the memory.
- items: ranking for the same users. history: an epoch of an ID model's windows, over histories ten times as long.
- 10 million items of 64 dimensions, ranked: this process's own memory, beside 4 GB.
"""

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rarec.data.dataset import PreparedDataset
from rarec.data.tables import Column
from rarec.ids.objective import Windows
from rarec.ranking.rank import BLOCK_USERS, VectorScores, best_scores, rank_scores
from tools.bench.data_stream import read_epoch, resident_over_an_epoch, stream_of, write_different, write_same
from tools.bench.measuring import GB, Action, Row, apart, in_turns, memory
from tools.bench.small_runs import llama

SHAPES = {"12,000 items of 384": (4096, 12_000, 384), "200,000 items of 64": (1024, 200_000, 64)}
SEEN, CANDIDATES, TITLE, HISTORY, USERS = 10, 20, 10, 60, 16
"""Seen items; candidates; tokens of a title and of a history; users that rarec encodes at a time."""
SMOLLM2 = llama(576, 1536, 30, (9, 3), vocab_size=49_152)
TEN, ALLOWED = 10, 10.5


def rows(quick: bool) -> list[Row]:
    """Measure every shape, and generation."""
    return [
        *(ranking(name, *shape, 3 if quick else 9) for name, shape in SHAPES.items()),
        generation(1 if quick else 3),
    ]


def ranking(name: str, users: int, items: int, dim: int, rounds: int) -> Row:
    """Rank, and multiply, in turns."""
    spent = in_turns(rounds, rankings(items, users, dim))
    ours, bare = (float(np.median(spent[way])) for way in ("rarec", "bare product"))
    return Row.most(f"ranking / bare product, {users:,} users, {name}", ours, bare, 1.3, "s")


def rankings(items: int, users: int = 512, dim: int = 64) -> dict[str, Action]:
    """Return a ranking of so many items for so many users, and its products alone."""
    rng = np.random.default_rng(0)
    users_BD, items_ND = (rng.standard_normal((count, dim), dtype=np.float32) for count in (users, items))
    targets_B, seen = rng.integers(items, size=users), list(rng.integers(items, size=(users, SEEN)))
    return {
        "rarec": lambda: rank_scores(VectorScores(users_BD, items_ND), targets_B, seen),
        "bare product": lambda: bare_product(users_BD, items_ND),
    }


def ranked(items: int) -> Action:
    """Return a ranking of so many items for 512 users."""
    return rankings(items)["rarec"]


def bare_product(users_BD: np.ndarray, items_ND: np.ndarray) -> None:
    """Compute the scores alone, into one buffer."""
    out = torch.empty(BLOCK_USERS, len(items_ND))
    items_DN = torch.from_numpy(items_ND).T
    for part in torch.from_numpy(users_BD).split(BLOCK_USERS):
        torch.mm(part, items_DN, out=out[: len(part)])


def generation(rounds: int) -> Row:
    """Encode and rank for some users, and generate for one, in turns."""
    spent = in_turns(rounds, generating())
    rate, written = USERS / float(np.median(spent["rarec"])), 1 / float(np.median(spent["generating"]))
    return Row.least("ranking / generating one of 20 titles, SmolLM2's shape", rate, written, 100, "users/s")


def generating() -> dict[str, Action]:
    """Return what encodes and ranks for `USERS` users, and what generates for one."""
    llm: Any = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).eval()
    ids_BT = torch.randint(3, 49_000, (USERS, HISTORY))
    prompt_1T = torch.randint(3, 49_000, (1, HISTORY + CANDIDATES * TITLE))
    items_ND = np.random.default_rng(0).standard_normal((12_000, SMOLLM2["hidden_size"]), dtype=np.float32)

    @torch.no_grad()
    def encode_and_rank() -> None:
        users_BD = llm.model(input_ids=ids_BT).last_hidden_state.mean(1).numpy()
        best_scores(VectorScores(users_BD, items_ND), 10, [np.empty(0, np.int64)] * USERS)

    @torch.no_grad()
    def generate() -> None:
        lengths = {"min_new_tokens": TITLE, "max_new_tokens": TITLE}
        llm.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), do_sample=False, pad_token_id=0, **lengths)

    return {"rarec": encode_and_rank, "generating": generate}


def growth(quick: bool) -> list[Row]:
    """Measure what grows."""
    rounds = 2 if quick else 5
    items = 1_000_000 if quick else 10_000_000
    return [
        *samples(2 if quick else 10, rounds),
        grown("items: ten times as many, ranking for 512 users", ranked, 20_000, rounds),
        grown("history: ten times as long, windows of an ID model", windows, 50, rounds),
        Row.most(f"{items:,} items of 64 ranked / 4 GB", apart(own_memory, items), 4 * items / 10_000_000, 1, "GB"),
    ]


def samples(shards: int, rounds: int) -> list[Row]:
    """Read an epoch of few shards and of ten times as many."""
    with tempfile.TemporaryDirectory() as scratch:
        few, many = Path(scratch) / "few", Path(scratch) / "many"
        write_different(few, shards, 1024)
        write_same(many, few, TEN * shards)

        def reading(ranks: int) -> Callable[[int], Action]:
            return lambda size: partial(read_epoch, *stream_of(few if size == 1 else many, "batch_size"), ranks)

        rows = [
            grown("samples: ten times as many, an epoch of the stream", reading(1), 1, rounds),
            grown("samples: ten times as many, one of two ranks' part of an epoch", reading(2), 1, rounds),
        ]
        much, little = (apart(resident_over_an_epoch, directory)[2] for directory in (many, few))
    return [*rows, Row.most("samples: ten times as many, memory", much, little, 1.1, "MiB")]


def grown(name: str, action: Callable[[int], Action], size: int, rounds: int) -> Row:
    """Time an action of a size, and of ten times that, in turns."""
    spent = in_turns(rounds, {"little": action(size), "much": action(TEN * size)})
    return Row.most(name, float(np.median(spent["much"])), float(np.median(spent["little"])), ALLOWED, "s")


def column(values: Iterable[Any]) -> Column[Any]:
    """Return a column of these values."""
    return Column(pa.chunked_array([list(values)]))


def windows(length: int) -> Action:
    """Return an epoch of windows over histories of so many items."""
    users = 2000
    lengths_U = np.full(users, length, np.int32)
    dataset = PreparedDataset(
        directory=Path(),
        manifest={},
        hash="",
        user_ids=column(range(users)),
        item_ids=column(range(1000)),
        titles=column([""] * 1000),
        texts=column([""] * 1000),
        train_counts_N=np.ones(1000, np.int64),
        starts_U=np.arange(users, dtype=np.int64) * length,
        lengths_U=lengths_U,
        train_length_U=lengths_U - 2,
        validation_U=lengths_U - 2,
        test_U=lengths_U - 1,
        item_rows_I=np.random.default_rng(0).integers(0, 1000, users * length).astype(np.int32),
    )
    return partial(read_windows, Windows(dataset, 50))


def read_windows(windows: Windows) -> None:
    """Read an epoch and keep nothing."""
    for batch in windows.batches(128, np.random.default_rng(0)):
        assert batch.n_targets


def own_memory(items: int) -> float:
    """Return the gigabytes that ranking so many items takes, their vectors included."""
    before = memory("VmRSS")
    ranked(items)()
    return (memory("VmHWM") - before) * GB
