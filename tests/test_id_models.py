"""SASRec, GRU4Rec, ComiRec: causality, the loss by hand, windows, learning, determinism, resuming after a kill."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from rarec.config.ids import FOLD, OLDER, RECIPES, ComiRecConfig, Gru4RecConfig, Ids, Recipe, SasRecConfig
from rarec.data.dataset import PreparedDataset
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.ids.models import SequenceModel, build
from rarec.ids.objective import Batch, SampledSoftmax, Windows, _SharedDropout, draw_negatives
from rarec.ids.source import open_source
from rarec.ids.table import ItemTable
from rarec.ids.trainer import KEPT, train_ids
from rarec.ids.validation import Validation
from rarec.ranking.metrics import metric_values
from rarec.ranking.rank import VectorScores, rank_scores
from rarec.storage.artefacts import MANIFEST, PROGRESS
from rarec.storage.checkpoint_store import CheckpointStore
from rarec.storage.directories import CHECKED, MARKER
from tests.datasets import by_hand, prepared
from tests.sources import ids_stage, make_source

SMALL = {"dim": 16, "epochs": 4, "negatives": 16, "batch_size": 16, "max_history": 8}
TINY: list[Recipe] = [
    SasRecConfig(dim=8, blocks=2, heads=2, max_history=6, dropout=0.5),
    Gru4RecConfig(dim=8, hidden=12, layers=2, max_history=6, dropout=0.5),
    ComiRecConfig(dim=8, interests=3, hidden=12, max_history=6, dropout=0.5),
]
KINDS = list(RECIPES)


def ids(kind: str = "sasrec", **changes) -> Ids:
    return Ids(model=kind, holdout=0.0, **{kind: RECIPES[kind](**{**SMALL, **changes})})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> PreparedDataset:
    return prepared(tmp_path_factory.mktemp("sasrec"))


class Trained:
    """A model without dropout and random vectors of ten items."""

    def __init__(self, recipe: type[Recipe] = SasRecConfig, **changes) -> None:
        torch.manual_seed(0)
        self.encoder = build(recipe(**{**SMALL, "dropout": 0.0, **changes}))
        self.items = torch.randn(10, 16).requires_grad_()

    def states(self, history: list[int]) -> torch.Tensor:
        """The states (T, K, E) of one history."""
        return self.encoder(self.items[torch.tensor([history])], torch.tensor([len(history)]))[0]

    def loss(self, rows: list[list[int]], lengths: list[int], negatives: torch.Tensor, world: World = SINGLE):
        """A rank's sum of the loss."""
        batch = Batch(torch.tensor(rows), torch.tensor(lengths))
        return SampledSoftmax(self.encoder, world)(batch.groups(world), negatives, torch.arange(10), self.items)


@pytest.fixture(params=TINY, ids=lambda recipe: recipe.kind)
def model(request) -> SequenceModel:
    torch.manual_seed(0)
    return build(request.param).eval()


def test_future_items_never_change_earlier_states(model):
    """And do change the state at their own place."""
    torch.manual_seed(1)
    before = torch.randn(1, 6, 8)
    after = before.clone()
    after[:, 4:] *= -1
    length = torch.tensor([6])
    with torch.no_grad():
        difference = (model(before, length) - model(after, length)).abs().amax(dim=(2, 3))[0]
    assert (difference[:4] == 0).all()
    assert (difference[4:] > 1e-3).all()


def test_order_matters(model):
    items = np.random.default_rng(0).standard_normal((9, 8)).astype(np.float32)
    if hasattr(model, "ages"):  # of ComiRec, whose ages start small
        torch.nn.init.normal_(model.ages.weight)
    forward, backward = model.encode(items, [np.array([1, 2, 3]), np.array([2, 1, 3])])
    assert np.abs(forward - backward).max() > 1e-3


