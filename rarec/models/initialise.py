"""Build a variant before its first step: first values of the alignment in closed form, then a whitened readout [D].

Shape letters: N items, users or texts, K vectors of a user, L blocks, E source dimension, D hidden size, Z directions
read, B prompts, T positions, M positions of text.

A slot should look to a frozen block like a hidden state it knows. So c and b start at the mean text-only state of the
block, and W at a ridge regression of text-only states on standardised source vectors: items on their own text, users
on their target's. The mean of word embeddings is not a word, and in a decoder slots that start there erase most of
what distinguishes the texts (docs/method.md, section 2). So in decoders c and b start at the states of one position
of a text, the most typical.

The states of a language model share a long mean, and the differences between texts are small beside it. So a readout
subtracts the mean, and multiplies by the inverse root of the covariance, as in whitened sentence embeddings (Su et al.,
arXiv 2103.15316). Every part of a readout has its own mean and covariance on each side; the directions are common to
all. A covariance of few states is shrunk towards a multiple of the identity (OAS: Chen et al., arXiv 0907.4698), so
that unseen states are not longer than seen ones after whitening.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarec.config import RunConfig, Variant
from rarec.distributed.world import World
from rarec.ids.source import Source
from rarec.models.alignment import VECTORS, AlignmentModule, SourceAlignment
from rarec.models.backbone import FrozenBackbone
from rarec.models.build import SIDES
from rarec.models.encode import side_batches, text_batch
from rarec.models.towers import RaRec, Tower, Vectors, Whitening, title_vectors
from rarec.prompts import AT_TITLES, Encoded, PromptPair

ALIGNMENT_SAMPLES = 8192
"""Training samples that the alignment's first values are fitted to, at most."""
ALIGNMENT_ITEMS = 65_536
"""Items that the alignment's first values are fitted to, at most."""
WHITENING_SIZE = 2048
"""Users, and items, that are encoded to fit the whitening, at most."""
TYPICAL_TEXTS = 32
"""Item texts among which the most typical position is searched."""
RIDGE_PENALTY = 1.0
"""Penalty of the ridge regression, relative to the mean variance of the standardised ID vectors."""
SHRINK = 0.1
"""Share of the mean variance that is added to the variance of every direction before its root is inverted, so that
directions with next to no variance stay short. On validation users .03, .1 and .3 gave the same (RESULTS.md)."""
CONSTANT_SHARE = 1e-5
"""States whose variance is below this share of their mean square count as constant, as those of a prompt without any
field; otherwise rounding errors would be amplified."""

Floats = npt.NDArray[np.floating]
Rows = npt.NDArray[np.integer]


@dataclass(frozen=True)
class FirstSamples:
    """What first values take from the first training samples.

    Attributes:
        targets_N: item rows of the targets.
        vectors: for each source, the vectors of the samples' users (N, K, E).
        prompts: user prompts of the first samples, at most `WHITENING_SIZE`, to be encoded for the whitening.
    """

    targets_N: Rows
    vectors: dict[str, Floats]
    prompts: list[Encoded]


@dataclass(frozen=True)
class InitialData:
    """The part of the catalogue and of the training samples that first values are computed from.

    Attributes:
        items_N: item rows: all of them, or a random part of a large catalogue.
        encoded_N: some of these rows in random order, to be encoded for the whitening.
        samples: the first training samples.
    """

    items_N: Rows
    encoded_N: Rows
    samples: FirstSamples

    @classmethod
    def draw(cls, samples: FirstSamples, n_items: int, seed: int) -> "InitialData":
        """Draw items at random from a catalogue of `n_items`."""
        generator = np.random.default_rng([seed, *b"start"])
        items_N = np.arange(n_items)
        if n_items > ALIGNMENT_ITEMS:
            items_N = np.sort(generator.choice(n_items, ALIGNMENT_ITEMS, replace=False))
        return cls(items_N, generator.permutation(items_N)[:WHITENING_SIZE], samples)


class Moments:
    """Sums over states, of 1, the state, and its outer product with itself; the sums of several ranks add up."""

    def __init__(self, hidden: int) -> None:
        self.sums: npt.NDArray[np.float64] = np.zeros((hidden + 1, hidden + 1))

    def add(self, states_BD: Tensor) -> None:
        """Add states."""
        states = states_BD.double().cpu().numpy()
        padded = np.concatenate([states, np.ones((len(states), 1))], 1)
        self.sums += padded.T @ padded

    @property
    def count(self) -> int:
        """The number of states."""
        return round(float(self.sums[-1, -1]))

    @property
    def mean_D(self) -> Tensor:
        """The mean of the states."""
        return torch.from_numpy(self.sums[-1, :-1] / self.count)

    @property
    def covariance_DD(self) -> Tensor:
        """The covariance of the states."""
        squares_DD = torch.from_numpy(self.sums[:-1, :-1] / self.count)
        return squares_DD - torch.outer(self.mean_D, self.mean_D)

    @property
    def constant(self) -> bool:
        """Return whether there are no states, or all are equal."""
        squares = self.sums.diagonal()[:-1].sum()
        return not self.count or float(self.covariance_DD.trace()) <= CONSTANT_SHARE * squares / self.count


