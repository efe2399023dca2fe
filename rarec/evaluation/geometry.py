"""Measures of sets of vectors: similarity of two sets, effective rank, mean cosine, nearest rows of a table.

Shape letters: N vectors, D and E dimensions, V rows of a table, Q queries, W rows asked for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CONSTANT = 1e-14
"""Variance, as a share of the mean square, below which vectors count as all equal: float32 cannot resolve less."""
TABLE_ROWS = 8192
"""Rows of the table copied to float32 at a time: 134 MB with 4,096 dimensions. A whole table can take gigabytes."""


def linear_cka(x_ND: Tensor, y_NE: Tensor) -> float | None:
    """Return the linear centred kernel alignment of two sets of N vectors (Kornblith et al., ICML 2019).

    HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) with linear kernels: 1 if one set is a scaled rotation of the other, about
    0 if they are unrelated. HSIC is estimated without bias (Song et al., JMLR 2012; as in Nguyen et al., ICLR 2021):
    the plain estimate grows by chance with the number of directions, so that sets before and after a map could not be
    compared.

    Returns:
        0 to 1, up to chance; None for fewer than four vectors, or if a set is constant or not finite. (Last-token
        states at block 0 are constant if all prompts end alike.)
    """
    if len(x_ND) < 4:
        return None
    x_NN, y_NN = _centred_gram(x_ND).fill_diagonal_(0), _centred_gram(y_NE).fill_diagonal_(0)
    x, y = _hsic(x_NN, x_NN), _hsic(y_NN, y_NN)
    return float(_hsic(x_NN, y_NN) / (x * y).sqrt()) if x > 0 and y > 0 else None


def effective_rank(x_ND: Tensor) -> float | None:
    """Return the effective rank of the centred vectors: exp of the entropy of the normalised singular values.

    Source: Roy and Vetterli, EUSIPCO 2007.

    Returns:
        1 to min(N - 1, D); 0 if the vectors are all equal, None if they are not finite.
    """
    gram_NN = _centred_gram(x_ND)
    if not gram_NN.isfinite().all():
        return None
    values_N = torch.linalg.eigvalsh(gram_NN)
    values_N = values_N[values_N > 1e-12 * values_N.max()].sqrt()  # smaller ones are rounding errors
    shares_N = values_N / values_N.sum()
    return float(torch.special.entr(shares_N).sum().exp()) if len(shares_N) else 0.0


def mean_cosine(x_ND: Tensor) -> float | None:
    """Return the mean cosine over all pairs of different vectors: 1 if all point in the same direction.

    Returns:
        -1 / (N - 1) to 1; None for fewer than two vectors, or if they are not finite.
    """
    count = len(x_ND)
    if count < 2 or not x_ND.isfinite().all():
        return None
    units_ND = F.normalize(x_ND.double(), dim=-1)
    return float((units_ND.sum(0).square().sum() - units_ND.square().sum()) / (count * (count - 1)))


def nearest_rows(table_VD: Tensor, queries_QD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a table with the highest cosine to each query.

    Args:
        table_VD: such as a language model's input embeddings, of any type, on any device. Rows of zeros have cosine 0.
        queries_QD: the vectors to look up.
        count: W; fewer rows are returned if the table has fewer.

    Returns:
        Cosines (Q, W), highest first, and row numbers (Q, W), both on the CPU.
    """
    queries_QD = F.normalize(queries_QD.to(table_VD.device, torch.float32), dim=-1)
    best_QW, rows_QW = queries_QD.new_empty(len(queries_QD), 0), torch.empty(len(queries_QD), 0, dtype=torch.long)
    rows_QW = rows_QW.to(table_VD.device)
    for start in range(0, len(table_VD), TABLE_ROWS):
        part_VD = F.normalize(table_VD[start : start + TABLE_ROWS].float(), dim=-1)
        values_QV, places_QV = (queries_QD @ part_VD.T).topk(min(count, len(part_VD)))
        both_QV, rows_QV = torch.cat([best_QW, values_QV], 1), torch.cat([rows_QW, places_QV + start], 1)
        best_QW, chosen_QW = both_QV.topk(min(count, both_QV.shape[1]))
        rows_QW = rows_QV.gather(1, chosen_QW)
    return best_QW.cpu(), rows_QW.cpu()


def _centred_gram(x_ND: Tensor) -> Tensor:
    """Return the dot products (N, N) of the centred vectors in float64; zeros if the vectors are all equal."""
    x_ND = x_ND.double()
    centred_ND = x_ND - x_ND.mean(0)
    constant = centred_ND.square().sum() <= CONSTANT * x_ND.square().sum()
    return centred_ND @ centred_ND.T * ~constant


def _hsic(x_NN: Tensor, y_NN: Tensor) -> Tensor:
    """Return the unbiased estimate of HSIC, from kernels with a zero diagonal."""
    n = len(x_NN)
    whole = x_NN.sum() * y_NN.sum() / ((n - 1) * (n - 2))
    return ((x_NN * y_NN).sum() + whole - 2 / (n - 2) * (x_NN.sum(0) @ y_NN.sum(0))) / (n * (n - 3))