def test_padding_and_items_beyond_the_newest_do_not_count(model):
    items = np.random.default_rng(0).standard_normal((9, 8)).astype(np.float32)
    short, long = np.array([3, 1, 4]), np.array([8, 8, 8, 2, 7, 1, 8, 2, 8])
    together = model.encode(items, [short, long, np.array([], dtype=np.int32)])
    assert np.allclose(together[0], model.encode(items, [short])[0], atol=1e-6)
    assert np.allclose(together[1], model.encode(items, [long[-6:]])[0], atol=1e-6)
    assert np.abs(together[1] - model.encode(items, [long[-5:]])[0]).max() > 1e-3
    assert (together[2] == 0).all()


def test_encoding_is_without_dropout_and_leaves_the_mode(model):
    items = np.random.default_rng(0).standard_normal((9, 8)).astype(np.float32)
    model.train()
    first, second = (model.encode(items, [np.array([1, 2])]) for _ in range(2))
    assert first.tolist() == second.tolist()
    assert model.training


def test_heads_must_divide_the_dimension():
    with pytest.raises(UserError, match=r"ids\.sasrec\.heads"):
        build(SasRecConfig(dim=8, heads=3))


def test_interests_are_means_of_what_was_read_weighted_by_item_and_age():
    """ComiRec's equations 5 and 6, with logits set by hand: two interests, three items."""
    recipe = ComiRecConfig(dim=2, interests=2, hidden=4, max_history=3, dropout=0.0)
    model = build(recipe).eval()
    items = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    torch.nn.init.zeros_(model.attention[2].weight)
    model.ages.weight.data = torch.tensor(
        [[0.0, 0.0], [0.0, 9.0], [0.0, 0.0]]
    )  # the second: the item before the newest
    states = model(items, torch.tensor([3]))[0]
    assert torch.allclose(states[2, 0], torch.tensor([2 / 3, 2 / 3]))
    assert torch.allclose(states[1, 0], torch.tensor([1 / 2, 1 / 2]))
    assert torch.allclose(states[2, 1], torch.tensor([0.0, 1.0]), atol=1e-3)
    assert torch.allclose(states[1, 1], torch.tensor([1.0, 0.0]), atol=1e-3)


def test_a_small_catalogue_makes_the_softmax_a_full_one():
    model = Trained()
    states_TE = model.states([1, 2])[:, 0]
    full = torch.nn.functional.cross_entropy(states_TE @ model.items.T, torch.tensor([2, 3]), reduction="sum")
    loss = model.loss([[1, 2, 3]], [2], draw_negatives(torch.arange(10), 10))
    assert loss.item() == pytest.approx(full.item(), abs=1e-5)
    assert set(draw_negatives(torch.tensor([3, 8]), 1).tolist()) <= {3, 8}


def test_of_several_interests_the_one_that_scores_the_target_best_answers():
    model = Trained(ComiRecConfig, interests=3)
    states_KE = model.states([1, 2])[1]
    state_E = states_KE[(states_KE @ model.items[3]).argmax()]
    first_E = model.states([1])[0, 0]  # of one item all are equal
    expected = [-(model.items[[target, 7]] @ state).log_softmax(0)[0] for target, state in ((2, first_E), (3, state_E))]
    loss = model.loss([[1, 2, 3]], [2], torch.tensor([7]))
    assert loss.item() == pytest.approx(torch.stack(expected).sum().item(), abs=1e-5)


@pytest.mark.parametrize("piece", [1, 2, 256])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_loss_by_hand(piece, ranks, monkeypatch):
    """Every target's softmax over itself and the shared negatives, but for a negative that is the target."""
    monkeypatch.setattr("rarec.ids.objective.PIECE", piece)
    model, negatives = Trained(), torch.tensor([3, 7, 7])
    terms = []
    states = [*model.states([1, 2])[:, 0], model.states([4])[0, 0]]
    for state_E, target in zip(states, (2, 3, 5), strict=True):
        others = [item for item in negatives.tolist() if item != target]
        terms.append(-(model.items[[target, *others]] @ state_E).log_softmax(0)[0])
    # The second window has one target, then padding. A third rank has no window.
    parts = [model.loss([[1, 2, 3], [4, 5, 5]], [2, 1], negatives, World(rank, ranks)) for rank in range(ranks)]
    assert sum(parts).item() == pytest.approx(torch.stack(terms).sum().item(), abs=1e-5)


