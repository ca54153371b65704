import pytest

from pbsp.config import Config, read_config_file, with_settings
from pbsp.errors import ConfigError, PatternError
from pbsp.methods.gptq import Gptq
from pbsp.methods.pbsp import Pbsp
from pbsp.methods.planes import PlaneFit
from pbsp.pruning.pattern import Pattern


def test_defaults_are_valid_and_a_config_survives_its_dict():
    config = Config(pattern="4:8+2:8", options={"damping": 1.0}, strict=True)
    assert Config.from_dict(config.to_dict()) == config
    assert config.patterns == (Pattern(4, 8), Pattern(2, 8))
    assert Config.from_dict({}) == Config()
    assert Config().patterns == PlaneFit().patterns
    assert Config(options={"damping": 1}).build().damping == 1.0


def test_one_line_gives_method_pattern_options_and_settings():
    config = Config.parse("pbsp 6:8 updates=10 refresh=false score=wanda weighting=attention spread=0")
    assert config.build() == Pbsp(Pattern(6, 8), updates=10, refresh=False, score="wanda")
    assert (config.weighting, config.spread) == ("attention", 0)
    assert Config.parse("planes 4:8+2:8").patterns == (Pattern(4, 8), Pattern(2, 8))
    assert Config.parse("gptq bits=2").build() == Gptq(bits=2)
    assert Config.parse("billm").patterns == ()


def test_settings_over_a_config_keep_what_they_do_not_name():
    values = with_settings({"pattern": "2:8", "options": {"sweeps": 1}}, ["block=64", "inputs=original"])
    config = Config.from_dict(values)
    assert config.build() == PlaneFit((Pattern(2, 8),), block=64, sweeps=1)
    assert config.inputs == "original"


def test_auto_follows_the_method():
    assert Config().moment_weighting == "attention"
    assert Config("pbsp").moment_weighting == "plain"
    assert Config("pbsp", weighting="attention").moment_weighting == "attention"
    assert Config("nanoquant", weighting="squares").moment_weighting == "squares"  # one moment for all rows
    assert Config("stbllm").coarse == "outliers"
    assert Config("pbsp").coarse is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "method is ''; choose one of planes"),
        ("quant", "method is 'quant'; choose one of planes"),
        ("gptq 4:8", "gptq takes no N:M"),
        ("pbsp 4:8+2:8", "takes one N:M, not 2 planes"),
        ("planes 4:8 sweeps", "'sweeps' is not a setting; write NAME=VALUE"),
        ("planes width=2", "method planes has no option 'width'; it has block"),
        ("nanoquant weighting=attention", "fits all rows of a layer together.*use weighting plain"),
        ("nanoquant weighting=gradient", "weighting gradient gives .* use weighting plain"),
        ("rtn allocation=paper", "allocation paper takes one N:M"),
    ],
)
def test_lines_that_mean_nothing_are_refused(line, message):
    with pytest.raises(ConfigError, match=message):
        Config.parse(line)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patern": "4:8"}, "unknown option 'patern'; did you mean 'pattern'"),
        ({"xyzzy": 1}, "known options: method, pattern, options"),
        ({"pattern": 4}, "pattern must be of type str, not 4"),
        ({"options": "sweeps"}, "options must be of type dict"),
        ({"options": {"sweeps": 2.0}}, "sweeps must be of type int, not 2.0"),
        ({"options": {"sweeps": True}}, "sweeps must be of type int, not True"),
        ({"options": {"damping": True}}, "damping must be of type float, not True"),
        ({"options": {"damping": "0.01"}}, "damping must be of type float"),
        ({"strict": 1}, "strict must be of type bool, not 1"),
        ({"spread": True}, "spread must be of type int, not True"),
        ({"spread": -1}, "spread is -1"),
        ({"options": {"damping": 0.0}}, "above 0"),
        ({"options": {"damping": float("nan")}}, "damping is nan"),
        ({"options": {"damping": float("inf")}}, "damping is inf"),
        ({"options": {"sweeps": 1001}}, "between 0 and 1000"),
        ({"inputs": "none"}, "compressed, original"),
        ({"dtype": "float32"}, "auto, float16, bfloat16"),
        ({"options": {"block": 0}}, "block is 0"),
        ({"options": {"block": 12}}, "positive multiple of 8"),
        ({"pattern": "4:8+4:16", "options": {"block": 8}}, "16 for pattern 4:16"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(values)


@pytest.mark.parametrize("pattern", ["", "4", "4:8+", "9:8", "0:8", "-1:8", "+".join(["1:8"] * 5), "30:60"])
def test_malformed_patterns_are_refused(pattern):
    with pytest.raises(PatternError):
        Config(pattern=pattern)


def test_config_files_give_settings_and_the_choice_of_text(tmp_path):
    path = tmp_path / "config.toml"
    lines = ["# a run", 'pattern = "2:8"', "strict = true", "samples = 4", 'calibration = "c4"']
    path.write_text("\n".join([*lines, "[options]", "sweeps = 1"]))
    assert read_config_file(path) == (
        {"pattern": "2:8", "strict": True, "options": {"sweeps": 1}},
        {"samples": 4, "calibration": "c4"},
    )


def test_config_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_config_file(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_config_file(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"binary\.toml"):
        read_config_file(tmp_path / "binary.toml")
    (tmp_path / "table.toml").write_text("[calibration]\nsamples = 1\n")
    with pytest.raises(ConfigError, match="calibration must be of type str"):
        read_config_file(tmp_path / "table.toml")