@dataclass(frozen=True)
class Initialiser:
    """Builds variants before their first step.

    Attributes:
        config: the run.
        build: returns a variant whose weights are not set.
        prompts: the prompts over the catalogue's titles.
        sources: every source by name.
        state_blocks: the blocks whose text-only states are stored.
        item_states_NLD: stored text-only states of the catalogue, over `state_blocks`.
        serving: context of the engine within which a model can be called.
        world: the ranks; each encodes a share of the users and items that the whitening is fitted to.
    """

    config: RunConfig
    build: Callable[[Variant], RaRec]
    prompts: PromptPair
    sources: Mapping[str, Source]
    state_blocks: Sequence[int]
    item_states_NLD: Floats
    serving: Callable[[nn.Module], AbstractContextManager[None]]
    world: World

    def new_model(self, variant: Variant, read_samples: Callable[[int], FirstSamples]) -> RaRec:
        """Return a variant before its first step.

        LoRA, which changes nothing yet, is added last: engines that shard a model can shard it only once.

        Args:
            variant: the variant.
            read_samples: returns the first training samples, at most as many as asked for.
        """
        plain = replace(variant, lora=False)
        whiten = self.config.readout.whiten
        model = self.build(plain)
        aligned = model.user.alignment is not None or model.item.alignment is not None
        if aligned or whiten:
            samples = read_samples(ALIGNMENT_SAMPLES if aligned else WHITENING_SIZE)
            data = InitialData.draw(samples, len(self.prompts.titles), self.config.run.seed)
            with self.serving(model.backbone), torch.no_grad():
                self._initialise_alignment(model, data)
                if whiten:
                    self._fit_whitening(model.eval(), data)
        if not variant.lora:
            return model
        adapted = self.build(variant)
        adapted.user, adapted.item = model.user, model.item
        return adapted

    def _initialise_alignment(self, model: RaRec, data: InitialData) -> None:
        """Set each source's alignment from its vectors and texts: items' own texts, for users their targets' texts.

        At titles, vectors are those of items.
        """
        config = self.config.alignment
        stored = np.array(self.state_blocks)
        penalty = RIDGE_PENALTY if config.init == "ridge" else None
        start_LD = self._decoder_start(model, data)
        for side in SIDES:
            alignment: AlignmentModule | None = getattr(model, side).alignment
            if alignment is None:
                continue
            generator = torch.Generator().manual_seed(self.config.run.seed + (side == "item"))
            nearest = [int(np.abs(stored - block).argmin()) for block in alignment.blocks]
            for name, source in alignment.named_sources():
                of_users = side == "user" and not source.shape.at_titles
                rows_N = data.samples.targets_N if of_users else data.items_N
                states_NLD = torch.from_numpy(self.item_states_NLD[rows_N][:, nearest].astype(np.float32))
                items_NE = self.sources[name.removesuffix(AT_TITLES)].items_NE
                vectors_NE = data.samples.vectors[name].mean(1) if of_users else items_NE[rows_N]
                vectors = torch.from_numpy(np.ascontiguousarray(vectors_NE, np.float32))
                states_LND = states_NLD.transpose(0, 1)
                initialise(source, vectors, states_LND, penalty=penalty, generator=generator, start_LD=start_LD)

    def _decoder_start(self, model: RaRec, data: InitialData) -> Tensor | None:
        """Return where b and c start in a decoder (L, D); None in an encoder, and where no slots enter the model.

        A map behind the last block starts where that of the last block does.
        """
        blocks = model.user.alignment_blocks or model.item.alignment_blocks
        if not model.backbone.sink or not blocks:
            return None
        prompts = [self.prompts.item(int(row)) for row in data.encoded_N[:TYPICAL_TEXTS]]
        ids_BT, mask_BT = text_batch(prompts, self.prompts.tokenizer.filler, model.backbone.device)
        states_LD = typical_states(model.backbone, ids_BT, mask_BT, blocks)
        return states_LD if model.user.slots_from_blocks else torch.cat([states_LD, states_LD[-1:]])

    def _fit_whitening(self, model: RaRec, data: InitialData) -> None:
        """Fit the whitening of every part of both readouts to users and items encoded by the variant as it is."""
        moments = {side: self.moments(model, side, data) for side in SIDES}
        every = [each for by_part in moments.values() for each in by_part.values()]
        for each in every:
            self.world.all_reduce_sum_(each.sums)
        directions_ZD = directions(every, model.backbone.hidden_size, self.config.readout.size)
        if not self.world.is_main:  # the sign of an eigenvector may differ between processors: use rank 0's
            directions_ZD.zero_()
        self.world.all_reduce_sum_(directions_ZD.numpy())
        for side in SIDES:
            tower: Tower = getattr(model, side)
            readout = tower.readout
            if readout.directions_ZD is not None:
                readout.directions_ZD.copy_(directions_ZD)
            for part, whitening in readout.white.items():
                fit_whitening(cast(Whitening, whitening), moments[side][part], directions_ZD)
            if not tower.slots_from_blocks:
                _rescale_last_map(tower)

    def moments(self, model: RaRec, side: str, data: InitialData) -> dict[str, Moments]:
        """Encode this rank's share of one side; return the moments of each part of its readout."""
        tower: Tower = getattr(model, side).to(self.world.device)
        by_part = {part: Moments(model.backbone.hidden_size) for part in tower.readout.white}
        prompts, vectors = self._side_inputs(side, data)
        size, filler = self.config.evaluate.batch_size, self.prompts.tokenizer.filler
        self.world.report(f"encoding {side}s to fit the whitening")
        for mine, _, batch in side_batches(prompts, vectors, tower, filler, size, self.world):
            slots_LBKD = tower.alignment(batch.vectors)[0] if tower.alignment is not None else None
            parts = tower.readout.parts(*tower.final_states(model.backbone, batch, slots_LBKD))
            for part, (states_BD, present_B1) in parts.items():
                if mine:
                    by_part[part].add(states_BD[present_B1[:, 0] > 0])
        return by_part

    def _side_inputs(self, side: str, data: InitialData) -> tuple[list[Encoded], Vectors]:
        """Return the prompts of one side that are encoded for the whitening, and their vectors."""
        if side == "item":
            items = [self.prompts.item(int(row)) for row in data.encoded_N]
            return items, {name: source.items_NE[data.encoded_N][:, None] for name, source in self.sources.items()}
        users = data.samples.prompts
        vectors = {name: vectors_NKE[: len(users)] for name, vectors_NKE in data.samples.vectors.items()}
        return users, {**vectors, **title_vectors(users, self.prompts, self.sources)}


