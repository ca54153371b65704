"""A linear layer of two sign factors whose scales, and signs, can be tuned."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbsp.binarization.low_rank import LowRankBinary
from pbsp.binarization.planes import signs_of
from pbsp.recovery.tuned_linear import LARGEST_LATENT, THRESHOLD_MARGIN, TunedLinear

_RIDGE = 1e-3  # of the squared length of a factor's columns


class TunedLowRank(TunedLinear):
    """A linear layer of `LowRankBinary`; both factors' signs are those of their latents.

    Source: the refinement of factors in NanoQuant (arXiv 2602.06694), there with latents left by its fit.
    """

    def __init__(
        self,
        matrix: LowRankBinary,
        bias: Float[Tensor, "out"] | None,
        *,
        original: Float[Tensor, "out in"] | None = None,
        conv1d: bool = False,
    ) -> None:
        """With `original`, the weight that the matrix stands for, signs are tuned too."""
        super().__init__(matrix.dense(), bias, conv1d=conv1d)
        self._matrix = matrix
        self._row_change = nn.Parameter(torch.zeros_like(matrix.row_scales))
        self._column_change = nn.Parameter(torch.zeros_like(matrix.column_scales))
        self._latents = nn.ParameterList([] if original is None else first_latents(matrix, original))

    def changes(self) -> list[nn.Parameter]:
        """Of rows and of columns."""
        return [self._row_change, self._column_change]

    def codes(self) -> list[nn.Parameter]:
        """Of U and of V, or none."""
        return list(self._latents)

    @torch.no_grad()
    def representation(self) -> LowRankBinary:
        """The matrix as it is now."""
        matrix = self._matrix
        tuned = [signs_of(latents).to(torch.int8) for latents in self._latents]
        rows, columns = tuned or (matrix.row_signs, matrix.column_signs)
        return LowRankBinary(
            row_signs=rows,
            column_signs=columns,
            row_scales=(matrix.row_scales * (1 + self._row_change)).half().float(),
            column_scales=(matrix.column_scales * (1 + self._column_change)).half().float(),
        )

    def _pull(self, gradient: Float[Tensor, "out in"]) -> None:
        now, first = self.representation(), self._matrix
        rows, columns = now.row_signs.float(), now.column_signs.float()
        by_row = gradient * now.column_scales @ columns  # of diag(s₁) U
        by_column = (gradient * now.row_scales[:, None]).T @ rows  # of diag(s₂) V
        self._row_change.grad = (by_row * rows).sum(1) * first.row_scales
        self._column_change.grad = (by_column * columns).sum(1) * first.column_scales
        if self._latents:
            self._latents[0].grad = now.row_scales[:, None] * by_row
            self._latents[1].grad = now.column_scales[:, None] * by_column


def first_latents(
    matrix: LowRankBinary, original: Float[Tensor, "out in"]
) -> list[Float[Tensor, "side rank"]]:
    """Latents with the factors' signs, as large as least squares would have them for the original.

    Where these have the other sign the latent lies near 0, on the sign's own side: some steps can turn it.
    """
    scales = torch.outer(matrix.row_scales, matrix.column_scales)
    target = torch.where(scales != 0, original.float() / torch.where(scales != 0, scales, 1.0), 0.0)
    rows, columns = matrix.row_signs.float(), matrix.column_signs.float()
    return [_leaning(rows, columns, target), _leaning(columns, rows, target.T)]


def _leaning(signs: Tensor, other: Tensor, target: Tensor) -> Float[Tensor, "side rank"]:
    system = other.T @ other
    system.diagonal().add_(_RIDGE * len(other))
    wanted = torch.linalg.solve(system, (target @ other).T).T
    return signs * (signs * wanted).clamp(THRESHOLD_MARGIN, LARGEST_LATENT)