def test_a_target_whose_only_negative_is_itself_costs_nothing_and_moves_nothing():
    model = Trained()
    loss = model.loss([[1, 3]], [1], torch.tensor([3, 3]))
    loss.backward()
    assert loss.item() == 0.0
    assert all((weight.grad == 0).all() for weight in [*model.encoder.parameters(), model.items])


@pytest.mark.parametrize("recipe", TINY, ids=lambda recipe: recipe.kind)
def test_dropout_is_drawn_alike_on_any_number_of_ranks(recipe):
    """GRU4Rec has dropout between its layers too, which PyTorch draws: one layer here."""
    recipe = recipe.model_copy(update={"layers": 1} if recipe.kind == "gru4rec" else {})
    rows, lengths = torch.randint(10, (7, 7)), torch.tensor([6, 1, 2, 5, 3, 3, 4])
    items, negatives = torch.randn(10, 8), torch.tensor([0, 4])
    losses = []
    for ranks in (1, 2, 5):
        parts = []
        for rank in range(ranks):
            torch.manual_seed(0)
            objective = SampledSoftmax(build(recipe), World(rank, ranks))
            torch.manual_seed(1)
            groups = Batch(rows, lengths).groups(World(rank, ranks))
            parts.append(objective(groups, negatives, torch.arange(10), items).item())
        losses.append(sum(parts))
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-4)


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    for probability in (0.1, 0.5, 0.9):
        dropout = _SharedDropout(probability, SINGLE)
        dropout.total = 1000
        states = dropout(torch.ones(1000, 7, 13))
        assert (states == 0).float().mean().item() == pytest.approx(probability, abs=0.01)
        assert states.mean().item() == pytest.approx(1, abs=0.05)
        assert ((states == 0).float().mean(0) - probability).abs().max() < 0.1
    assert torch.equal(_SharedDropout(0.5, SINGLE).eval()(states), states)


def test_a_step_moves_only_the_items_that_it_reads():
    trained = np.array([True, False, True, True])
    table = ItemTable(trained, dim=3, lr=0.1, seed=0)
    before = table.rows_ME.detach().clone()
    assert (before[1] == 0).all()
    assert (before[[0, 2, 3]] != 0).all()
    rows = torch.tensor([0, 3])
    assert torch.equal(table.look_up(rows), before[rows])
    table.update(rows, torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.5, 0.5]]))
    # The first step of Adam is lr times the sign of the gradient.
    moved = torch.tensor([[0.1, -0.1, 0.0], [0.0] * 3, [0.0] * 3, [0.1] * 3])
    assert torch.allclose(before - table.rows_ME.detach(), moved, atol=1e-4)


def test_a_table_that_does_not_fit_is_refused_with_the_number_of_processes_that_would_do(monkeypatch):
    monkeypatch.setattr("rarec.ids.table.memory_of_rank", lambda device: 2_500)
    with pytest.raises(UserError, match=r"3\.84e-06 GB on each of 1 processes.*\n.*start 2 processes.*, 1 on each"):
        ItemTable(np.ones(10, bool), 32, 0.1, 0)


def test_more_processes_than_there_are_rows_for_are_refused_with_a_number_that_will_do():
    """All ranks but the last have as many rows, so 4 items on 3 processes are 2, 2 and none."""
    for items, ranks, enough in ((4, 3, 2), (11, 12, 11), (1_000, 64, 63)):
        with pytest.raises(UserError, match=rf"{items} items.*\n.*start {enough} processes"):
            ItemTable(np.ones(items, bool), 2, 0.1, 0, World(0, ranks))


def test_the_first_vectors_do_not_depend_on_the_ranks(monkeypatch):
    monkeypatch.setattr("rarec.ids.table.BLOCK", 4)
    whole = ItemTable(np.ones(11, bool), 5, 0.1, 3).rows_ME
    for ranks in (2, 3, 11):
        parts = [ItemTable(np.ones(11, bool), 5, 0.1, 3, World(rank, ranks)).rows_ME for rank in range(ranks)]
        assert torch.equal(torch.cat(list(parts)), whole)


