"""Every variant builds what it says, over one frozen model (docs/method.md, sections 3, 6 and 7)."""

import numpy as np
import pytest
import torch

from rarec.config import VARIANTS, RunConfig
from rarec.config.method import Lora
from rarec.errors import UserError
from rarec.models.build import SIDES, SourceShape, build_model, slots_reserved, trained_parameters
from rarec.models.initialise import initialise
from rarec.models.language_model import load_model
from rarec.models.slots import Slots
from rarec.models.towers import side_batch
from rarec.prompts import PromptPair
from tests.synthetic import title

HIDDEN, BATCH, INSTRUCTIONS = 32, 4, 2
SHAPES = {"id": SourceShape(dim=6, vectors_per_user=3), "image": SourceShape(dim=5, vectors_per_user=1)}
PROMPTS = {"user": "{soft:id} history: {history}.", "item": "{soft:id} {title}{soft:image}."}
ALIGNED = tuple(name for name in VARIANTS if name not in ("text_only", "text_lora"))


def make_config(path, **sections):
    columns = {"interactions": {"path": "log.csv", "user": "user", "item": "item", "time": "time"}}
    items = {"items": {"path": "items.csv", "item": "item", "title": "title"}}
    tree = {"run": {"dir": "run"}, "prepare": {**columns, **items}, "llm": {"path": str(path)}, "prompt": PROMPTS}
    return RunConfig.model_validate({**tree, "alignment": {"instructions": INSTRUCTIONS}, **sections})


class World:
    """A variant's model with its prompts and a batch of both sides, every trained weight away from where it starts."""

    def __init__(self, path, variant, **sections):
        self.config, self.variant = make_config(path, **sections), VARIANTS[variant]
        lora = Lora() if self.variant.lora else None
        loaded = load_model(self.config.llm, path.parent, pool=self.config.readout.pool, lora=lora)
        reserved = slots_reserved(self.config, SHAPES)
        titles = [title(item) for item in range(8)]
        self.prompts = PromptPair(self.config.prompt, loaded.tokenizer, titles, [""] * 8, reserved, 128, "decoder")
        self.model = build_model(self.config, self.variant, loaded, SHAPES, self.prompts.sources)
        self._start()
        rng = np.random.default_rng(0)
        per_user = {name: shape.vectors_per_user for name, shape in SHAPES.items()}
        self.users = {name: rng.normal(size=(BATCH, per_user[name], SHAPES[name].dim)) for name in SHAPES}
        self.items = {name: rng.normal(size=(BATCH, 1, shape.dim)) for name, shape in SHAPES.items()}

    def _start(self):
        generator = torch.Generator().manual_seed(0)
        for tower in (self.model.user, self.model.item):
            for name, source in tower.alignment.named_sources() if tower.alignment else ():
                vectors_NE = torch.randn(20, SHAPES[name].dim, generator=generator)
                states_LND = torch.randn(len(tower.alignment.blocks), 20, HIDDEN, generator=generator)
                initialise(source, vectors_NE, states_LND, penalty=1.0, generator=generator)

    def batches(self):
        users = [self.prompts.user([row, row + 1]) for row in range(BATCH)]
        items = [self.prompts.item(row + 2) for row in range(BATCH)]
        return (
            side_batch(users, self.users, self.model.user, 0),
            side_batch(items, self.items, self.model.item, 0),
        )

    def scores(self):
        users, items = self.model(dict(zip(("user", "item"), self.batches(), strict=True))).values()
        return users.vectors_BZ @ items.vectors_BZ.T


# ---- what a variant holds


