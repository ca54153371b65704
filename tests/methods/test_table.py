import pytest
import torch

from pbsp.errors import ConfigError
from pbsp.methods.arb import Arb
from pbsp.methods.billm import Billm
from pbsp.methods.prune_then_binarize import PruneThenBinarize
from pbsp.methods.stbllm import Stbllm
from pbsp.methods.table import METHODS, build_method, packs, patterns_of
from pbsp.pruning.pattern import Pattern
from pbsp.storage.layouts import is_packable

VARIANTS = [
    *((name, {}) for name in METHODS),
    *(("arb", {"variant": name, "bitmap": split}) for name in ("arb", "x", "rc") for split in (True, False)),
    ("stbllm", {"zeros": "released"}),
    ("prune-then-binarize", {"pruner": "wanda"}),
    ("prune-then-binarize", {"pruner": "magnitude"}),
]  # fmt: skip


def problem(rows=12, columns=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    inputs = torch.randn(300, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / 300


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_every_method_says_truly_whether_it_packs_and_splits_into_its_rows(name, options):
    weight, moment = problem()
    method = build_method(name, None, {"block": 32, **options})
    result = method.compress(weight, moment)
    assert is_packable(result) == packs(method)
    dense = result.dense()
    assert dense.isfinite().all()
    assert torch.equal(dense, method.compress(weight, moment).dense())
    assert torch.equal(type(result).join(result.split([4, 8])).dense(), dense)
    for pattern in patterns_of(method)[:1]:
        if name != "planes" and options.get("zeros") != "released":
            kept = (dense.reshape(len(dense), -1, pattern.group) != 0).sum(2)
            assert (kept <= pattern.kept).all()


def test_patterns_go_where_the_method_takes_them():
    two = (Pattern(4, 8), Pattern(2, 8))
    assert build_method("planes", two).patterns == two
    assert build_method("billm", two[:1]) == Billm(Pattern(4, 8))
    assert patterns_of(build_method("billm")) == ()
    with pytest.raises(ConfigError, match="takes one N:M, not 2 planes"):
        build_method("stbllm", two)
    with pytest.raises(ConfigError, match="takes no N:M"):
        build_method("rtn", two[:1])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Arb, {"variant": "cx"}, "variant is 'cx'; choose one of arb, x, rc"),
        (Arb, {"rounds": 0}, "rounds is 0"),
        (Stbllm, {"zeros": "lost"}, "zeros is 'lost'"),
        (Billm, {"compensation": "some"}, "compensation is 'some'"),
        (PruneThenBinarize, {"pruner": "obs"}, "pruner is 'obs'"),
        (Billm, {"pattern": Pattern(4, 8), "block": 12}, "multiple of 8"),
    ],
)
def test_values_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(**options)