def test_windows_by_hand():
    """One user with six training items, another with three, a third with none to predict; three inputs at most."""
    sequences = [[0, 1, 2, 3, 4, 5, 8, 9], [6, 7, 0, 8, 9], [3, 8, 9]]
    dataset = by_hand(sequences, pa.array(range(10)), pa.array(range(3)))
    windows = Windows(dataset, max_history=3)

    class Phase:  # the newest window of the long user is one shorter
        def integers(self, high, size):
            return np.ones(size, dtype=np.int64)

    begin, length = windows.cut(Phase())
    cut = [dataset.item_rows_I[a : a + n + 1].tolist() for a, n in zip(begin, length, strict=True)]
    assert cut == [[3, 4, 5], [0, 1, 2, 3], [6, 7, 0]]


def test_every_training_interaction_is_a_target_once_and_nothing_else_is():
    rng = np.random.default_rng(0)
    sequences = [list(range(int(rng.integers(3, 40)))) for _ in range(50)]
    dataset = by_hand(sequences, pa.array(range(40)), pa.array(range(50)))
    for epoch in range(3):
        targets, inputs = [], 0
        for batch in Windows(dataset, 7).batches(16, np.random.default_rng(epoch)):
            inputs = max(inputs, int(batch.lengths_B.max()))
            targets += [row[1 : n + 1].tolist() for row, n in zip(batch.rows_BT, batch.lengths_B, strict=True)]
        expected = [item for sequence in sequences for item in sequence[1:-2]]
        assert sorted(item for part in targets for item in part) == sorted(expected)
        assert inputs == 7


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_popularity_does_not_know(kind, tmp_path):
    """The next item follows the user's taste: a quarter of the catalogue, independent of popularity."""
    dataset = prepared(tmp_path, users=300)
    recipe = ids(kind, epochs=40, max_history=20, lr=3e-3)
    source = make_source("id", recipe, dataset, tmp_path)
    targets = dataset.targets("test")
    places = zip(targets.user_rows, targets.positions, strict=True)
    histories = [dataset.history(user, position) for user, position in places]
    popularity = rank_scores(
        VectorScores(np.ones((len(histories), 1)), dataset.train_counts_N[:, None]), targets.item_rows, histories
    )
    users = source.user_vectors(targets.user_rows, histories)
    learned = rank_scores(VectorScores(users, source.items_NE), targets.item_rows, histories)
    by_model, by_popularity = (metric_values(ranks, [5])["hr@5"].mean() for ranks in (learned, popularity))
    assert by_model > 1.3 * by_popularity
    assert by_model > 0.4


def test_the_best_epoch_is_kept_and_training_stops(dataset, tmp_path):
    source = make_source("id", ids(epochs=60, patience=2, lr=0.02), dataset, tmp_path)
    curve = [point["ndcg@100"] for point in source.manifest["curve"]]
    best = source.manifest["best_epoch"]
    assert curve[best - 1] == max(curve)
    assert len(curve) == source.manifest["epochs"] == best + 2 < 60
    again = Validation(dataset, 0).of_vectors(np.asarray(source.items_NE), source.users)
    assert again == pytest.approx(source.manifest["validation"])
    assert {path.name for path in tmp_path.rglob(".*")} == {".id.lock", MARKER, CHECKED}


def test_the_test_targets_never_train(dataset, tmp_path):
    """The weights do not depend on the items at the test positions."""
    other = dataset.item_rows_I.copy()
    places = dataset.starts_U + dataset.test_U
    other[places] = (other[places] + 1) % dataset.n_items
    changed = PreparedDataset(**{**vars(dataset), "item_rows_I": other})
    first, second = (
        make_source("id", ids(), data, tmp_path / str(number)) for number, data in enumerate((dataset, changed))
    )
    assert first.hash == second.hash


