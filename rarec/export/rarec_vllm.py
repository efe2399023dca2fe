"""Recommend by a vLLM server, with the folder that it serves: `python rarec_vllm.py FOLDER URL ITEM,ITEM`."""

import base64
import json
import os
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from rarec_client import Client, run

AT_ONCE, TIMEOUT = 64, 120.0
"""Requests that are under way together, which vLLM batches, and the seconds that one may take."""


class VllmClient(Client):
    """`VllmClient(folder, url).recommend([["sku-1", "sku-7"]], k=10)`, as `Client`; the server has the language model.

    Args:
        folder: of the export.
        url: of the server, such as http://127.0.0.1:8000.
        threads: of ONNX Runtime; 0 for as many as there are cores.
        key: what the server was started with as --api-key.
        check: whether to compare the server's states with the bundle's first.

    Raises:
        RuntimeError: the server's states are not those of the bundle: its slots do not arrive, or it is another model.
    """

    def __init__(self, folder: Path | str, url: str, threads: int = 0, key: str = "", check: bool = True) -> None:
        super().__init__(folder, threads)
        self.slots = self.session("slots.onnx") if "slots.onnx" in self.files else None
        self.served = self.facts["vllm"]
        self.url = url.rstrip("/")
        self.key = key
        self.words = np.load(self.checked("words.npy"), mmap_mode="r") if "words.npy" in self.files else None
        if check:
            self._check(np.load(self.checked("check.npz")))

    def queries(self, rows: list[list[int]]) -> Any:
        """Return query vectors, (B, K, F), after histories of item rows."""
        given = self.inputs(rows)
        return run(self.graph, {**given, "state": self._states(given)})

    def states(self, rows: list[list[int]]) -> Any:
        """Return the server's pooled states (B, D) after histories of item rows."""
        return self._states(self.inputs(rows))

    def _states(self, given: dict[str, Any]) -> Any:
        slots = np.zeros((len(given["history"]), 0), np.float32)
        if self.slots is not None:
            slots = run(self.slots, given)
        texts = [tokens[tokens >= 0] for tokens in given["input_ids"]]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return np.stack(list(pool.map(self._state, texts, given["slot_positions"], slots)))

    def _state(self, tokens: Any, places: Any, slots: Any) -> Any:
        if self.words is None:
            vectors = base64.urlsafe_b64encode(np.ascontiguousarray(slots, "<f4").tobytes()).decode()
            request_id = f"slots.{vectors}.{os.urandom(8).hex()}"
            return self._ask("/v1/embeddings", "embedding", input=tokens.tolist(), request_id=request_id)
        embeddings = np.array(self.words[tokens], np.float32)
        filled = places[places >= 0]
        embeddings[filled] = slots[places >= 0]
        message = {"role": "user", "content": [_part(embeddings)]}
        states = self._ask("/pooling", "data", messages=[message], task="token_embed").reshape(len(tokens), -1)
        text = np.delete(states, [0, *filled], axis=0)  # without the attention sink
        return text.mean(0) if self.served["pool"] == "mean" else text[-1]

    def _ask(self, path: str, field: str, **request: Any) -> Any:
        settings = {"model": self.served["name"], "encoding_format": "base64", "add_special_tokens": False}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        post = urllib.request.Request(self.url + path, json.dumps({**request, **settings}).encode(), headers)
        with urllib.request.urlopen(post, timeout=TIMEOUT) as answer:
            state = np.frombuffer(base64.b64decode(json.load(answer)["data"][0][field]), np.float32)
        if not np.isfinite(state).all():
            raise RuntimeError(f"{self.url} has lost a user's slots: its log says why")
        return state

    def _check(self, expected: Any) -> None:
        """Compare states with the bundle's: they must be nearer to these than to those without slots."""
        rows = [row[row >= 0].tolist() for row in expected["histories"]]
        right, bare = expected["states"], expected["bare"]
        apart, wrong = (np.linalg.norm(states - right, axis=1) for states in (self.states(rows), bare))
        if not (apart < np.maximum(wrong / 2, 1e-3 * np.linalg.norm(right, axis=1))).all():
            raise RuntimeError(f"{self.url} does not answer what the bundle says: start it by the folder's serve.sh")


def _part(embeddings: Any) -> dict[str, str]:
    """Return a prompt of embeddings as a part of a message; vLLM reads a tensor as torch writes it."""
    import torch

    torch.save(torch.from_numpy(embeddings), file := BytesIO())
    return {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}


if __name__ == "__main__":
    best = VllmClient(sys.argv[1], sys.argv[2]).recommend([sys.argv[3].split(",")])[0]
    print("\n".join("{}\t{}\t{:.4f}".format(*item) for item in best))
