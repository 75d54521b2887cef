"""The largest singular values of a matrix, approximately."""

from __future__ import annotations

import torch
from torch import Tensor


def lowrank_svd(matrix: Tensor, count: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values of a matrix with their vectors, approximately and much faster than all.

    Their subspace is searched from a random start ("Finding structure with randomness", arXiv 0909.4061, algorithm
    4.4), which is the same every time: equal matrices give equal results.

    Args:
        matrix: The matrix, in float32.
        count: How many; a matrix of lower rank gives as many as it has.
        iterations: How often the matrix is applied both ways.

    Returns:
        The left vectors as columns, the values, the largest first, and the right vectors as rows.
    """
    count = min(count, *matrix.shape)
    # Drawn on the CPU, whose numbers are the same on every machine.
    start = torch.randn(matrix.shape[1], count, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh
