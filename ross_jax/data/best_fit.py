"""Best-fit packing: each sample goes, in order, into the fullest of 512 open rows that has room for it.

    needs   tokens 5 3 4 4 ...   images 1 0 1 0 ...    one row of numbers per limit
    limits  tokens 8, images 2
    rows    0 0 1 1 ...                                the row of each sample

When a sample fits into no open row, all of them are closed and 512 new ones opened. Fullness is the sum of what a row
holds under all limits, and the first of equally full rows is taken: rows are those of grain's `BestFitPackIterDataset`.
"""

from collections.abc import Iterator, Sequence

import numpy as np

OPEN_ROWS = 512
"""Rows that a sample may still go into. More of them cost time and pack no better."""


def best_fit(needs: np.ndarray, limits: Sequence[int]) -> np.ndarray:
    """int32[samples]: the row of each sample.

    Args:
      needs: int[limits, samples], none above its limit.
    """
    dtype = np.int16 if sum(limits) < 2**15 - 1 else np.int32
    used = np.zeros((len(limits), OPEN_ROWS), dtype)
    scores = np.ones(OPEN_ROWS, dtype)  # 1 more than what a row holds: 0 is for rows without room
    fits, also, found = np.empty(OPEN_ROWS, bool), np.empty(OPEN_ROWS, bool), np.empty(OPEN_ROWS, dtype)
    rows, first = np.empty(needs.shape[1], np.int32), 0
    others = list(range(1, len(limits)))
    for sample, need in enumerate(_columns(needs)):
        np.less_equal(used[0], limits[0] - need[0], out=fits)
        for k in others:
            np.less_equal(used[k], limits[k] - need[k], out=also)
            np.logical_and(fits, also, out=fits)
        np.multiply(scores, fits, out=found)
        row = int(found.argmax())
        if not fits[row]:
            row, first = 0, first + OPEN_ROWS
            used[:], scores[:] = 0, 1
        used[:, row] += need
        scores[row] += sum(need)
        rows[sample] = first + row
    return rows


def _columns(needs: np.ndarray) -> Iterator[tuple[int, ...]]:
    """What each sample needs, as plain numbers, which are made in pieces to save memory."""
    for start in range(0, needs.shape[1], 2**16):
        yield from zip(*needs[:, start : start + 2**16].tolist(), strict=True)
