"""How many lines of 128 bytes and sectors of 32 the loads and stores of a warp touch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np


@dataclass
class Counts:
    """Loads or stores of one width: how many warps asked, what they touched, which bytes of it.

    A byte that several lanes of a warp ask for counts once.
    """

    requests: int = 0
    lines: int = 0
    sectors: int = 0
    n_bytes: int = 0

    def __str__(self) -> str:
        lines, sectors = self.lines / self.requests, self.sectors / self.requests
        used = self.n_bytes / (32 * self.sectors)
        return f"{self.requests:9d} {lines:7.1f} {sectors:9.1f} {used:7.0%}"


class Traffic:
    """Global loads and stores by kernel, direction and bytes of a lane."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, int], Counts] = defaultdict(Counts)

    def record(
        self, kernel: str, kind: str, warps: np.ndarray, addresses: np.ndarray, n_bytes: int
    ) -> None:
        """Count an access of lanes: the number of each one's warp, and the address."""
        counts = self.counts[kernel, kind, n_bytes]
        addresses = addresses.astype(np.int64)
        pairs = np.unique(np.stack([warps, addresses // 32]), axis=1)
        counts.requests += len(np.unique(warps))
        counts.sectors += pairs.shape[1]
        counts.lines += np.unique(np.stack([pairs[0], pairs[1] // 4]), axis=1).shape[1]
        counts.n_bytes += np.unique(np.stack([warps, addresses]), axis=1).shape[1] * n_bytes

    def total(self, kernel: str, kind: str) -> Counts:
        """Return the sum over all widths."""
        total = Counts()
        for (name, direction, _), counts in self.counts.items():
            if (name, direction) == (kernel, kind):
                total.requests += counts.requests
                total.lines += counts.lines
                total.sectors += counts.sectors
                total.n_bytes += counts.n_bytes
        return total

    def table(self) -> str:
        """Return a line for each kernel, direction and width."""
        head = f"{'kernel':24} {'':5} {'bytes':>5} {'requests':>9} {'lines':>7} {'sectors':>9} used"
        rows = [
            f"{kernel:24} {kind:5} {n_bytes:5d} {counts}"
            for (kernel, kind, n_bytes), counts in sorted(self.counts.items())
        ]
        return "\n".join([head, *rows])
