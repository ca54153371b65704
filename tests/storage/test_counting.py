"""Streams are counted, never written: what proves the count is that a matrix can be rebuilt from them."""

import itertools
from dataclasses import replace

import pytest
import torch

from pbsp.binarization.grouped import PAPER, GroupedBinarization, Scheme
from pbsp.binarization.planes import block_count
from pbsp.methods.table import build_method
from pbsp.pruning.pattern import Pattern
from pbsp.quantization.integers import IntegerGroups
from pbsp.storage.bits import streams_bits
from pbsp.storage.counting import count_bits, streams
from pbsp.storage.layouts import is_packable, pack
from random_grouped import random_grouped
from random_low_rank import random_low_rank
from random_planes import random_planes
from variants import VARIANTS, build_variant, layer_problem


def half_of_bits(bits):
    """The value of a float16 pattern, from the definition of the format."""
    exponent, fraction = bits >> 10 & 31, bits & 1023
    magnitude = (1024 + fraction) * 2.0 ** (exponent - 25) if exponent else fraction * 2.0**-24
    return -magnitude if bits >> 15 else magnitude


class Reader:
    """The numbers of each stream, one at a time; all must have been asked for in the end."""

    def __init__(self, found):
        assert len({stream.kind for stream in found}) == len(found)
        for stream in found:
            assert not stream.numbers.is_floating_point()
            assert stream.numbers.ndim == 1
            assert stream.numbers.numel() == 0 or int(stream.numbers.min()) >= 0
            assert stream.numbers.numel() == 0 or int(stream.numbers.max()) < 2**stream.width
        self.left = {stream.kind: iter(stream.numbers.tolist()) for stream in found}
        self.sizes = {stream.kind: stream.numbers.numel() for stream in found}

    def next(self, kind, otherwise=None):
        """The next number of a stream; of one that is not there, what needs no stream."""
        return next(self.left[kind]) if kind in self.left else otherwise

    def half(self, kind):
        return half_of_bits(self.next(kind))

    def finished(self):
        return all(next(rest, None) is None for rest in self.left.values())


