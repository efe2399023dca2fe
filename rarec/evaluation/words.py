"""The words that soft tokens lie nearest to, by cosine, in the language model's table of input embeddings (ours).

Shape letters: V vocabulary, D hidden size, Q soft tokens, W words asked for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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
