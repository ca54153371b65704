"""What fuzzing feeds the reader of compressed models, and how an attack is run; see fuzz/test_reader.py."""

import copy
import json
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as set_seed
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from pbsp.binarization.rotation import unrotate
from pbsp.config import Config, read_config_file
from pbsp.errors import PbspError
from pbsp.inspection import inspect_folder
from pbsp.integrations.transformers import PbspHfQuantizer, PbspQuantizationConfig
from pbsp.resources import peak_rss_bytes
from pbsp.storage.checkpoint import LayerEntry, check_layer, read_headers, read_nominal_bits
from pbsp.storage.layouts import FORMS
from random_grouped import alternating
from random_planes import packed_model

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, -(2**63), 10**18, 10**400, 1e308, float("inf"), float("nan"), -0.0, 64.0]),
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["4:8", "8:8", "1:1", "31:31", "9999:9999", "4:8+4:8", "e8-12+4:8", "e8-11",
         "planes", "paper", "lm_head", "weight", "model",
         "model.embed_tokens", "model.layers.0.mlp.up_proj", "F16", "U8", "I16", "BOOL",
         "pbsp", "é" * 40, "\0"]
    ),
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@dataclass
class Attack:
    """How many inputs were tried, how many were refused with a PbspError, and what they cost at most."""

    inputs: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    grown_bytes: int = 0


@dataclass(frozen=True)
class Target:
    """Inputs, and what reads one."""

    inputs: st.SearchStrategy
    read: Callable


def attack(target: Target, *, examples: int, seed: int) -> Attack:
    """Give the target so many inputs; whatever it raises but a PbspError is raised here, with the input."""
    found, before = Attack(), peak_rss_bytes()

    @set_seed(seed)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def one(value):
        start = time.perf_counter()
        found.inputs += 1
        try:
            target.read(value)
        except PbspError as error:
            found.refused += 1
            message = str(error)
            assert 0 < len(message) < 5000, message
        found.slowest_seconds = max(found.slowest_seconds, time.perf_counter() - start)

    one()
    found.grown_bytes = peak_rss_bytes() - before
    return found


@st.composite
def mutated(draw, valid):
    """A JSON document with some values replaced, removed or added, anywhere in it."""
    holder = {"document": copy.deepcopy(valid)}
    for _ in range(draw(st.integers(0, 3))):
        place, key = holder, "document"
        while key in place and isinstance(place[key], dict) and place[key] and draw(st.integers(0, 5)):
            place = place[key]
            key = draw(st.sampled_from(list(place)))
        action = draw(st.sampled_from(["replace", "tweak", "remove", "add"]))
        if action == "replace":
            place[key] = draw(JSON)
        elif action == "tweak":
            kinds = {int: NUMBERS, float: NUMBERS, list: st.lists(NUMBERS, max_size=3)}
            place[key] = draw(kinds.get(type(place[key]), TEXTS))
        elif action == "add" or place is holder:
            place[draw(TEXTS)] = draw(JSON)
        else:
            del place[key]
    return holder["document"]


@st.composite
def damaged(draw, valid):
    """Bytes with some flipped, cut out, put in or cut off."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.one_of(st.integers(0, min(len(data), 600)), st.integers(0, len(data))))
        action = draw(st.sampled_from(["flip", "cut", "insert", "truncate"]))
        if action == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif action == "cut":
            del data[at : at + draw(st.integers(1, 16))]
        elif action == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif action == "truncate" and not draw(st.integers(0, 3)):
            del data[at:]
    return bytes(data)


def _saved_model(folder: Path) -> tuple[dict, bytes]:
    """A very small packed model's folder, layers of both layouts: its config, the bytes of its weights."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    packed_model("", "4:8", make=alternating, model=model).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["left_uncompressed"] = {}
    return config, (folder / "model.safetensors").read_bytes()


