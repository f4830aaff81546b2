"""Add up the softened probabilities of several teachers, by chunks that stay in the cache.

A mixture is kept as logarithms, log p̄ = log Σ_k w_k p_k, because a probability that is too small
for a float has a logarithm that is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._op import Number
from fastkd.portable._chunks import by_workers, cut, for_each, most_elements

_ON_CPU, _ELSEWHERE = 1 << 18, 1 << 23  # elements of a chunk


def mix(
    mixture: Tensor, logits: Tensor, temperature: Number, log_shares: Tensor, is_first: bool
) -> None:
    """Add a teacher's probabilities times its share in each row to a mixture, all as logarithms.

    Args:
        mixture: log p̄ of the teachers before, [N, V], overwritten. The first teacher finds nothing.
        logits: Those of the teacher, [N, V].
        temperature: What divides them.
        log_shares: log w, [N, 1].
        is_first: Whether no teacher came before.
    """
    n_rows, n_cols = logits.shape
    size = max(1, most_elements(mixture, _ON_CPU, _ELSEWHERE) // n_cols)

    def of_chunk(rows: slice, scratch: Sequence[Tensor]) -> None:
        z, out, n = logits[rows], mixture[rows], rows.stop - rows.start
        above, e = (x[:n] for x in scratch)
        # the maximum is subtracted first, because one multiplication for both would round it away
        top = z.amax(-1, keepdim=True).to(above.dtype)
        torch.sub(z, top, out=above).mul_(1 / temperature)
        shift = log_shares[rows] - torch.exp(above, out=e).sum(-1, keepdim=True).log_()
        if is_first:
            torch.add(above, shift, out=out)
        else:
            torch.logaddexp(out, above.add_(shift), out=out)

    def scratch() -> Sequence[Tensor]:
        return mixture.new_empty((2, min(size, n_rows), n_cols)).unbind()

    chunks = cut(range(n_rows), size)
    by_workers(lambda: for_each(of_chunk, chunks, scratch), len(chunks) > 1, mixture)