@pytest.mark.parametrize(
    ("variant", "blocks", "user", "item"),
    [
        ("text_only", (), {}, {}),
        ("readout", (), {}, {}),
        ("prefix_only", (0, 1, 2), {"id": 2}, {"id": 2, "image": 2}),
        ("input", (0,), {"id": 5}, {"id": 3, "image": 3}),  # 2 instructions and K = 3 on the user side, 1 on the item's
        ("per_layer", (0, 1, 2), {"id": 5}, {"id": 3, "image": 3}),
        ("per_layer_lora", (0, 1, 2), {"id": 5}, {"id": 3, "image": 3}),
    ],
)
def test_blocks_and_slots_of_every_variant(saved, variant, blocks, user, item):
    model = World(saved["bert"], variant).model
    assert (model.user.alignment_blocks, model.item.alignment_blocks) == (blocks, blocks)
    assert (model.user.slots, model.item.slots) == (user, item)
    assert any("lora_" in name for name, _ in model.named_parameters()) == (variant == "per_layer_lora")


def test_prompts_keep_free_what_the_largest_variant_takes():
    reserved = slots_reserved(make_config("x"), SHAPES)
    assert reserved == {"user": {"id": 5, "image": 3}, "item": {"id": 3, "image": 3}}


@pytest.mark.parametrize("variant", ["per_layer", "prefix_only", "input"])
def test_a_subset_of_blocks(saved, variant):
    model = World(saved["bert"], variant, train={"blocks": [2, 0, 2]}).model
    assert model.user.alignment_blocks == ((0,) if variant == "input" else (0, 2))


def test_a_block_that_is_not_there_is_refused(saved):
    with pytest.raises(UserError, match=r"train\.blocks: .* 3\n.*0 to 2"):
        World(saved["bert"], "per_layer", train={"blocks": [1, 3]})


@pytest.mark.parametrize("variant", ["prefix_only", "per_layer"])
def test_no_instructions(saved, variant):
    """Then prefix-only is text-only."""
    model = World(saved["bert"], variant, alignment={"instructions": 0}).model
    assert model.user.slots == ({"id": 3} if variant == "per_layer" else {})


# ---- what trains


