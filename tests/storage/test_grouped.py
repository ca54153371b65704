import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import grouped_bytes_by_integers, grouped_weight
from pbsp.binarization.grouped import GroupedBinarization
from pbsp.errors import FormatError
from pbsp.pruning.pattern import Pattern
from pbsp.storage import grouped
from pbsp.storage.grouped import pack_grouped
from pbsp.storage.layouts import FORMS, MARKERS
from pbsp.storage.streams import join_bits, split_bits
from random_grouped import random_grouped

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"
PATTERNS = [
    "1:1",
    "1:2",
    "2:4",
    "1:4",
    "4:8",
    "5:8",
    "6:8",
    "8:8",
    "1:8",
    "4:16",
    "8:16",
    "3:7",
    "1:64",
    "16:20",
]


def assert_equal(left: GroupedBinarization, right: GroupedBinarization) -> None:
    for field in fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b, field.name


def assert_round_trip(matrix: GroupedBinarization) -> None:
    packed = pack_grouped(matrix)
    packed.check()
    assert_equal(packed.unpack(), matrix)
    assert torch.equal(packed.decode(), matrix.dense())


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("salient_share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("rows", "parts", "groups"), [(1, 1, 1), (3, 1, 7), (3, 3, 8), (6, 2, 9)])
def test_every_pattern_comes_back_field_for_field(text, salient_share, rows, parts, groups):
    columns = groups * Pattern.parse(text).group
    for block in (1, 5, columns, columns + 1):
        assert_round_trip(
            random_grouped(text, rows, columns, block=block, parts=parts, salient_share=salient_share)
        )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes_and_parts_come_back(data):
    kept, group = data.draw(
        st.sampled_from([(1, 1), (1, 2), (2, 4), (3, 8), (4, 8), (5, 8), (6, 8), (8, 8), (4, 16), (7, 16)])
    )
    columns = 16 * data.draw(st.integers(1, 5))
    parts = data.draw(st.integers(1, 4))
    matrix = random_grouped(
        f"{kept}:{group}",
        parts * data.draw(st.integers(1, 5)),
        columns,
        block=data.draw(st.integers(1, columns + 1)),
        parts=parts,
        salient_share=data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        seed=data.draw(st.integers(0, 1000)),
    )
    assert_round_trip(matrix)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 31), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40))
