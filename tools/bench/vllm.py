"""Compare what a vLLM server answers, and how fast, with the bundle that it serves.

    python -m tools.bench.vllm BUNDLE FOLDER URL [--users 200]

BUNDLE is a bundle, FOLDER what `rarec export BUNDLE --to vllm --out FOLDER` wrote, URL a server that FOLDER/serve.sh
started. Users are made up: 1 to 20 items each, popular ones more often.
"""

import argparse
import importlib
import operator
import sys
from functools import partial
from pathlib import Path

import numpy as np

import rarec
from tools.bench.measuring import seconds
from tools.bench.recommend import sample_users


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("url")
    parser.add_argument("--users", type=int, default=200)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.folder))
    client = importlib.import_module("rarec_vllm").VllmClient(arguments.folder, arguments.url)
    recommender = rarec.load(arguments.bundle, device="cpu")
    rows, histories = sample_users(recommender, arguments.users, seed=3)
    served = [[item for item, *_ in best] for best in client.recommend(histories)]
    expected = [[best[0] for best in user] for user in recommender.recommend(histories).items]
    shared = [len(set(best) & set(right)) for best, right in zip(served, expected, strict=True)]
    vectors, right = (
        client.queries([[int(row) for row in history] for history in rows]),
        recommender.query_vectors(histories),
    )
    right = right.reshape(vectors.shape)
    off = np.linalg.norm(vectors - right, axis=-1) / np.linalg.norm(right, axis=-1)
    print(f"identical top 10: {sum(map(operator.eq, served, expected))} of {len(served)} users")
    print(f"items shared among the 10: {np.mean(shared) / 10:.4f}")
    print(f"query vectors apart, relative to their length: median {np.median(off):.1e}, most {off.max():.1e}")
    for name, recommend in (("vLLM", client.recommend), ("rarec, torch", recommender.recommend)):
        print(f"{name}: {len(histories) / seconds(partial(recommend, histories)):.1f} users/s")


if __name__ == "__main__":
    main()
