"""Two towers through one frozen language model: prompt, slots, blocks, readout, score (docs/method.md, 1 to 3).

Shape letters: B batch, T positions, K slots or vectors, L blocks, D hidden size, E source dimension, Z size of a
scored vector, directions that are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarec.config.method import Readout
from rarec.ids.source import Source
from rarec.models.alignment import AlignmentModule
from rarec.models.backbone import FrozenBackbone, pool_text
from rarec.models.slots import Slots
from rarec.prompts import AT_TITLES, Encoded, PromptPair, lay_out

IDS = "id"
"""The source that is distilled."""
TEXT = "text"
"""Name of the readout's part that reads the text; every variant has it."""
Vectors = Mapping[str, npt.NDArray[np.floating]]
"""For each source, the vectors of some users or items (B, K, E)."""


@dataclass(frozen=True)
class SideBatch:
    """One side of a batch, users or items.

    Attributes:
        ids_BT: token ids; fillers at slots and padding.
        mask_BT: 1 where there is text or a slot.
        positions_BK: positions of the slots, sources in the alignment's order.
        vectors: the frozen vectors of each source (B, K, E).
    """

    ids_BT: Tensor
    mask_BT: Tensor
    positions_BK: Tensor
    vectors: Mapping[str, Tensor]

    def to(self, device: torch.device) -> "SideBatch":
        """Return the same batch on another device."""
        moved: SideBatch = on_device(self, device)
        return moved


def on_device(value: Any, device: torch.device) -> Any:
    """Return the same value with every tensor in its fields and mappings on a device.

    A GPU reads tensors from pinned memory, while this process goes on.
    """
    if isinstance(value, Tensor):
        return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
    if isinstance(value, Mapping):
        return {name: on_device(part, device) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: on_device(getattr(value, part.name), device) for part in fields(value)})
    return value


def side_batch(prompts: Sequence[Encoded], vectors: Vectors, tower: "Tower", filler: int) -> SideBatch:
    """Lay prompts out with the tower's slots, as tensors.

    Args:
        prompts: filled prompts (B).
        vectors: source vectors of the same users or items.
        tower: says how many slots each source takes.
        filler: token id for slots and padding.
    """
    laid = lay_out(prompts, tower.slots, filler)
    ids, mask, positions = (torch.from_numpy(a) for a in (laid.ids_BT, laid.mask_BT, laid.positions_BK))
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a, np.float32)) for name, a in vectors.items()}
    return SideBatch(ids, mask, positions, tensors)


def title_vectors(prompts: Sequence[Encoded], pair: PromptPair, sources: Mapping[str, Source]) -> Vectors:
    """Return the vectors of the items of histories, (B, H, E), where the prompts have slots for them.

    Args:
        prompts: of users (B).
        pair: their templates.
        sources: every source by name.
    """
    names = [name for name in pair.sources["user"] if name.endswith(AT_TITLES)]
    if not names:
        return {}
    rows_BH = np.full((len(prompts), pair.config.max_history), -1)
    for row, prompt in enumerate(prompts):
        rows_BH[row, : len(prompt.titles_H)] = prompt.titles_H
    present_BH1 = (rows_BH >= 0)[:, :, None]
    return {name: sources[name.removesuffix(AT_TITLES)].items_NE[rows_BH] * present_BH1 for name in names}


class Encoding(NamedTuple):
    """The output of a tower; a tuple, since engines look for tensors in tuples, lists and dicts only.

    Attributes:
        vectors_BZ: the vectors that are scored.
        slots_LBKD: all slots, for the alignment loss; None for text only.
        projected: the projections p of each source (L, B, K, D), for the alignment loss.
        distilled: the student's vectors and their targets, the ID vectors (B, E); None without distillation.
    """

    vectors_BZ: Tensor
    slots_LBKD: Tensor | None
    projected: Mapping[str, Tensor]
    distilled: tuple[Tensor, Tensor] | None = None