def test_streams_of_any_width_are_those_of_big_integers(width, numbers):
    numbers = [number % 2**width for number in numbers]
    stream = join_bits(torch.tensor([numbers]), width)
    integer = sum(number << width * place for place, number in enumerate(numbers))
    assert bytes(stream[0].tolist()) == integer.to_bytes((width * len(numbers) + 7) // 8, "little")
    assert split_bits(stream, width, len(numbers)).tolist() == [numbers]


@pytest.mark.parametrize("text", ["1:1", "4:8", "6:8", "4:16", "3:7"])
@pytest.mark.parametrize("parts", [1, 2])
def test_bytes_and_weights_are_those_of_plain_python(text, parts):
    matrix = random_grouped(text, 4, 3 * Pattern.parse(text).group, block=5, parts=parts, salient_share=0.4)
    tensors = pack_grouped(matrix).tensors().values()
    stored = [[bytes(row.flatten().view(torch.uint8).tolist()) for row in tensor] for tensor in tensors]
    assert stored == list(grouped_bytes_by_integers(matrix))
    rows, columns = matrix.signs.shape
    weights = [[grouped_weight(matrix, row, column) for column in range(columns)] for row in range(rows)]
    torch.testing.assert_close(pack_grouped(matrix).decode(), torch.tensor(weights), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("parts", [1, 3])
def test_any_range_of_rows_decodes_on_its_own(parts):
    matrix = random_grouped("4:8", 9, 48, block=20, parts=parts)
    part = pack_grouped(matrix).rows(2, 7)
    part.check()
    assert torch.equal(part.decode(), matrix.dense()[2:7])
    assert torch.equal(part.rows(1, 3).decode(), matrix.dense()[3:5])


def test_signs_that_are_not_contiguous_are_packed():
    matrix = random_grouped("4:8", 8, 48, parts=2)
    turned = {name: getattr(matrix, name).T.contiguous().T for name in ("signs", "residual_signs", "groups")}
    for left, right in zip(
        pack_grouped(matrix).tensors().values(), pack_grouped(replace(matrix, **turned)).tensors().values(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(left, right)
        assert right.is_contiguous()


def damaged(matrix, name, change):
    packed = pack_grouped(matrix)
    change(packed.tensors()[name])
    return packed


FOUR, ONE = ("4:8", 40), ("1:4", 12)  # 55 of 56 code bits; 6 of 8 bits a row and 12 of 16 columns


@pytest.mark.parametrize(
    ("shape", "name", "change", "message"),
    [
        (FOUR, "weight", lambda codes: codes[2].fill_(255), "weight holds code 2047; pattern 4:8 has only"),
        (FOUR, "weight", lambda codes: codes[1, -1].bitwise_or_(128), "weight has set bits in the padding"),
        (FOUR, "weight_group", lambda stream: stream[5, 0].bitwise_or_(3), "weight_group holds group 3"),
        (ONE, "weight_group", lambda stream: stream[1, -1].bitwise_or_(64), "weight_group has set bits"),
        (
            ONE,
            "weight_salient",
            lambda columns: columns[1, -1].bitwise_or_(16),
            "weight_salient has set bits",
        ),
        (FOUR, "weight_scalar", lambda scalars: scalars[3, 0, 8].fill_(0x7C00), "weight_scalar holds a NaN"),
        (FOUR, "weight_scalar", lambda scalars: scalars[3, 0, 0].fill_(0x7C01), "weight_scalar holds a NaN"),
        (FOUR, "weight_scalar", lambda scalars: scalars[3, 0, 0].fill_(-1), "weight_scalar holds a NaN"),
    ],
)
def test_what_has_no_meaning_is_refused(monkeypatch, shape, name, change, message):
    monkeypatch.setattr(grouped, "_TILE_WEIGHTS", 60)
    text, columns = shape
    matrix = random_grouped(text, 6, columns, parts=2, salient_share=0.0)
    with pytest.raises(FormatError, match=message):
        damaged(matrix, name, change).check()


@pytest.mark.parametrize("value", [2, 3])
def test_a_residual_sign_beyond_one_is_refused(value):
    matrix = random_grouped("4:8", 6, 48, parts=2, salient_share=1.0)
    packed = damaged(matrix, "weight_group", lambda stream: stream[4, 2].bitwise_or_(3))
    if value == 2:
        packed.members[4, 2] &= 0b11111110
    with pytest.raises(FormatError, match="weight_group holds 2 or 3 in a salient column"):
        packed.check()


@pytest.mark.parametrize(
    "change",
    [
        lambda matrix: {"scalars": matrix.scalars * 1.0001},
        lambda matrix: {"scalars": matrix.scalars * float("nan")},
        lambda matrix: {"scalars": torch.full_like(matrix.scalars, float("inf"))},
        lambda matrix: {"groups": matrix.groups + 1},
        lambda matrix: {"groups": 2 * matrix.groups},
        lambda matrix: {"residual_signs": -2 * matrix.residual_signs},
        lambda matrix: {"salient": ~matrix.salient},
        lambda matrix: {"salient": matrix.salient[:1].repeat(4, 1)},
        lambda matrix: {"signs": matrix.signs.abs().fill_(1)},
    ],
)
def test_a_representation_that_breaks_its_word_is_our_own_bug(change):
    matrix = random_grouped("4:8", 6, 48, parts=2)
    with pytest.raises(AssertionError):
        pack_grouped(replace(matrix, **change(matrix)))


def test_the_worked_matrix_of_the_documentation_has_the_bytes_printed_there():
    text = FORMAT.read_text(encoding="utf-8").partition("### A worked matrix of layout")[2]
    written = [row.split() for row in re.findall(r"^row \d: (.*)$", text, re.M)]
    sign = {"+": 1, "-": -1, ".": 0}
    signs = torch.tensor([[sign[weight[0]] for weight in row] for row in written], dtype=torch.int8)
    second = [[weight[-1] if len(weight) == 2 else "." for weight in row] for row in written]
    residual_signs = torch.tensor([[sign.get(mark, 0) for mark in row] for row in second], dtype=torch.int8)
    groups = torch.tensor([[int(mark) if mark.isdigit() else 0 for mark in row] for row in second])
    numbers = re.findall(r"^scalars \d: (.*)$", text, re.M)
    scalars = torch.tensor([[float(number) for number in row.split()] for row in numbers])
    salient = (residual_signs != 0).any(0, keepdim=True)
    matrix = GroupedBinarization(
        Pattern(4, 8), signs, residual_signs, groups.to(torch.uint8), salient, scalars[:, None], 16
    )
    assert_round_trip(matrix)
    printed = dict(re.findall(r"^(weight\w*)  +(.*)$", text, re.M))
    for name, tensor in pack_grouped(matrix).tensors().items():
        rows = [bytes(row.flatten().view(torch.uint8).tolist()).hex(" ") for row in tensor]
        assert printed[name] == " | ".join(rows), name


def test_layouts_have_names_and_markers_of_their_own():
    assert list(FORMS) == ["planes", "paper", "rows", "low-rank"]
    assert len(MARKERS) == len(FORMS) - 1  # rows have no tensor but the weight
