"""The codes that one M-group can take, and the search for the best of them.

A code is a vector of M entries, N of them ±1 and the rest 0. Up to 65,536 codes (4:16 has 29,120) are all
scored by the compiled search; without it up to 4,096 (4:8 has 1,120), by one matrix product. Where there are
more, single swaps and sign flips are tried until none helps. Of a lattice the codes are its vectors.
"""

from functools import lru_cache
from itertools import combinations, product

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pbsp.binarization.planes import signs_of
from pbsp.binarization.search import search_codes, search_points, search_vectors, searches, searches_vectors
from pbsp.pruning.lattice import Lattice
from pbsp.pruning.pattern import Pattern, PlanePattern

LARGEST_CODEBOOK = 4096
_SCORE_BYTES = 64 << 20  # scores of vectors alive at once
_SWAP_ROUNDS = 8  # moves per visit; later sweeps visit again


@lru_cache(maxsize=32)
def codebook(pattern: Pattern, device: torch.device) -> Float[Tensor, "signings supports group"]:
    """All codes of a pattern: for every choice of N signs, every support."""
    supports = torch.tensor(list(combinations(range(pattern.group), pattern.kept)))
    signings = torch.tensor(list(product((1.0, -1.0), repeat=pattern.kept)))
    codes = torch.zeros(len(signings), len(supports), pattern.group)
    index = supports.expand(len(signings), -1, -1)
    codes.scatter_(2, index, signings[:, None, :].expand_as(index))
    return codes.to(device)


def best_codes(
    correlation: Float[Tensor, "group rows"],
    metric: Float[Tensor, "group group"],
    scale: Float[Tensor, "rows"],
    pattern: PlanePattern,
    start: Float[Tensor, "group rows"] | None = None,
) -> Float[Tensor, "group rows"]:
    """For each row of a matrix the code c that minimises scale · cᵀ G c − 2 cᵀ · correlation.

    That is the fit of scale·c to a target w in the metric G when correlation = G w: the loss
    (w − scale·c)ᵀ G (w − scale·c) without its constant and divided by the scale, which must not
    be negative. Where the scale is zero, the code that correlates best.

    Exact where the pattern has at most 65,536 codes, without the compiled search 4,096; else a local
    optimum over swaps that is no worse than the code `start`.

    The matrix's rows are the last dimension: its many rows then fill vector registers in every
    step, and torch reduces over the first dimension four times faster than over the last.
    """
    if isinstance(pattern, Lattice):
        return best_vectors(correlation, metric, scale, pattern)
    if searches(correlation, pattern):
        return search_codes(correlation, metric, scale, pattern)
    if pattern.code_count > LARGEST_CODEBOOK:
        if start is None:
            start = _largest_alone(correlation, metric, scale, pattern)
        return _descend(start, correlation, metric, scale)
    return enumerated_codes(correlation, metric, scale, pattern)


def enumerated_codes(
    correlation: Float[Tensor, "group rows"],
    metric: Float[Tensor, "group group"],
    scale: Float[Tensor, "rows"],
    pattern: Pattern,
) -> Float[Tensor, "group rows"]:
    """`best_codes` of a pattern with few codes, in torch: what runs on a GPU and without compiled kernels."""
    codes = codebook(pattern, correlation.device).to(correlation.dtype)
    signings, supports, group = codes.shape
    flat = codes.view(-1, group)
    energy = ((flat @ metric) * flat).sum(1)
    table = torch.cat([flat, -0.5 * energy[:, None]], 1)
    scores = (table @ torch.cat([correlation, scale[None]])).view(signings, supports, -1)
    support = _first_largest(scores.amax(0))
    signing = _first_largest(scores[:, support, torch.arange(len(support), device=support.device)])
    return codes[signing, support].T


def best_vectors(
    correlation: Float[Tensor, "group rows"],
    metric: Float[Tensor, "group group"],
    scale: Float[Tensor, "rows"],
    lattice: Lattice,
) -> Float[Tensor, "group rows"]:
    """`best_codes` of a lattice: a vector and its negative have one energy, so half of them are scored."""
    half = lattice.codes(correlation.device)[: 1 << (lattice.bits - 1)]
    if searches_vectors(correlation):
        return search_vectors(correlation, metric, scale, half)
    return enumerated_vectors(correlation, metric, scale, half.to(correlation.dtype))


def nearest_vectors(values: Float[Tensor, "rows in"], lattice: Lattice) -> Float[Tensor, "rows in"]:
    """The vector of the lattice's codes, at scale 1, that is nearest to every group.

    Nothing of E8 is nearer than its nearest point. Where that has a code, nearly everywhere while latents are
    tuned, nothing needs to be searched for.
    """
    groups = values.reshape(-1, lattice.group)
    found = nearest_points(groups)
    others = (~lattice.holds(found)).nonzero().flatten()
    if len(others):
        white = torch.eye(lattice.group, dtype=values.dtype, device=values.device)
        ones = torch.ones(len(others), dtype=values.dtype, device=values.device)
        found[others] = best_vectors(groups[others].T.contiguous(), white, ones, lattice).T
    return found.view_as(values)