class Whitening(nn.Module):
    """Computes `(states - center_D) @ directions_ZD.T @ stretch_ZZ`, whose mean squared length is 1.

    The directions belong to the readout: a map (Z, D) for each part would be most of a bundle. Before
    `fit_whitening`, the map is the identity.
    """

    center_D: Tensor
    stretch_ZZ: Tensor

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.register_buffer("center_D", torch.zeros(hidden))
        self.register_buffer("stretch_ZZ", torch.eye(size))

    def forward(self, states_BD: Tensor, directions_ZD: Tensor | None) -> Tensor:
        """Whiten states (B, D) to (B, Z); None as directions reads all D dimensions."""
        moved_BD = states_BD - self.center_D
        return (moved_BD if directions_ZD is None else moved_BD @ directions_ZD.T) @ self.stretch_ZZ

    @property
    def unit(self) -> Tensor | None:
        """The standard deviation of a random step in each dimension whose whitened mean squared length is 1.

        None if the part is constant, and so read as zero.
        """
        length = self.stretch_ZZ.norm()
        return 1 / length if length > 0 else None


class ReadoutModule(nn.Module):
    """Computes the scored vector from final hidden states [D].

    Its parts are the pooled states of the text and, optionally, the mean state of the slots that hold vectors and of
    the slots that hold instructions. Each part is whitened and mapped by a head that starts at the identity; the parts
    are added, and the sum is L2-normalised. The section `readout` switches each of these steps. Slots of a missing
    vector are not read: they are the same for all users or items without a vector, and would dominate the norm.

    A subclass overrides `read`, which maps one part, or `combine`, which joins the parts (docs/extend.md). Its
    parameters are trained with the rate `train.lr`, and saved in `alignment.safetensors`.

    Args:
        hidden: D.
        config: the section `readout`.
        reads: roles of the slots whose states are read.
    """

    directions_ZD: Tensor | None

    def __init__(self, hidden: int, config: Readout, reads: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.config, self.reads = config, reads
        size = min(hidden, config.size) if config.whiten else hidden
        parts = (TEXT, *reads)
        self.register_buffer("directions_ZD", torch.eye(size, hidden) if size < hidden else None)
        self.white = nn.ModuleDict({part: Whitening(hidden, size) for part in parts} if config.whiten else {})
        self.heads = nn.ModuleDict({part: _identity(size, part == TEXT) for part in parts} if config.head else {})

    def forward(self, hidden_BTD: Tensor, text_BT: Tensor, slots_BKD: Tensor, roles: Mapping[str, Tensor]) -> Tensor:
        """Return the scored vectors (B, Z).

        Args:
            hidden_BTD: final hidden states.
            text_BT: 1 at text positions.
            slots_BKD: last states of the slots.
            roles: for each role, a mask of its slots (B, K).
        """
        parts = self.parts(hidden_BTD, text_BT, slots_BKD, roles)
        read = {part: self.read(part, states_BD) * present_B1 for part, (states_BD, present_B1) in parts.items()}
        vectors_BZ = self.combine(read)
        return F.normalize(vectors_BZ, dim=-1) if self.config.normalise else vectors_BZ

    def parts(
        self, hidden_BTD: Tensor, text_BT: Tensor, slots_BKD: Tensor, roles: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each part's states (B, D) and whether the part is present (B, 1); arguments as of `forward`."""
        text_BD = pool_text(hidden_BTD, text_BT, self.config.pool)
        return {TEXT: (text_BD, torch.ones_like(text_BD[:, :1]))} | {
            role: _mean(slots_BKD.float(), roles[role].float()) for role in self.reads
        }

    def read(self, part: str, states_BD: Tensor) -> Tensor:
        """Return one part as it is combined with the others (B, Z): whitened, then mapped by its head.

        Args:
            part: `text`, `vectors` or `instructions`.
            states_BD: its pooled states.
        """
        white_BZ = self.white[part](states_BD, self.directions_ZD) if self.config.whiten else states_BD
        read_BZ: Tensor = self.heads[part](white_BZ) if self.config.head else white_BZ
        return read_BZ

    def combine(self, read: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors (B, Z), before they are normalised: the sum of the parts.

        Args:
            read: each part (B, Z) by its name, `text` first; zeros in rows where it is missing.
        """
        return torch.stack(list(read.values())).sum(0)


def _mean(slots_BKD: Tensor, chosen_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of the chosen slots' states (B, D), and whether any is chosen (B, 1)."""
    count_B1 = chosen_BK.sum(1, keepdim=True)
    return torch.einsum("bkd,bk->bd", slots_BKD, chosen_BK) / count_B1.clamp_min(1), (count_B1 > 0).float()


def _identity(size: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(size, size, bias)
    nn.init.eye_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class Tower(nn.Module):
    """One side's alignment and readout around the frozen model.

    Args:
        alignment: the alignment module; None for text only.
        readout: the readout.
        slots_from_blocks: whether the slots' states after the last block are read. If not, the alignment has one more
            map, and its output is read in their place.
        student: map of the scored vectors to ID vectors that are distilled into them; used in training alone.
    """

    def __init__(
        self,
        alignment: AlignmentModule | None,
        readout: ReadoutModule,
        slots_from_blocks: bool = True,
        student: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.alignment, self.readout, self.slots_from_blocks = alignment, readout, slots_from_blocks
        self.student = student

    @property
    def slots(self) -> dict[str, int]:
        """The number of slots of each source in the prompt."""
        return self.alignment.slots if self.alignment is not None and self.alignment_blocks else {}

    @property
    def alignment_blocks(self) -> tuple[int, ...]:
        """The blocks that get slots."""
        blocks = self.alignment.blocks if self.alignment is not None else ()
        return blocks if self.slots_from_blocks else blocks[:-1]

    def forward(self, backbone: FrozenBackbone, batch: SideBatch) -> Encoding:
        """Compute slots from the sources' vectors, run the frozen model, and read out text and slots."""
        slots_LBKD, projected = self.alignment(batch.vectors) if self.alignment is not None else (None, {})
        vectors_BZ = self.readout(*self.final_states(backbone, batch, slots_LBKD))
        distilled = None
        if self.student is not None and self.training:
            distilled = self.student(vectors_BZ), batch.vectors[IDS].mean(1)
        return Encoding(vectors_BZ, slots_LBKD, projected, distilled)

    def final_states(
        self, backbone: FrozenBackbone, batch: SideBatch, slots_LBKD: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
        """Run the frozen model with these slots; return what the readout takes, as `ReadoutModule.forward` names it."""
        blocks = self.alignment_blocks
        slots = Slots(slots_LBKD[: len(blocks)], batch.positions_BK, blocks) if slots_LBKD is not None else None
        hidden_BTD = backbone(batch.ids_BT, batch.mask_BT, slots if blocks else None)
        text_BT = backbone.read_mask(batch.mask_BT).scatter(1, batch.positions_BK, 0)
        if self.alignment is None or slots_LBKD is None:
            return hidden_BTD, text_BT, hidden_BTD[:, :0], {}
        roles = self.alignment.role_masks(batch.vectors)
        if not self.slots_from_blocks:
            return hidden_BTD, text_BT, slots_LBKD[-1], roles
        index_BKD = batch.positions_BK.unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1])
        return hidden_BTD, text_BT, hidden_BTD.gather(1, index_BKD), roles


class RaRec(nn.Module):
    """The two towers. score(u, i) = user vector . item vector, so a catalogue is ranked by one matrix product.

    A scale multiplies the user's vector; it is learned under `readout.normalise`.

    Args:
        backbone: the frozen language model.
        user: the user tower.
        item: the item tower.
        scale: first value of the scale.
        learn_scale: whether the scale is trained.
    """

    def __init__(self, backbone: FrozenBackbone, user: Tower, item: Tower, *, scale: float, learn_scale: bool) -> None:
        super().__init__()
        self.backbone, self.user, self.item = backbone, user, item
        # shape (1,), not (): DeepSpeed cannot communicate scalars
        self.log_scale = nn.Parameter(torch.tensor([scale]).log(), requires_grad=learn_scale)

    def forward(self, sides: Mapping[str, SideBatch]) -> dict[str, Encoding]:
        """Encode the given sides: `user`, `item` or both.

        Call the whole model, not a tower: an engine that shards it gathers weights when modules are called.
        """
        encoded: dict[str, Encoding] = {
            side: getattr(self, side)(self.backbone, batch) for side, batch in sides.items()
        }
        if "user" in encoded:
            scaled_BZ = encoded["user"].vectors_BZ * self.log_scale.exp()
            encoded["user"] = encoded["user"]._replace(vectors_BZ=scaled_BZ)
        return encoded