def test_held_out_interactions_do_not_train_but_are_in_the_history_of_what_validates(dataset, tmp_path):
    """Items at the held-out positions are exchanged: weights of the first epoch stay, its validation does not."""
    other = dataset.item_rows_I.copy()
    places = (dataset.starts_U + dataset.train_length_U - 1)[dataset.train_length_U > 2]
    other[places] = (other[places] + 1) % dataset.n_items
    changed = PreparedDataset(**{**vars(dataset), "item_rows_I": other})
    recipe = ids(epochs=1).model_copy(update={"holdout": 0.01})
    first, second = (
        make_source(OLDER, recipe, data, tmp_path / str(number)) for number, data in enumerate((dataset, changed))
    )
    assert first.hash == second.hash
    assert first.manifest["validation"] != second.manifest["validation"]
    assert first.manifest["settings"]["holdout"] == 0.01


def exchanged(dataset: PreparedDataset, users_U: np.ndarray) -> PreparedDataset:
    """The dataset with other items at the held-out positions of some users, half of each one's training part."""
    other, places = dataset.item_rows_I.copy(), []
    for user in np.flatnonzero(users_U):
        end = int(dataset.starts_U[user] + dataset.train_length_U[user])
        places += range(end - int(dataset.held_out_U(0.5)[user]), end)
    other[places] = (other[places] + 1) % dataset.n_items
    return PreparedDataset(**{**vars(dataset), "item_rows_I": other})


@pytest.mark.parametrize("fold", range(2))
def test_the_model_that_samples_of_a_part_of_the_users_read_has_not_seen_their_targets(dataset, tmp_path, fold):
    """Other targets of that part change nothing; those of the other part change the weights."""
    recipe = ids(epochs=2).model_copy(update={"holdout": 0.5, "folds": 2})
    part_U = np.arange(dataset.n_users) % 2
    worlds = {
        "as it is": dataset,
        "own": exchanged(dataset, part_U == fold),
        "others": exchanged(dataset, part_U != fold),
    }
    made = {name: make_source(f"{FOLD}{fold}", recipe, data, tmp_path / name) for name, data in worlds.items()}
    assert np.array_equal(made["own"].items_NE, made["as it is"].items_NE)
    assert all(torch.equal(made["own"].users.tensors[name], w) for name, w in made["as it is"].users.tensors.items())
    assert not np.array_equal(made["others"].items_NE, made["as it is"].items_NE)


def test_models_that_go_on_from_one_share_its_space(dataset, tmp_path):
    """Vectors of an item are alike in all of them, and in two trainings from different first values they are not."""
    recipe = ids(epochs=12).model_copy(update={"holdout": 0.5, "folds": 2})
    own, first = (make_source(name, recipe, dataset, tmp_path) for name in ("id", f"{FOLD}0"))
    other = make_source("id", ids(epochs=12), dataset, tmp_path / "other", seed=1)

    def cosine(one, two) -> float:
        known = (one.items_NE != 0).any(1) & (two.items_NE != 0).any(1)
        pairs = (
            vectors[known] / np.linalg.norm(vectors[known], axis=1, keepdims=True)
            for vectors in (one.items_NE, two.items_NE)
        )
        return float((next(pairs) * next(pairs)).sum(1).mean())

    assert cosine(own, first) > 0.6
    assert abs(cosine(own, other)) < 0.3
    assert first.manifest["epochs"] <= own.manifest["best_epoch"]


def test_an_item_not_met_in_training_has_no_vector_and_is_scored_as_the_mean(dataset, tmp_path):
    last = dataset.starts_U + dataset.train_length_U - 1  # one item gives way to its neighbour wherever it trains
    rows, trains = dataset.item_rows_I.copy(), np.zeros(len(dataset.item_rows_I), bool)
    for start, end in zip(dataset.starts_U, last, strict=True):
        trains[start : end + 1] = True
    rows[trains & (rows == 5)] = 6
    counts_N = np.bincount(rows[trains], minlength=dataset.n_items)
    changed = PreparedDataset(**{**vars(dataset), "item_rows_I": rows, "train_counts_N": counts_N})
    source = make_source("id", ids(), changed, tmp_path, seed=3)
    assert np.flatnonzero((source.items_NE == 0).all(axis=1)).tolist() == np.flatnonzero(counts_N == 0).tolist()
    mean_E = source.items_NE[counts_N > 0].mean(axis=0)
    scored_NE = source.ranker().items_NZ
    assert np.allclose(scored_NE[5], mean_E)
    assert np.array_equal(scored_NE[6], source.items_NE[6])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_trains_as_float32_does_within_its_rounding(kind, dataset, tmp_path):
    whole, half = (
        make_source("id", ids(kind, dtype=dtype), dataset, tmp_path / dtype) for dtype in ("float32", "bfloat16")
    )
    losses = [[epoch["loss"] for epoch in source.manifest["curve"]] for source in (whole, half)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]
    assert half.items_NE.dtype == np.float32