def _rescale_last_map(tower: Tower) -> None:
    """Set the unit of the map behind the last block to that of the whitening that its slots go through.

    Whitening stretches directions in which these slots hardly vary so far that steps of the block's own unit would
    erase their first values.
    """
    white = cast(Mapping[str, Whitening], tower.readout.white)
    unit = white[VECTORS].unit if VECTORS in white else None
    if tower.alignment is not None and unit is not None:
        for _, source in tower.alignment.named_sources():
            source.rescale_last(unit)


@torch.no_grad()
def initialise(
    alignment: SourceAlignment,
    vectors_NE: Tensor,
    states_LND: Tensor,
    *,
    penalty: float | None,
    generator: torch.Generator,
    start_LD: Tensor | None = None,
) -> None:
    """Set a source's alignment from pairs of source vectors and text-only states.

    Args:
        alignment: of one source on one side; its L blocks are those of `states_LND`.
        vectors_NE: one raw vector for each text; rows of zeros are skipped.
        states_LND: pooled text-only states entering each block.
        penalty: penalty of the ridge regression; None leaves W random, as do blocks in which all texts are equal.
        generator: generator of the random parts.
        start_LD: where b and c start; the mean state by default.
    """
    alignment.reset(generator)
    states_LND = states_LND.float()
    unit_L, differ_L = _units(states_LND)
    alignment.unit_L.copy_(unit_L)
    begin_LD = (states_LND.mean(1) if start_LD is None else start_LD.cpu()) / alignment.unit_L[:, None]
    if alignment.instructions_LMD is not None:
        alignment.instructions_LMD.add_(begin_LD.unsqueeze(1))
    if alignment.projections:
        alignment.bias_LD.copy_(begin_LD)
        present_N = (vectors_NE != 0).any(1)
        if not present_N.any():  # with a sparse source, none of the sampled items may have a vector
            return
        alignment.standardise(vectors_NE[present_N])
        if penalty is not None:
            standard_NE = (vectors_NE[present_N] - alignment.center_E) / alignment.scale_E
            weight_LDE = ridge_weights(standard_NE, states_LND[:, present_N], penalty) / alignment.unit_L[:, None, None]
            # Texts that are all equal predict W = 0, and with it items that are all the same, whatever is trained.
            alignment.weight_LDE.copy_(torch.where(differ_L[:, None, None], weight_LDE, alignment.weight_LDE))


