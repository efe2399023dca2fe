"""Stock vLLM recommends what the bundle recommends, and never without a user's slots: `make test-vllm`."""

import base64
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import numpy as np
import pytest

from rarec.bundle.parts import sample_histories
from rarec.errors import UserError
from rarec.export import write_targets
from tests.pages import DOCS, lines, shell
from tests.ranks import free_port
from tests.recommending import batch_of, tied_log
from tests.vllm_server import BUNDLES, PYTHON, Served, bundle, environment, listening, needs_vllm, served, server

pytestmark = [pytest.mark.vllm, needs_vllm]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Served:
    return served(tmp_path_factory.mktemp("llama"), "every block, mean")


@pytest.fixture(scope="module")
def url(llama):
    with server(llama.folder) as started:
        yield started


def client(folder: Path, url: str, **options):
    sys.path.insert(0, str(folder))
    try:
        for name in ("rarec_client", "rarec_vllm"):
            sys.modules.pop(name, None)
        return importlib.import_module("rarec_vllm").VllmClient(folder, url, threads=1, **options)
    finally:
        sys.path.pop(0)


def assert_the_same(of: Served, url: str) -> None:
    """The bundle's ten items, for 200 users of a log full of ties and an empty history; vectors are within 1e-3."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        histories = [*tied_log(log, of.recommender.items).values(), []]
        expected = [*batch_of(of.recommender, log).values(), of.recommender.recommend([[]], 10, fallback="none")[0]]
    rows = [[of.recommender.items.index(item) for item in history] for history in histories]
    asked = client(of.folder, url)
    found = asked.recommend(histories, 10)
    assert [[item for item, *_ in one] for one in found] == [[one[0] for one in user] for user in expected]
    vectors, right = asked.queries(rows), of.recommender.query_vectors(histories)
    right = right.reshape(vectors.shape)
    assert (np.abs(vectors - right) / np.linalg.norm(right, axis=-1, keepdims=True)).max() < 1e-3


OFFLINE = """
import base64, json, sys
import numpy as np
from vllm import LLM
from vllm.config import KVTransferConfig, PoolerConfig
sys.path.insert(0, sys.argv[1])
if __name__ == "__main__":
    asked = json.load(open(sys.argv[3]))
    names = {"kv_connector": "SlotConnector", "kv_connector_module_path": "rarec_connector"}
    transfer = KVTransferConfig(**names, kv_role="kv_both")
    model = LLM(
        sys.argv[2], runner="pooling", convert="embed", dtype="float32", enforce_eager=True, max_model_len=128,
        enable_prefix_caching=False, enable_chunked_prefill=False, kv_transfer_config=transfer,
        pooler_config=PoolerConfig(pooling_type="MEAN", use_activation=False),
    )
    outputs = model.embed([{"prompt_token_ids": tokens, "cache_salt": salt} for tokens, salt in asked], use_tqdm=False)
    np.save(sys.argv[4], np.array([one.outputs.embedding for one in outputs]))
