"""How a set of vectors lies in its space, and whether two sets lie alike: figures without a model.

Shape letters: N vectors, D and E dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CONSTANT = 1e-14
"""Vectors whose variance is a smaller share of their mean square are all the same: float32 tells no more apart."""


def linear_cka(x_ND: Tensor, y_NE: Tensor) -> float | None:
    """Linear centred kernel alignment of two sets of vectors of the same N things (Kornblith et al., ICML 2019).

    HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) with linear kernels: 1 where one is a rotation of the other with any scale,
    about 0 where they have nothing to do with one another. HSIC is estimated without bias (Song et al., JMLR 2012; so
    used by Nguyen et al., ICLR 2021): the plain estimate is above 0 by chance, the more the more directions the vectors
    have, and vectors before and after a map could not be compared.

    Returns:
        From 0 to 1, but for chance; None of fewer than four things, or where a set is constant or not finite.
        Last-token states at block 0 are constant where all prompts end alike.
    """
    if len(x_ND) < 4:
        return None
    x_NN, y_NN = _centred_gram(x_ND).fill_diagonal_(0), _centred_gram(y_NE).fill_diagonal_(0)
    x, y = _hsic(x_NN, x_NN), _hsic(y_NN, y_NN)
    return float(_hsic(x_NN, y_NN) / (x * y).sqrt()) if x > 0 and y > 0 else None


def effective_rank(x_ND: Tensor) -> float | None:
    """How many directions the vectors really vary in: exp of the entropy of the singular values' shares.

    Roy and Vetterli, EUSIPCO 2007, of the centred vectors.

    Returns:
        From 1 to min(N - 1, D); 0 where the vectors are all the same, None where they are not finite.
    """
    gram_NN = _centred_gram(x_ND)
    if not gram_NN.isfinite().all():
        return None
    values_N = torch.linalg.eigvalsh(gram_NN)
    values_N = values_N[values_N > 1e-12 * values_N.max()].sqrt()  # below is rounding
    shares_N = values_N / values_N.sum()
    return float(torch.special.entr(shares_N).sum().exp()) if len(shares_N) else 0.0


def mean_cosine(x_ND: Tensor) -> float | None:
    """Mean cosine over all pairs of two different vectors: 1 where all point the same way.

    Returns:
        From -1 / (N - 1) to 1; None of fewer than two vectors, or of such as are not finite.
    """
    count = len(x_ND)
    if count < 2 or not x_ND.isfinite().all():
        return None
    units_ND = F.normalize(x_ND.double(), dim=-1)
    return float((units_ND.sum(0).square().sum() - units_ND.square().sum()) / (count * (count - 1)))


def _centred_gram(x_ND: Tensor) -> Tensor:
    """Dot products (N, N) of the centred vectors, in float64; zero where they are all the same."""
    x_ND = x_ND.double()
    centred_ND = x_ND - x_ND.mean(0)
    constant = centred_ND.square().sum() <= CONSTANT * x_ND.square().sum()
    return centred_ND @ centred_ND.T * ~constant


def _hsic(x_NN: Tensor, y_NN: Tensor) -> Tensor:
    """The unbiased estimate, from kernels without their diagonals."""
    n = len(x_NN)
    whole = x_NN.sum() * y_NN.sum() / ((n - 1) * (n - 2))
    return ((x_NN * y_NN).sum() + whole - 2 / (n - 2) * (x_NN.sum(0) @ y_NN.sum(0))) / (n * (n - 3))


ROWS = 8192
"""Rows of the table that are copied to float32 at a time: 134 MB of 4,096 dimensions. Whole, it can take gigabytes."""


def nearest_words(table_VD: Tensor, queries_QD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines (Q, W), highest first, and the rows (Q, W) of the table that have them; on the CPU.

    Args:
        table_VD: input embeddings, of any type, on any device. Empty rows have cosine 0.
        queries_QD: soft tokens.
        count: W; fewer where the table is smaller.
    """
    queries_QD = F.normalize(queries_QD.to(table_VD.device, torch.float32), dim=-1)
    best_QW, rows_QW = queries_QD.new_empty(len(queries_QD), 0), torch.empty(len(queries_QD), 0, dtype=torch.long)
    rows_QW = rows_QW.to(table_VD.device)
    for start in range(0, len(table_VD), ROWS):
        part_VD = F.normalize(table_VD[start : start + ROWS].float(), dim=-1)
        values_QV, places_QV = (queries_QD @ part_VD.T).topk(min(count, len(part_VD)))
        both_QV, rows_QV = torch.cat([best_QW, values_QV], 1), torch.cat([rows_QW, places_QV + start], 1)
        best_QW, chosen_QW = both_QV.topk(min(count, both_QV.shape[1]))
        rows_QW = rows_QV.gather(1, chosen_QW)
    return best_QW.cpu(), rows_QW.cpu()