def ridge_weights(vectors_NE: Tensor, states_LND: Tensor, penalty: float) -> Tensor:
    """Return W (L, D, E) that minimises |states - mean - W vectors|^2 + penalty N |W|^2, in float64.

    Args:
        vectors_NE: standardised source vectors.
        states_LND: the states to predict.
        penalty: relative to the unit variance of the vectors.
    """
    vectors = vectors_NE.double()
    gram_EE = vectors.T @ vectors / len(vectors)
    gram_EE.diagonal().add_(penalty)
    centred = (states_ND.double() - states_ND.double().mean(0) for states_ND in states_LND)
    moments_LED = torch.stack([vectors.T @ states_ND / len(vectors) for states_ND in centred])
    weights_LED: Tensor = torch.linalg.solve(gram_EE, moments_LED)
    return weights_LED.transpose(1, 2)


def typical_states(backbone: FrozenBackbone, ids_BT: Tensor, mask_BT: Tensor, blocks: Sequence[int]) -> Tensor:
    """Return the states (L, D) that enter each of `blocks` at the most typical position of these texts.

    It is the position whose states have the largest mean cosine with those of all others, over the blocks.
    """
    text_BT = backbone.read_mask(mask_BT).bool()
    states_LMD = torch.stack(backbone.block_inputs(ids_BT, mask_BT, blocks, lambda h_BTD: h_BTD[text_BT].float()))
    units_LMD = F.normalize(states_LMD, dim=-1)
    cosines_M = torch.einsum("lmd,ld->m", units_LMD, units_LMD.sum(1))
    return states_LMD[:, cosines_M.argmax()]


def _units(states_LND: Tensor) -> tuple[Tensor, Tensor]:
    """Return each block's unit (L,), and whether its texts differ (L,).

    The unit is the median over dimensions of the standard deviation; of texts that are all equal, the root mean square,
    or 1 where that is zero too.
    """
    spreads_L = states_LND.std(1, unbiased=False).median(1).values
    sizes_L = states_LND.square().mean((1, 2)).sqrt()
    differ_L = spreads_L.square() > CONSTANT_SHARE * sizes_L.square()
    return torch.where(differ_L, spreads_L, torch.where(sizes_L > 0, sizes_L, 1.0)), differ_L


@torch.no_grad()
def fit_whitening(whitening: Whitening, moments: Moments, directions_ZD: Tensor) -> None:
    """Fit mean and stretch to the moments of states.

    A part that is missing or constant in all of them holds no information, and is read as zero from then on.
    """
    if moments.constant:
        whitening.stretch_ZZ.zero_()
        return
    values_Z, vectors_ZZ = torch.linalg.eigh(directions_ZD @ moments.covariance_DD @ directions_ZD.T)
    variances_Z = shrunk(values_Z.clamp_min(0), moments.count)
    stretch_Z = (variances_Z + SHRINK * variances_Z.mean()).rsqrt()
    stretch_Z /= (stretch_Z.square() * variances_Z).sum().sqrt()
    whitening.center_D.copy_(moments.mean_D)
    whitening.stretch_ZZ.copy_(vectors_ZZ @ torch.diag(stretch_Z) @ vectors_ZZ.T)


def shrunk(variances_Z: Tensor, count: int) -> Tensor:
    """Return the OAS estimate of variances (Z,), given those of a sample of `count` states."""
    size = len(variances_Z)
    total = variances_Z.sum()
    squares = variances_Z.square().sum()
    uneven = (count + 1 - 2 / size) * (squares - total.square() / size)
    share = (((1 - 2 / size) * squares + total.square()) / uneven).clamp(max=1) if uneven > 0 else 1.0
    return (1 - share) * variances_Z + share * variances_Z.mean()


def directions(moments: Iterable[Moments], hidden: int, size: int) -> Tensor:
    """Return the directions (Z, D) of largest variance, float64, with equal weight of each part; all if `size` >= D."""
    covariances = [part.covariance_DD for part in moments if not part.constant]
    if size >= hidden or not covariances:
        return torch.eye(min(size, hidden), hidden, dtype=torch.float64)
    vectors_DD: Tensor = torch.linalg.eigh(sum(c / c.trace() for c in covariances)).eigenvectors
    return vectors_DD[:, -size:].T