@pytest.mark.parametrize("readout", [{"head": False}, {"normalise": False}], ids=["plain", "heads"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_trains_is_never_frozen_and_gets_a_gradient(saved, variant, readout):
    world = World(saved["llama"], variant, readout=readout)
    for array in (*world.users.values(), *world.items.values()):
        array[::2] = 0  # some items have no vector, so that the learned fallback trains as well
    trained = trained_parameters(world.model.train())
    assert all("lora_" in name for name in trained if name.startswith("backbone."))
    roots = {name.split(".")[0] if "." not in name else ".".join(name.split(".")[:2]) for name in trained}
    expected = {"user.readout", "item.readout"} if "normalise" in readout else {"log_scale"}
    expected |= {"user.alignment", "item.alignment"} if variant in ALIGNED else set()
    expected |= {"backbone.model"} if VARIANTS[variant].lora else set()
    assert roots == expected

    frozen = {name: p.clone() for name, p in world.model.named_parameters() if name not in trained}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):  # LoRA's A has no gradient before B has moved
        optimizer.zero_grad()
        world.scores().log_softmax(1).diagonal().sum().neg().backward()
        optimizer.step()
    unmoved = {name for name, parameter in trained.items() if not parameter.grad.abs().max() > 0}
    idle = {"item.readout.heads.text.bias"}  # without a norm it shifts all scores of a user by the same amount
    if variant == "readout":  # the learned fallback of a missing vector is not read out, and used nowhere else
        idle |= {name for name in trained if name.endswith("fallback_E")}
    assert unmoved <= idle
    for name, parameter in world.model.named_parameters():
        assert name in trained or torch.equal(parameter, frozen[name])


def test_variants_see_no_more_than_they_should(saved):
    """Scores depend on the ID vectors, but for the variants of text alone and of instructions."""
    for variant in VARIANTS:
        world = World(saved["bert"], variant)
        before = world.scores()
        world.users = {name: -array for name, array in world.users.items()}
        changed = (world.scores() - before).abs().max() > 1e-4
        assert changed == (variant not in ("text_only", "text_lora", "prefix_only"))


# ---- readout and score


def test_text_only_is_the_normalised_pooled_text(saved):
    world = World(saved["bert"], "text_only", loss={"temperature": 0.1})
    users, items = world.batches()
    encoded = list(world.model({"user": users, "item": items}).values())
    for batch, encoding, scale in ((users, encoded[0], 10.0), (items, encoded[1], 1.0)):
        hidden_BTD = world.model.backbone(batch.ids_BT, batch.mask_BT)
        mask_BT1 = batch.mask_BT[..., None]
        mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        expected = scale * mean_BD / mean_BD.norm(dim=1, keepdim=True)
        torch.testing.assert_close(encoding.vectors_BZ, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reads_slots", [False, True])
def test_vectors_that_enter_at_the_readout_alone_do_not_go_through_the_model(saved, reads_slots):
    """The prompt is that of the text alone; the mean of an item's p, of those that it has, is added to its states."""
    world = World(saved["bert"], "readout", readout={"normalise": False, "slots": reads_slots})
    world.items["id"][1] = world.items["image"][1:3] = 0
    _, batch = world.batches()
    _, text = World(saved["bert"], "text_only").batches()
    assert torch.equal(batch.ids_BT, text.ids_BT)
    hidden_BTD = world.model.backbone(batch.ids_BT, batch.mask_BT)
    assert not hidden_BTD.requires_grad
    pooled_BD = (hidden_BTD * batch.mask_BT[..., None]).sum(1) / batch.mask_BT.sum(1, keepdim=True)
    sources = world.model.item.alignment.sources
    id_BD, image_BD = (sources[name].project(batch.vectors[name])[0, :, 0] for name in ("id", "image"))
    added_BD = torch.stack([(id_BD + image_BD)[0] / 2, torch.zeros(HIDDEN), id_BD[2], (id_BD + image_BD)[3] / 2])
    found_BD = world.model({"item": batch})["item"].vectors_BZ
    torch.testing.assert_close(found_BD, pooled_BD + added_BD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reads_slots", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_text_is_pooled_and_slots_are_added_where_wanted(saved, kind, reads_slots):
    """Items have slots c c p of `id`, then c c p of `image`: the mean of both p is added, to an encoder c too.

    Of an encoder what the last block makes of them; a decoder's have a map of their own, behind the last block.
    """
    world = World(saved[kind], "per_layer", readout={"normalise": False, "slots": reads_slots})
    _, batch = world.batches()
    encoding = world.model({"item": batch})["item"]
    slots_LBKD = encoding.slots_LBKD
    hidden_BTD = world.model.backbone(batch.ids_BT, batch.mask_BT, Slots(slots_LBKD[:3], batch.positions_BK, (0, 1, 2)))
    for row in range(BATCH):
        text = [t for t in range(int(batch.mask_BT[row].sum())) if t not in batch.positions_BK[row].tolist()]
        pooled = hidden_BTD[row, text if kind == "bert" else text[1:]].mean(0)
        behind = kind == "llama" and reads_slots
        assert len(slots_LBKD) == (4 if behind else 3)
        slots_SD = slots_LBKD[3, row] if behind else hidden_BTD[row, batch.positions_BK[row]]
        instructed = slots_SD[[0, 1, 3, 4]].mean(0) * (kind == "bert")
        pooled = pooled + (instructed + slots_SD[[2, 5]].mean(0)) * reads_slots
        torch.testing.assert_close(encoding.vectors_BZ[row], pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["input", "per_layer"])
def test_a_decoder_has_a_map_for_what_is_read_beside_those_of_the_blocks(saved, variant):
    """It moves the scored vector by just what it makes; the others move it through the text."""
    world = World(saved["llama"], variant, readout={"normalise": False})
    assert world.model.item.alignment_blocks == world.model.item.alignment.blocks[:-1]
    batch, source = world.batches()[1], world.model.item.alignment.sources["id"]
    before_BZ = world.model({"item": batch})["item"].vectors_BZ
    source.bias_LD.data[-1] += 1 / source.unit_L[-1]
    torch.testing.assert_close(world.model({"item": batch})["item"].vectors_BZ, before_BZ + 0.5)  # of two sources
    source.bias_LD.data[0] += 1
    assert (world.model({"item": batch})["item"].vectors_BZ - before_BZ - 0.5).abs().max() > 1e-3


def test_slots_in_place_of_a_missing_vector_are_not_read(saved):
    """Where an item has none, its vectors' slots add nothing; the instructions still do."""
    world = World(saved["bert"], "per_layer", readout={"normalise": False})
    for array in world.items.values():
        array[1] = 0
    _, batch = world.batches()
    read_BZ = world.model({"item": batch})["item"].vectors_BZ
    world.model.item.readout.reads = ("instructions",)
    without_BZ = world.model({"item": batch})["item"].vectors_BZ
    changed_B = (read_BZ - without_BZ).abs().amax(1) > 1e-4
    assert changed_B.tolist() == [row != 1 for row in range(BATCH)]


@pytest.mark.parametrize(
    ("normalise", "recommendation", "scale", "learned"),
    [(True, "softmax", 20, True), (True, "bpr", 20, True), (False, "softmax", 20, False), (False, "bpr", 1, False)],
)
@pytest.mark.parametrize(("variant", "head"), [("text_only", True), ("per_layer", False)])
def test_the_scale_of_the_score(saved, variant, head, normalise, recommendation, scale, learned):
    loss = {"recommendation": recommendation, "temperature": 0.05}
    model = World(saved["bert"], variant, readout={"normalise": normalise, "head": head}, loss=loss).model
    assert model.log_scale.exp().item() == pytest.approx(scale)
    assert ("log_scale" in trained_parameters(model)) == learned


def test_a_wide_model_is_read_in_fewer_directions(saved):
    world = World(saved["bert"], "per_layer", readout={"size": 8})
    assert world.model.item.readout.heads["text"].weight.shape == (8, 8)
    assert world.model.item.readout.directions_ZD.shape == (8, HIDDEN)
    assert world.model.item.readout.white["vectors"].stretch_ZZ.shape == (8, 8)
    assert world.model({"item": world.batches()[1]})["item"].vectors_BZ.shape == (BATCH, 8)


def test_heads_start_at_the_identity(saved):
    with_heads, without = (World(saved["bert"], "per_layer", readout={"head": head}) for head in (True, False))
    torch.testing.assert_close(with_heads.scores(), without.scores())
    assert {name for name in trained_parameters(with_heads.model) if name.endswith(".weight")} == {
        f"{side}.readout.heads.{part}.weight" for side in SIDES for part in ("text", "instructions", "vectors")
    }


@pytest.mark.parametrize(
    ("variant", "instructions", "roles"),
    [("text_only", 2, []), ("prefix_only", 2, ["instructions"]), ("per_layer", 0, ["vectors"])],
)
def test_there_is_a_head_for_every_kind_of_slot_that_there_is(saved, variant, instructions, roles):
    model = World(saved["bert"], variant, alignment={"instructions": instructions}).model
    assert list(model.user.readout.heads) == list(model.user.readout.white) == ["text", *roles]


@pytest.mark.parametrize(("variant", "roles"), [("prefix_only", []), ("per_layer", ["vectors"])])
def test_a_decoder_instructs_but_its_instructions_which_see_nothing_are_not_read(saved, variant, roles):
    world = World(saved["llama"], variant)
    assert list(world.model.item.readout.heads) == list(world.model.item.readout.white) == ["text", *roles]
    before = world.scores()
    for name, parameter in world.model.named_parameters():
        if name.endswith("instructions_LMD"):
            parameter.data.neg_()
    assert (world.scores() - before).abs().max() > 1e-3