def _headers(data: bytes) -> tuple[dict, bytes]:
    """A safetensors file's header, and what follows it."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _encoded(document: object) -> bytes:
    return json.dumps(document).encode()


def _with_header(header: object, body: bytes) -> bytes:
    text = _encoded(header)
    return len(text).to_bytes(8, "little") + text + body


def _weight_files(data: bytes) -> st.SearchStrategy:
    """Files damaged anywhere, or with another header of well-formed JSON."""
    header, body = _headers(data)
    return st.one_of(damaged(data), mutated(header).map(lambda changed: _with_header(changed, body)))


def quantization_config(folder: Path) -> Target:
    """`quantization_config` of a config.json."""
    valid = _saved_model(folder)[0]["quantization_config"]

    def read(document):
        config = PbspQuantizationConfig.from_dict(document)
        assert PbspQuantizationConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()

    dicts = mutated(valid).filter(lambda document: isinstance(document, dict))  # else it is not one of ours
    return Target(dicts, read)


def safetensors(folder: Path) -> Target:
    """A weights file: its headers, then every layer that the config lists."""
    config, data = _saved_model(folder)
    layers = PbspQuantizationConfig.from_dict(config["quantization_config"]).layers
    file = folder / "model.safetensors"

    def read(content):
        file.write_bytes(content)
        stored = {tensor.key: tensor for tensor in read_headers([str(file)])}
        for name, entry in layers.items():
            check_layer(name, entry, stored)
            read_nominal_bits(name, entry, stored)

    return Target(_weight_files(data), read)


@st.composite
def _packed_tensors(draw):
    """A form, and tensors of its shapes with any bits in them."""
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    group = draw(st.sampled_from([1, 2, 4, 8, 16]))
    kept = [f"{n}:{group}" for n in range(1, group + 1)] + ["e8-8", "e8-9", "e8-10", "e8-12"] * (group == 8)
    patterns = draw(st.lists(st.sampled_from(kept), min_size=1, max_size=4))
    sizes = {"in_features": groups * group, "out_features": rows, "scale_block": draw(st.integers(1, 100))}
    layout = draw(st.sampled_from(list(FORMS)))
    if layout in ("planes", "rows"):
        sizes["rotation"] = draw(st.sampled_from([1, 1, 16]))
    if layout == "paper":
        sizes["salient_parts"] = draw(st.integers(1, 3))
        patterns = patterns[:1]
    elif layout == "rows":
        sizes["bits"] = draw(st.sampled_from([4, 8]))
        sizes["in_features"] *= draw(st.sampled_from([1, 32]))
        del sizes["scale_block"]
    elif layout == "low-rank":
        sizes["rank"] = draw(st.integers(1, 20))
        del sizes["scale_block"]
    noise = draw(st.integers(0, 2**32 - 1))
    return layout, "+".join(patterns), sizes, noise, draw(st.booleans())


def packed(folder: Path) -> Target:
    """The tensors of one layer, with any values: what passes the check can be decoded."""

    def read(value):
        layout, patterns, sizes, noise, mostly_zero = value
        entry = {"layout": layout, **sizes, "bias": False, "sha256": "0" * 64}
        if layout in ("planes", "paper"):
            entry["patterns"] = patterns
        form = LayerEntry.from_dict("a", entry).form
        generator = torch.Generator().manual_seed(noise)
        tensors = {}
        for name, spec in form.specs().items():
            size = torch.Size(spec.shape).numel() * spec.dtype.itemsize
            data = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
            if mostly_zero:
                data *= torch.rand(size, generator=generator) < 0.1
            tensors[name] = data.view(spec.dtype).view(spec.shape)
        tensors = form.packed(tensors)
        tensors.check()
        decoded = tensors.decode()
        assert torch.isfinite(decoded).all()
        assert torch.equal(tensors.unpack().dense(), unrotate(decoded, sizes.get("rotation", 1)))

    return Target(_packed_tensors(), read)


def pbsp_settings(folder: Path) -> Target:
    """The settings of a compression: as a dictionary, in one line and in a TOML file."""
    file = folder / "settings.toml"
    valid = Config(pattern="4:8", options={"sweeps": 1}).to_dict()
    line = st.text(alphabet=string.ascii_lowercase + '0123456789:+= -_."[]', max_size=40)
    toml = b'pattern = "4:8"\nmethod = "planes"\nsamples = 3\n[options]\nsweeps = 2\n'
    word = st.sampled_from(["pbsp", "gptq", "4:8", "bits=2", "block=64", "sweeps=x", "="])

    def read(value):
        if isinstance(value, dict):
            assert Config.from_dict(Config.from_dict(value).to_dict()) == Config.from_dict(value)
        elif isinstance(value, str):
            Config.parse(value)
        else:
            file.write_bytes(value)
            Config.from_dict(read_config_file(file)[0])

    dicts = mutated(valid).filter(lambda value: isinstance(value, dict))
    return Target(st.one_of(dicts, line, st.lists(word, max_size=3).map(" ".join), damaged(toml)), read)


def load(folder: Path) -> Target:
    """What happens between config.json and the reading of the first weight."""
    config, data = _saved_model(folder)
    file = folder / "model.safetensors"
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}
    model_config = AutoConfig.for_model("llama", **plain)

    def read(value):
        document, content = value
        file.write_bytes(content)
        quantizer = PbspHfQuantizer(PbspQuantizationConfig.from_dict(document), pre_quantized=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
            quantizer.preprocess_model(model, checkpoint_files=[str(file)])

    valid = config["quantization_config"]
    configs = mutated(valid).filter(lambda document: isinstance(document, dict))
    both = st.tuples(configs, st.just(data)) | st.tuples(st.just(valid), _weight_files(data))
    return Target(both, read)


def inspect(folder: Path) -> Target:
    """A whole folder, as `pbsp inspect` reads it."""
    config, data = _saved_model(folder)
    text = json.dumps(config).encode()
    report = json.dumps({"layers": [{"name": "a", "output_error": 0.5}], "source_bytes": 3})

    def read(value):
        documents = dict(zip(("config.json", "model.safetensors", "pbsp_report.json"), value, strict=True))
        for name, content in documents.items():
            (folder / name).write_bytes(content)
        json.dumps(inspect_folder(folder).to_dict())

    configs = st.one_of(damaged(text), mutated(config).map(_encoded))
    reports = st.one_of(damaged(report.encode()), mutated(json.loads(report)).map(_encoded))
    kept = st.just(data), st.just(report.encode())
    choices = st.one_of(
        st.tuples(configs, *kept),
        st.tuples(st.just(text), _weight_files(data), kept[1]),
        st.tuples(st.just(text), kept[0], reports),
    )
    return Target(choices, read)


TARGETS = {
    "quantization_config": quantization_config,
    "safetensors": safetensors,
    "packed": packed,
    "settings": pbsp_settings,
    "load": load,
    "inspect": inspect,
}


def attack_in_turns(name: str, *, examples: int, seed: int) -> Iterator[Attack]:
    """The same by thousands, each with its own seed: hypothesis grows slower the more inputs it remembers."""
    with tempfile.TemporaryDirectory() as temporary:
        target = TARGETS[name](Path(temporary))
        for start in range(0, examples, 1000):
            yield attack(target, examples=min(1000, examples - start), seed=seed + start)


if __name__ == "__main__":  # python fuzzing.py SEED TARGET=EXAMPLES…: faster without the tests' type checks
    for argument in sys.argv[2:]:
        target_name, _, wanted = argument.partition("=")
        for turn in attack_in_turns(target_name, examples=int(wanted), seed=int(sys.argv[1])):
            print(json.dumps({"target": target_name, **asdict(turn)}), flush=True)
