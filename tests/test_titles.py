"""Slots at the titles of a history: each item's own vectors, in any blocks, with histories of any length."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rarec.config import VARIANTS
from rarec.models.build import build_model, slots_reserved
from rarec.models.encode import Encoder
from rarec.models.initialise import initialise
from rarec.models.language_model import load_model
from rarec.models.towers import side_batch, title_vectors
from rarec.prompts import PromptPair
from tests.test_build import HIDDEN, SHAPES, make_config

HISTORIES = [[0, 1, 2], [3], [], [5, 6, 7, 0, 2, 4, 1, 3, 6]]
NAMES = ("id", "id@titles", "image@titles")
PROMPT = {
    "user": "{soft:id} seen: {history}.",
    "item": "{soft:id} {title}{soft:image}.",
    "title": "{title} {soft:id}{soft:image}",
}


class Vectors:
    """A source of fixed vectors."""

    def __init__(self, shape, generator):
        self.dim, self.vectors_per_user = shape.dim, shape.vectors_per_user
        self.items_NE = generator.standard_normal((8, shape.dim)).astype(np.float32)

    def user_vectors(self, rows, histories):
        return np.ones((len(rows), self.vectors_per_user, self.dim), np.float32)


def make_encoder(path, variant="per_layer", kind="encoder", size=8, **prompt):
    """Return a variant with random weights, ready to encode."""
    config = make_config(path, prompt={**PROMPT, **prompt})
    loaded = load_model(config.llm, path.parent, pool=config.readout.pool, lora=None)
    titles = [f"river lamp {item}" for item in range(8)]
    pair = PromptPair(config.prompt, loaded.tokenizer, titles, [""] * 8, slots_reserved(config, SHAPES), 128, kind)
    model = build_model(config, VARIANTS[variant], loaded, SHAPES, pair.sources).eval()
    generator = torch.Generator().manual_seed(0)
    for tower in (model.user, model.item):
        for _, source in tower.alignment.named_sources() if tower.alignment else ():
            vectors_NE = torch.randn(20, source.shape.dim, generator=generator)
            states_LND = torch.randn(len(tower.alignment.blocks), 20, HIDDEN, generator=generator)
            initialise(source, vectors_NE, states_LND, penalty=1.0, generator=generator)
    sources = {name: Vectors(shape, np.random.default_rng(seed)) for seed, (name, shape) in enumerate(SHAPES.items())}
    return Encoder(model, pair, sources, size)


def users(encoder):
    return encoder.users(np.arange(len(HISTORIES)), [np.array(history, int) for history in HISTORIES])


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("variant", ["input", "per_layer"])
def test_a_batch_of_histories_of_any_length_is_encoded_as_one_by_one(saved, kind, variant):
    together, alone = (make_encoder(saved[kind], variant, size=size) for size in (8, 1))
    assert np.allclose(users(together), users(alone), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_vectors_of_the_written_items_are_seen_and_no_others(saved, kind):
    encoder = make_encoder(saved[kind])
    before = users(encoder)
    encoder.sources["image"].items_NE[1] += 1  # in the first history; in the last, the eighth newest, which is not
    changed = np.abs(users(encoder) - before).max(1) > 1e-6
    assert encoder.prompts.config.max_history == 8
    assert changed.tolist() == [True, False, False, True]
    encoder.sources["image"].items_NE[5] += 1  # the oldest of the last history, which is not written
    assert (np.abs(users(encoder) - before).max(1) > 1e-6).tolist() == [True, False, False, True]


def test_each_title_has_the_vector_of_its_own_item(saved):
    encoder = make_encoder(saved["bert"])
    prompts = [encoder.prompts.user(history) for history in HISTORIES]
    vectors_BHE = title_vectors(prompts, encoder.prompts, encoder.sources)["id@titles"]
    assert vectors_BHE.shape == (4, 8, SHAPES["id"].dim)
    assert (vectors_BHE[0, :3] == encoder.sources["id"].items_NE[[2, 1, 0]]).all()  # newest first
    assert not vectors_BHE[0, 3:].any()
    assert not vectors_BHE[2].any()


def test_variants_without_vectors_in_the_model_have_no_slots_at_titles(saved):
    for variant, own in {"text_only": {}, "prefix_only": {"id": 2}, "readout": {}}.items():
        assert make_encoder(saved["bert"], variant).model.user.slots == own
    slots = make_encoder(saved["bert"]).model.user.slots
    assert slots == {"id": 5, "id@titles": 8, "image@titles": 8}


def test_slots_at_titles_may_stand_alone(saved):
    encoder = make_encoder(saved["bert"], user="{history}", title="{soft:id}", item="{title}", separator="")
    assert encoder.model.user.slots == {"id@titles": 8}
    encoded = users(encoder)
    assert np.isfinite(encoded).all()
    assert len(np.unique(encoded.round(5), axis=0)) == len(HISTORIES)


def test_slots_at_titles_are_read_apart_and_not_in_the_alignment_loss(saved):
    encoder = make_encoder(saved["bert"])
    tower = encoder.model.user
    assert tower.readout.reads == ("instructions", "vectors", "titles")
    prompts = [encoder.prompts.user(history) for history in HISTORIES]
    vectors = {name: source.user_vectors(np.arange(4), HISTORIES) for name, source in encoder.sources.items()}
    vectors |= title_vectors(prompts, encoder.prompts, encoder.sources)
    batch = side_batch(prompts, vectors, tower, 0)
    encoding = encoder.model({"user": batch})["user"]
    assert set(encoding.projected) == {"id"}
    roles = tower.alignment.role_masks(batch.vectors)
    assert roles["titles"].sum(1).tolist() == [2 * min(len(history), 8) for history in HISTORIES]
    encoding.vectors_BZ.sum().backward()
    gradients = {name: source.weight_LDE.grad for name, source in tower.alignment.named_sources()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    shorter = replace(batch, vectors={**batch.vectors, "id@titles": batch.vectors["id@titles"] * 0})
    assert not torch.allclose(encoder.model({"user": shorter})["user"].vectors_BZ, encoding.vectors_BZ)
