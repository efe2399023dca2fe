"""Part `ranking` of bench.py: ranking a whole catalogue beside the bare matrix product, and beside generation.

bare product: the scores of the same users, a block at a time into one buffer: no ranks, no seen items.
generation:   a decoder of SmolLM2's shape writes one of 20 candidate titles behind the history, which is then matched:
              what LLaRA does for a user. rarec encodes such histories by the same model, and ranks 12,000 items.
"""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rarec.ranking.rank import BLOCK_USERS, VectorScores, best_scores, rank_scores
from tools.bench.measuring import Row, seconds

SHAPES = {"12,000 items of 384": (4096, 12_000, 384), "200,000 items of 64": (1024, 200_000, 64)}
SEEN, CANDIDATES, TITLE, HISTORY, USERS = 10, 20, 10, 60, 16
"""Seen items; candidates; tokens of a title and of a history; users that rarec encodes at a time."""
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
}


def rows(quick: bool) -> list[Row]:
    """Measure every shape, and generation."""
    return [
        *(ranking(name, *shape, 3 if quick else 9) for name, shape in SHAPES.items()),
        generation(1 if quick else 3),
    ]


def ranking(name: str, users: int, items: int, dim: int, rounds: int) -> Row:
    """Rank, and multiply, in turns."""
    rng = np.random.default_rng(0)
    users_BD = rng.standard_normal((users, dim), dtype=np.float32)
    items_ND = rng.standard_normal((items, dim), dtype=np.float32)
    targets_B, seen = rng.integers(items, size=users), list(rng.integers(items, size=(users, SEEN)))
    spent: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(rounds + 1):
        spent["bare"].append(seconds(lambda: bare_product(users_BD, items_ND)))
        spent["ours"].append(seconds(lambda: rank_scores(VectorScores(users_BD, items_ND), targets_B, seen)))
    ours, bare = (statistics.median(spent[way][1:]) for way in ("ours", "bare"))
    return Row.most(f"ranking / bare product, {users:,} users, {name}", ours, bare, 1.3, "s")


def bare_product(users_BD: np.ndarray, items_ND: np.ndarray) -> None:
    """Compute the scores alone, into one buffer."""
    out = torch.empty(BLOCK_USERS, len(items_ND))
    items_DN = torch.from_numpy(items_ND).T
    for part in torch.from_numpy(users_BD).split(BLOCK_USERS):
        torch.mm(part, items_DN, out=out[: len(part)])


def generation(rounds: int) -> Row:
    """Encode and rank for some users, and generate for one, in turns."""
    ours, other = generating()
    spent = [(USERS / seconds(ours), 1 / seconds(other)) for _ in range(rounds + 1)][1:]
    rate, written = (statistics.median(way) for way in zip(*spent, strict=True))
    return Row.least("ranking / generating one of 20 titles, SmolLM2's shape", rate, written, 100, "users/s")


def generating() -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what encodes and ranks for `USERS` users, and what generates for one."""
    llm: Any = LlamaForCausalLM(LlamaConfig(**SMOLLM2, num_key_value_heads=3, vocab_size=49_152)).eval()
    ids_BT = torch.randint(3, 49_000, (USERS, HISTORY))
    prompt_1T = torch.randint(3, 49_000, (1, HISTORY + CANDIDATES * TITLE))
    items_ND = np.random.default_rng(0).standard_normal((12_000, SMOLLM2["hidden_size"]), dtype=np.float32)

    @torch.no_grad()
    def ours() -> None:
        users_BD = llm.model(input_ids=ids_BT).last_hidden_state.mean(1).numpy()
        best_scores(VectorScores(users_BD, items_ND), 10, [np.empty(0, np.int64)] * USERS)

    @torch.no_grad()
    def other() -> None:
        asked = torch.ones_like(prompt_1T)
        llm.generate(
            prompt_1T, attention_mask=asked, min_new_tokens=TITLE, max_new_tokens=TITLE, do_sample=False, pad_token_id=0
        )

    return ours, other