def test_the_seed_decides(dataset, tmp_path):
    hashes = [
        make_source("id", ids(), dataset, tmp_path / str(number), seed=seed).manifest["files"]
        for number, seed in enumerate((3, 3, 4))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from rarec.data.dataset import PreparedDataset
from rarec.ids.objective import SampledSoftmax
from tests.sources import make_source
from tests.test_id_models import ids
loss, steps = SampledSoftmax.__call__, []
def dying(self, *args):
    steps.append(1)
    if len(steps) == int(sys.argv[4]):  # of five an epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, *args)
SampledSoftmax.__call__ = dying
make_source("id", ids(sys.argv[3]), PreparedDataset.open(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def killed(kind: str, dataset: PreparedDataset, directory: Path, step: int) -> Path:
    """Train in a process that is killed before a step, of five an epoch; return the checkpoints' directory."""
    command = [sys.executable, "-c", KILLED, str(dataset.directory), str(directory), kind, str(step)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (directory / "ids" / "id" / MANIFEST).exists()
    return directory / "ids" / "id" / PROGRESS


def files_of(root: Path) -> set[str]:
    """The names of all files of the artefact, hidden ones too."""
    directory = root / "ids" / "id"
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()} - {
        MARKER,
        CHECKED,
    }


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_resumes_to_the_same_weights(kind, dataset, tmp_path):
    whole = make_source("id", ids(kind), dataset, tmp_path / "whole")
    directory = tmp_path / "killed"
    progress = killed(kind, dataset, directory, 12)
    assert {path.suffix for path in progress.rglob("*") if path.is_file()} == {".safetensors", ".json", ".npy"}
    lines: list[str] = []
    source = make_source("id", ids(kind), dataset, directory, say=lines.append)
    assert lines[0] == "resuming after epoch 2"
    assert source.hash == whole.hash
    assert files_of(directory) == {MANIFEST, "items.npy", "model.safetensors"}


@pytest.fixture(scope="module")
def interrupted(dataset, tmp_path_factory) -> tuple[Path, str]:
    """The run directory of a training that was killed in its fourth epoch, and the hash that it should end with."""
    root = tmp_path_factory.mktemp("interrupted")
    whole = make_source("id", ids(), dataset, root / "whole")
    return killed("sasrec", dataset, root / "killed", 18).parents[2], whole.hash


def resumed(interrupted: Path, dataset: PreparedDataset, directory: Path, harm: Callable[[Path], object]):
    """Resume a copy of the training after harm to its checkpoints; return the hash and what was printed."""
    shutil.copytree(interrupted, directory, dirs_exist_ok=True)
    progress = directory / "ids" / "id" / PROGRESS
    assert sorted(path.name for path in progress.iterdir()) == ["step-00000002", "step-00000003"]
    harm(progress)
    lines: list[str] = []
    source = make_source("id", ids(), dataset, directory, say=lines.append)
    assert files_of(directory) == {MANIFEST, "items.npy", "model.safetensors"}
    return source.hash, lines


@pytest.mark.slow
@pytest.mark.parametrize("file", ["training.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(b"corrupt"), Path.unlink])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(file, harm, interrupted, dataset, tmp_path):
    progress, expected = interrupted
    digest, lines = resumed(progress, dataset, tmp_path, lambda path: harm(path / "step-00000003" / file))
    assert "step-00000003" in lines[0]
    assert lines[1] == "resuming after epoch 2"
    assert digest == expected


def test_where_every_checkpoint_is_damaged_training_starts_again_and_says_so(interrupted, dataset, tmp_path):
    def harm(path: Path) -> None:
        for checkpoint in path.iterdir():
            flip(checkpoint / "training.safetensors")

    progress, expected = interrupted
    digest, lines = resumed(progress, dataset, tmp_path, harm)
    assert "step-00000002" in lines[0]
    assert "starting again" in lines[0]
    assert not any("resuming" in line for line in lines)
    assert digest == expected


def test_checkpoints_that_cannot_be_used_stay_where_the_user_has_something_in_one(interrupted, dataset, tmp_path):
    def harm(path: Path) -> None:
        flip(path / "step-00000003" / "training.safetensors")
        (path / "step-00000002" / "items.npy").unlink()
        (path / "step-00000002" / "items.npy").mkdir()

    with pytest.raises(UserError, match=r"step-00000002/items\.npy") as refusal:
        resumed(interrupted[0], dataset, tmp_path, harm)
    assert "move it away" in refusal.value.remedy
    assert (tmp_path / "ids" / "id" / PROGRESS / "step-00000003" / "training.safetensors").exists()
    (tmp_path / "ids" / "id" / PROGRESS / "step-00000002" / "items.npy").rmdir()
    assert make_source("id", ids(), dataset, tmp_path).hash == interrupted[1]


def test_a_training_begun_with_other_settings_is_refused_and_fresh_begins_anew(interrupted, dataset, tmp_path):
    plain = make_source("id", ids(lr=0.002), dataset, tmp_path / "plain")
    shutil.copytree(interrupted[0], tmp_path / "other")
    with pytest.raises(UserError, match=r"users\.lr: 0\.001 -> 0\.002[^$]*rarec ids CONFIG --fresh"):
        make_source("id", ids(lr=0.002), dataset, tmp_path / "other")
    lines: list[str] = []
    stage = ids_stage("id", ids(lr=0.002), dataset, tmp_path / "other", say=lines.append)
    assert stage.make(fresh=True)
    assert not any("resuming" in line for line in lines)
    assert stage.hash == plain.hash
    assert files_of(tmp_path / "other") == {MANIFEST, "items.npy", "model.safetensors"}


def test_checkpoints_of_another_training_are_never_used(interrupted, dataset, tmp_path):
    """Such as ones that were copied there."""
    make_source("id", ids(lr=0.002), dataset, tmp_path / "plain")
    shutil.copytree(interrupted[0] / "ids" / "id" / PROGRESS, tmp_path / PROGRESS)
    lines: list[str] = []
    checkpoints = CheckpointStore(tmp_path / PROGRESS, KEPT, "of the other")
    train_ids(dataset, ids(lr=0.002).sasrec, 0, checkpoints, tmp_path, lines.append)
    assert "another training" in lines[0]
    assert (tmp_path / "items.npy").read_bytes() == (tmp_path / "plain/ids/id/items.npy").read_bytes()


def test_a_diverging_training_stops_and_names_epoch_and_batch(dataset, tmp_path):
    with pytest.raises(UserError, match=r"loss is nan in epoch \d+, batch \d+"):
        make_source("id", ids(lr=1e12), dataset, tmp_path)
    assert not (tmp_path / "ids" / "id").exists()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("sasrec", {"blocks": 2, "heads": 2}), ("gru4rec", {"layers": 2}), ("comirec", {"interests": 3})],
)
def test_a_trained_source_reopens_exactly(kind, shape, dataset, tmp_path):
    made = make_source("id", ids(kind, **shape), dataset, tmp_path)
    opened = open_source(tmp_path / "ids" / "id")
    history = [np.array([1, 2, 3])]
    rows = np.array([0])
    per_user = shape.get("interests", 1)
    assert (opened.name, opened.dim, opened.vectors_per_user, opened.hash) == ("id", 16, per_user, made.hash)
    assert opened.user_vectors(rows, history).tolist() == made.user_vectors(rows, history).tolist()
    assert opened.user_vectors(rows, history).shape == (1, per_user, 16)
    figures = opened.manifest
    assert figures["parameters"] == sum(p.numel() for p in opened.users.model.parameters()) + opened.items_NE.size
    assert figures["made_from"] == {"prepare": dataset.hash}
    assert {"hr@10", "ndcg@10", "mrr", "n"} <= set(figures["validation"])