def integers_from_streams(found, shape, width, block):
    (rows, columns), reader = shape, Reader(found)
    codes = [[reader.next("codes") for _ in range(columns)] for _ in range(rows)]
    scales = [[reader.half("scales") for _ in range(0, columns, block)] for _ in range(rows)]
    zeros = [[reader.next("zeros") for _ in range(0, columns, block)] for _ in range(rows)]
    assert reader.finished()
    return [
        [scales[i][j // block] * (codes[i][j] - zeros[i][j // block]) for j in range(columns)]
        for i in range(rows)
    ]


def masks_from_streams(reader, shape, pattern):
    rows, columns = shape
    if pattern is not None:
        positions = itertools.combinations(range(pattern.group), pattern.kept)
        supports = sorted(positions, key=lambda support: support[::-1])
        kept = []
        for _ in range(rows):
            groups = [supports[reader.next("supports", 0)] for _ in range(columns // pattern.group)]
            kept.append([j % pattern.group in groups[j // pattern.group] for j in range(columns)])
        return kept
    if "kept columns" in reader.sizes:
        row = [reader.next("kept columns") == 1 for _ in range(columns)]
        return [row] * rows
    return [[reader.next("kept weights", 1) == 1 for _ in range(columns)] for _ in range(rows)]


def grouped_from_streams(found, shape, *, pattern, scheme, block):
    """The matrix, weight by weight, in Python's floats."""
    (rows, columns), reader = shape, Reader(found)
    kept = masks_from_streams(reader, shape, pattern)
    parts = reader.sizes.get("salient columns", columns) // columns
    salient = [[reader.next("salient columns", 0) == 1 for _ in range(columns)] for _ in range(parts)]
    per_once, per_twice = 1 + scheme.means, 2 + scheme.means
    count = scheme.groups * per_once + scheme.salient_groups * per_twice
    scalars = [
        [[reader.half("scalars") for _ in range(count)] for _ in range(0, columns, block)]
        for _ in range(rows)
    ]
    once = range(scheme.groups * per_once)
    factors = [[[1.0] * columns for _ in range(count)] for _ in range(parts)]
    if "column scales" in reader.sizes:
        for part, scalar, column in itertools.product(range(parts), range(count), range(columns)):
            if (scalar in once) != salient[part][column]:
                factors[part][scalar][column] = reader.half("column scales")
    result = [[0.0] * columns for _ in range(rows)]
    for i, j in itertools.product(range(rows), range(columns)):
        if kept[i][j]:
            part = i // (rows // parts)
            values = [value * factors[part][n][j] for n, value in enumerate(scalars[i][j // block])]
            sign = 2 * reader.next("signs") - 1
            if salient[part][j]:
                low = len(once) + per_twice * reader.next("salient groups", 0)
                second = 2 * reader.next("residual signs") - 1
                result[i][j] = values[low] * sign + values[low + 1] * second
            else:
                low = per_once * reader.next("groups", 0)
                result[i][j] = values[low] * sign
            if scheme.means:
                result[i][j] += values[low + (2 if salient[part][j] else 1)]
    assert reader.finished()
    return result


def assert_rebuilt(matrix):
    found, shape = streams(matrix), tuple(matrix.dense().shape)
    if isinstance(matrix, IntegerGroups):
        rebuilt = integers_from_streams(found, shape, matrix.width, matrix.block)
    else:
        rebuilt = grouped_from_streams(
            found, shape, pattern=matrix.pattern, scheme=matrix.scheme, block=matrix.block
        )
    torch.testing.assert_close(matrix.dense(), torch.tensor(rebuilt), rtol=1e-6, atol=1e-6)
    assert (matrix.dense()[torch.tensor(rebuilt) == 0] == 0).all()


def random_matrix(scheme, rows=6, columns=40, *, block=16, parts=1, keep=None, seed=0):
    """Any scheme, dense or with a mask; without means there are column scales."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.ones(rows, columns, dtype=torch.bool) if keep is None else keep
    salient = torch.rand(parts, columns, generator=generator) < (0.3 if scheme.salient_groups else 0)
    twice = kept & salient.repeat_interleave(rows // parts, 0)
    signs, residual = (2 * torch.randint(0, 2, (2, rows, columns), generator=generator) - 1).to(torch.int8)
    groups = torch.where(
        twice,
        torch.randint(0, max(scheme.salient_groups, 1), kept.shape, generator=generator),
        torch.randint(0, scheme.groups, kept.shape, generator=generator),
    )
    blocks = block_count(columns, block)
    factors = torch.rand(parts, scheme.scalars, columns, generator=generator).half().float()
    used = [level.salient for level in scheme.levels() for _ in level.positions]
    factors = torch.where(salient[:, None] == torch.tensor(used)[:, None], factors, 1.0)
    return GroupedBinarization(
        pattern=None,
        signs=signs * kept,
        residual_signs=residual * twice,
        groups=(groups * kept).to(torch.uint8),
        salient=salient,
        scalars=torch.randn(rows, blocks, scheme.scalars, generator=generator).half().float(),
        block=block,
        scheme=scheme,
        column_scales=None if scheme.means else factors,
    )


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize(("columns", "block"), [(48, 32), (16, 16)])
def test_every_methods_result_is_rebuilt_from_its_streams_or_packed(name, options, columns, block):
    result = build_variant(name, options, block).compress(*layer_problem(6, columns))
    if is_packable(result):
        assert count_bits(result) == sum(8 * t.nbytes for t in pack(result).tensors().values())
    else:
        assert_rebuilt(result)
        assert count_bits(result) == sum(s.numbers.numel() * s.width for s in streams(result))


@pytest.mark.parametrize(
    ("name", "text"), [("billm", "4:8"), ("billm", "8:8"), ("prune-then-binarize", "1:4")]
)
def test_methods_with_a_pattern_are_rebuilt(name, text):
    method = build_method(name, (Pattern.parse(text),), {"block": 16})
    result = method.compress(*layer_problem(5, 40))
    assert_rebuilt(result)
    kinds = [stream.kind for stream in streams(result)]
    assert ("supports" in kinds) == (text != "8:8")  # of which there is only one


@pytest.mark.parametrize(
    "scheme", [PAPER, Scheme(1, 0), Scheme(2, 1), Scheme(2, 2), Scheme(3, 4), Scheme(2, 2, means=False)]
)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("block", [1, 16, 40, 41])
def test_any_scheme_is_rebuilt(scheme, parts, block):
    assert_rebuilt(random_matrix(scheme, parts=parts, block=block))


@pytest.mark.parametrize("name", ["billm", "arb"])
def test_joined_parts_are_rebuilt(name):
    method = build_method(name, None, {"block": 16})
    joined = GroupedBinarization.join([method.compress(*layer_problem(rows, 40)) for rows in (4, 2, 2)])
    assert len(joined.salient) == 4
    assert_rebuilt(joined)


def mask_stream(matrix):
    named = {stream.kind: stream for stream in streams(matrix)}
    return {kind: named[kind] for kind in ("supports", "kept columns", "kept weights") if kind in named}


def test_masks_take_what_they_need():
    generator = torch.Generator().manual_seed(0)
    scheme = Scheme(2, 1)
    assert mask_stream(random_matrix(scheme)) == {}
    columns = (torch.rand(1, 40, generator=generator) < 0.5).expand(6, 40)
    weights = torch.rand(6, 40, generator=generator) < 0.5
    for keep, kind, count in ((columns, "kept columns", 40), (weights, "kept weights", 240)):
        matrix = random_matrix(scheme, keep=keep)
        (stream,) = mask_stream(matrix).values()
        assert stream.kind == kind
        assert (stream.numbers.numel(), stream.width) == (count, 1)
        assert_rebuilt(matrix)


@pytest.mark.parametrize(("text", "width"), [("4:8", 7), ("6:8", 5), ("2:4", 3), ("4:16", 11), ("8:8", 0)])
def test_supports_are_ranked_in_as_few_bits_as_there_are_supports(text, width):
    pattern = Pattern.parse(text)
    matrix = replace(random_grouped(text, 3, 48), scheme=Scheme(3, 2), scalars=torch.zeros(3, 1, 12))
    assert not is_packable(matrix)
    found = mask_stream(matrix)
    if not width:
        assert found == {}
        return
    assert (found["supports"].numbers.numel(), found["supports"].width) == (3 * 48 // pattern.group, width)
    assert_rebuilt(matrix)


def test_column_scales_count_where_their_kind_of_column_is():
    matrix = random_matrix(Scheme(2, 2, means=False), parts=2)
    salient = int(matrix.salient.sum())
    sizes = {stream.kind: stream.numbers.numel() * stream.width for stream in streams(matrix)}
    assert sizes["column scales"] == 16 * (4 * salient + 2 * (80 - salient))
    assert sizes["scalars"] == 16 * 6 * 3 * 6


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("block", [1, 47, 48, 49, 20])
def test_integers_are_rebuilt_exactly(width, block):
    generator = torch.Generator().manual_seed(width)
    groups = block_count(48, block)
    matrix = IntegerGroups(
        codes=torch.randint(0, 2**width, (3, 48), generator=generator).to(torch.uint8),
        scales=torch.rand(3, groups, generator=generator).half().float(),
        zeros=torch.randint(0, 2**width, (3, groups), generator=generator).to(torch.uint8),
        width=width,
        block=block,
    )
    rebuilt = integers_from_streams(streams(matrix), (3, 48), width, block)
    assert torch.equal(torch.tensor(rebuilt), matrix.dense())
    assert count_bits(matrix) == 3 * (48 * width + groups * (16 + width))


def test_packed_layouts_count_the_bytes_of_their_file():
    for matrix in (
        random_grouped("4:8", 6, 48, parts=2),
        random_planes("4:8+2:8", 6, 48),
        random_low_rank(6, 48, 11),
    ):
        assert count_bits(matrix) == sum(8 * tensor.nbytes for tensor in pack(matrix).tensors().values())


def test_streams_are_never_larger_than_the_packed_layout():
    """The paper's layout spends two bits on every kept weight's group or residual sign, and on padding."""
    matrix = random_grouped("4:8", 6, 48, parts=2)
    assert streams_bits(streams(matrix)) <= count_bits(matrix)
    assert_rebuilt(matrix)
