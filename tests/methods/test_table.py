import pytest
import torch

from pbsp.errors import ConfigError
from pbsp.methods.arb import Arb
from pbsp.methods.billm import Billm
from pbsp.methods.gptq import Gptq
from pbsp.methods.prune_then_binarize import PruneThenBinarize
from pbsp.methods.stbllm import Stbllm
from pbsp.methods.table import METHODS, build_method, option_types, packs, patterns_of
from pbsp.pruning.pattern import Pattern
from pbsp.storage.layouts import is_packable
from variants import VARIANTS, build_variant, layer_problem


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_every_method_says_truly_whether_it_packs_and_splits_into_its_rows(name, options):
    weight, moment = layer_problem()
    method = build_variant(name, options, 32)
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


def test_unknown_names_and_options_are_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"method is 'obq'; choose one of planes, pbsp, rtn, .*binarize$"):
        build_method("obq")
    with pytest.raises(ConfigError, match=r"method rtn has no option 'damping'; it has block$"):
        build_method("rtn", None, {"damping": 0.1})
    with pytest.raises(ConfigError, match="has no option 'pattern'"):
        build_method("billm", None, {"pattern": Pattern(4, 8)})


@pytest.mark.parametrize(
    ("name", "option", "value", "kind"),
    [
        ("gptq", "bits", 3.0, "int"),
        ("gptq", "bits", True, "int"),
        ("gptq", "search", 1, "bool"),
        ("gptq", "damping", True, "float"),
        ("gptq", "damping", 10**400, "float"),
        ("arb", "variant", None, "str"),
        ("pbsp", "score", 1, "str"),
    ],
)
def test_values_of_another_type_are_refused_in_one_line(name, option, value, kind):
    with pytest.raises(ConfigError) as error:
        build_method(name, None, {option: value})
    assert str(error.value) == f"{option} must be of type {kind}, not {value!r}"


def test_whole_numbers_are_taken_for_floats():
    method = build_method("gptq", None, {"damping": 1})
    assert method == Gptq(damping=1.0)
    assert type(method.damping) is float


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("damping", [0.0, -1.0, 11.0, float("nan"), float("inf")])
def test_no_method_takes_a_damping_that_is_no_ridge(name, damping):
    if "damping" in option_types(name) and not (name == "gptq" and damping == 0):
        with pytest.raises(ConfigError, match="damping is"):
            build_method(name, None, {"damping": damping})
    if "block" in option_types(name):
        with pytest.raises(ConfigError, match="block is 0"):
            build_method(name, None, {"block": 0})


@pytest.mark.parametrize("name", METHODS)
def test_options_are_the_fields_and_defaults_make_the_method(name):
    method = build_method(name)
    assert type(method) is METHODS[name]
    again = build_method(
        name, patterns_of(method) or None, {o: getattr(method, o) for o in option_types(name)}
    )
    assert again == method


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_rows_are_independent_where_a_method_says_so(name, options):
    weight, moment = layer_problem(dtype=torch.float64)
    method = build_variant(name, options, 32)
    together, alone = method.compress(weight, moment).dense()[:5], method.compress(weight[:5], moment).dense()
    assert method.rows_interact or torch.equal(together, alone)
    if name in ("billm", "arb", "stbllm", "nanoquant", "pbsp") or options.get("pruner") == "si":
        assert not torch.equal(together, alone)