def nearest_points(values: Float[Tensor, "groups group"]) -> Float[Tensor, "groups group"]:
    """The point of E8, doubled, that is nearest to each group: of even numbers or of odd ones.

    Source: Conway and Sloane, Fast quantizing and decoding algorithms for lattice quantizers and codes, 1982.
    """
    if searches_vectors(values):
        return search_points(values)
    values = values.T
    even, odd = _nearest_even(values), _nearest_even(values - 1) + 1
    nearer = (values - odd).square().sum(0) < (values - even).square().sum(0)
    return torch.where(nearer, odd, even).T.contiguous()


def _nearest_even(values: Tensor) -> Tensor:
    """The nearest columns of even numbers whose sum is a multiple of 4."""
    halves = values / 2
    points = halves.round()
    left = halves - points
    # Where the sum is wrong, one number is rounded to its other side: the one that loses least.
    sizes = left.abs()
    wrong = points.sum(0) % 2
    place = _first_largest(sizes).to(values.dtype)
    turned = torch.arange(len(values), dtype=values.dtype, device=values.device)[:, None] == place
    return (points + turned * (signs_of(left) * wrong)) * 2


def enumerated_vectors(
    correlation: Float[Tensor, "group rows"],
    metric: Float[Tensor, "group group"],
    scale: Float[Tensor, "rows"],
    vectors: Float[Tensor, "codes group"],
) -> Float[Tensor, "group rows"]:
    """The best of some vectors and their negatives, in torch."""
    energy = ((vectors @ metric) * vectors).sum(1)
    rows = max(1, _SCORE_BYTES // (4 * len(vectors)))
    found = []
    for part, scales in zip(correlation.split(rows, 1), scale.split(rows), strict=True):
        scores = (vectors @ part).abs_().addmm_(-0.5 * energy[:, None], scales[None])
        best = vectors[_first_largest(scores)].T
        found.append(best * signs_of((best * part).sum(0)))
    return torch.cat(found, 1)


def _first_largest(scores: Float[Tensor, "choices rows"]) -> Int64[Tensor, "rows"]:
    """Argmax over the first dimension; several times faster than torch's own."""
    # Choices are counted in the scores' own type: torch reduces floats by vector instructions.
    choice = torch.arange(len(scores), dtype=scores.dtype, device=scores.device)[:, None]
    return torch.where(scores == scores.amax(0), choice, len(scores)).amin(0).long()


def _largest_alone(correlation: Tensor, metric: Tensor, scale: Tensor, pattern: Pattern) -> Tensor:
    """The N entries that would gain most if each were the only one: 2|t_i| − a G_ii."""
    alone = 2 * correlation.abs() - metric.diagonal()[:, None] * scale
    chosen = alone.topk(pattern.kept, dim=0).indices
    return torch.zeros_like(correlation).scatter_(0, chosen, signs_of(correlation.gather(0, chosen)))


def _descend(code: Tensor, correlation: Tensor, metric: Tensor, scale: Tensor) -> Tensor:
    """Single sign flips and swaps, the best first, until none helps."""
    for _ in range(_SWAP_ROUNDS):
        code, improved = _best_move(code, correlation, metric, scale)
        if not improved:
            break
    return code


def _best_move(code: Tensor, correlation: Tensor, metric: Tensor, scale: Tensor) -> tuple[Tensor, bool]:
    """Apply to each row its best move "entry i away, entry j in with sign s"; i = j flips a sign."""
    group, rows = code.shape
    slope = scale * (metric @ code) - correlation  # half the loss's gradient in the code
    diagonal = metric.diagonal()[:, None]
    away = scale * diagonal - 2 * code * slope  # change of the loss when entry i goes
    kept = code != 0
    flips = torch.eye(group, dtype=torch.bool, device=code.device)[:, :, None]
    changes = []
    for sign in (1.0, -1.0):
        arrive = scale * diagonal + 2 * sign * slope  # change when entry j comes
        both = -2 * sign * metric[:, :, None] * (scale * code)[:, None]
        allowed = kept[:, None] & (~kept[None] | (flips & (code != sign)[None]))
        changes.append((away[:, None] + arrive[None] + both).masked_fill(~allowed, torch.inf))
    change = torch.stack(changes).view(-1, rows)
    move = _first_largest(-change)
    gain = change.gather(0, move[None])[0]
    # A gain below rounding could be undone and taken again for ever.
    take = gain < -1e-6 * (scale * diagonal.mean() + correlation.abs().mean(0))
    sign = 1.0 - 2.0 * (move // group**2)
    moved = code.scatter(0, (move // group % group)[None], 0.0)
    moved = moved.scatter(0, (move % group)[None], sign[None].to(code.dtype))
    return torch.where(take, moved, code), bool(take.any())