"""


def test_offline_its_states_are_those_of_the_bundle(llama, tmp_path):
    """First in this file: one vLLM at a time."""
    check = np.load(llama.folder / "check.npz")
    asked = client(llama.folder, "", check=False)
    given = asked.inputs([row[row >= 0].tolist() for row in check["histories"]])
    vectors = asked.slots.run(None, {"history": given["history"]})[0]
    salts = [f"slots.{base64.urlsafe_b64encode(of.tobytes()).decode()}." for of in vectors]
    prompts = [tokens[tokens >= 0].tolist() for tokens in given["input_ids"]]
    (tmp_path / "asked.json").write_text(json.dumps(list(zip(prompts, salts, strict=True))))
    (tmp_path / "offline.py").write_text(OFFLINE)
    paths = [llama.folder, llama.recommender.parts.model.llm_path, tmp_path / "asked.json", tmp_path / "states.npy"]
    command = [PYTHON, str(tmp_path / "offline.py"), *map(str, paths)]
    own = {**environment(), "PYTHONPATH": str(llama.folder)}
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    # not the exit code: now and then a thread of vLLM aborts while Python shuts down, when all is written
    assert (tmp_path / "states.npy").exists(), done.stderr[-3000:]
    np.testing.assert_allclose(np.load(tmp_path / "states.npy"), check["states"], rtol=1e-4, atol=1e-5)


def test_it_recommends_what_the_bundle_recommends(llama, url):
    assert_the_same(llama, url)


EXACT = [name for name in BUNDLES if name not in ("every block, mean", "bfloat16, LoRA")]


@pytest.mark.parametrize("name", EXACT)
def test_other_bundles(tmp_path, name):
    other = served(tmp_path, name)
    with server(other.folder) as url:
        assert_the_same(other, url)


def test_in_bfloat16_its_items_are_mostly_those_of_the_bundle(tmp_path):
    """Both round, in different places."""
    other = served(tmp_path, "bfloat16, LoRA")
    rows = sample_histories(other.recommender.parts, 100, seed=3)
    histories = [[other.recommender.items[row] for row in history] for history in rows]
    with server(other.folder) as url:
        found = client(other.folder, url).recommend(histories, 10)
    expected = other.recommender.recommend(histories, 10).items
    shared = [
        len({one[0] for one in user} & {one[0] for one in own}) for user, own in zip(found, expected, strict=True)
    ]
    assert np.mean(shared) > 9


def test_the_commands_of_the_page(llama, tmp_path):
    """As they are, but for the installation, which is that of these tests (see test_docs), and the port."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(llama.recommender.bundle.directory.parent)
    (tmp_path / "vllm-env").symlink_to(Path(PYTHON).absolute().parents[1])
    port = free_port()
    commands = [
        line.replace("8000", str(port)) for line in lines(DOCS / "vllm.md", "sh") if "vllm-env/bin/py" not in line
    ]
    _, export, start, ask = commands
    shell(export, tmp_path)
    with listening(["bash", "-c", start], port, tmp_path):
        said = shell(ask, tmp_path)
    expected = llama.recommender.recommend([["i001", "i007"]], 10)[0]
    assert [line.split("\t")[0] for line in said.splitlines()] == [one.item for one in expected]


def test_a_request_without_its_slots_gets_no_state_and_the_server_goes_on(llama, url):
    vectors = base64.urlsafe_b64encode(np.ones(16, "<f4").tobytes()).decode()
    bad = base64.urlsafe_b64encode(np.full(16, np.nan, "<f4").tobytes()).decode()
    tokens, right = [4, 5, 5, 5, 20, 21], f"slots.{vectors}.x"
    wrong = [
        ("/v1/embeddings", {"input": tokens}),
        ("/v1/embeddings", {"input": tokens, "request_id": "slots.AAAA.x"}),
        ("/v1/embeddings", {"input": tokens, "request_id": "slots.A.x"}),
        ("/v1/embeddings", {"input": tokens, "request_id": f"slots.{bad}.x"}),
        ("/v1/embeddings", {"input": tokens[:1], "request_id": right}),
        ("/v1/embeddings", {"input": tokens[:4], "request_id": right}),
        ("/v1/embeddings", {"input": tokens * 100, "request_id": right}),
        ("/pooling", {"input": tokens, "task": "token_embed", "request_id": right}),
        ("/score", {"text_1": "red", "text_2": "blue"}),
    ]
    for path, body in wrong:
        answer = httpx.post(url + path, json={"model": "rarec", "encoding_format": "float", **body}, timeout=60)
        assert 400 <= answer.status_code < 500, (body, answer.text[:200])
    with pytest.raises(RuntimeError, match="slots"):
        client(llama.folder, url)._ask("/v1/embeddings", "embedding", input=tokens)
    body = {"model": "rarec", "input": tokens, "request_id": right}
    assert np.isfinite(httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).json()["data"][0]["embedding"]).all()
    assert_the_same(llama, url)


def test_a_server_that_loses_slots_is_noticed(llama, tmp_path):
    script = (llama.folder / "serve.sh").read_text().splitlines(keepends=True)
    bare = tmp_path / "serve.sh"
    bare.write_text("".join(line for line in script if "kv-transfer" not in line and "pooler-config" not in line))
    pooler = '{"pooling_type": "MEAN", "use_activation": false}'
    with server(tmp_path, "--pooler-config", pooler) as url, pytest.raises(RuntimeError, match=r"serve\.sh"):
        client(llama.folder, url)


def test_vllms_own_prefix_cache_is_refused(llama, tmp_path):
    with (
        pytest.raises(RuntimeError, match="--no-enable-prefix-caching"),
        server(llama.folder, "--enable-prefix-caching"),
    ):
        pass


def test_a_rank_that_vllm_does_not_take_is_refused(tmp_path):
    other = bundle(tmp_path, "llama", "train.variants=[per_layer_lora] export.variant=per_layer_lora lora.rank=3")
    with pytest.raises(UserError, match=r"lora\.rank"):
        write_targets(other, ["vllm"], tmp_path / "served", say=lambda line: None)
    assert not (tmp_path / "served").exists()
