"""The runtime layout: sizes, the way back to the codes, and a packed linear that holds one of the two."""

import copy
import io
import pickle

import pytest
import torch

from pbsp import compiled
from pbsp.kernels.runtime import RuntimePlanes
from pbsp.packed_linear import PackedLinear
from pbsp.storage.planes import pack_planes
from random_grouped import random_grouped
from random_planes import packed_model, random_planes
from saved import load, logits, packed_linears

pytestmark = pytest.mark.skipif(not compiled.loaded(), reason="pbsp was installed without a compiler")
RUNNABLE = [
    name for name in compiled.KERNELS if compiled.loaded() and compiled.library().pbsp_supports(name.encode())
]
CASES = [
    ("4:8", 8), ("4:8", 64), ("4:8", 576), ("2:16", 80), ("1:4", 68), ("8:8", 136), ("3:8", 72), ("5:8", 200),
    ("3:6", 66), ("11:12", 132), ("8:16", 80), ("2:9", 90), ("1:200", 400), ("2:300", 600), ("12:16", 1024),
    ("4:8+2:8", 120), ("2:16+8:8+1:4+4:8", 112), ("2 bit", 5), ("3 bit", 100), ("4 bit", 192),
    ("e8-8", 64), ("e8-9", 72), ("e8-10", 576), ("e8-12", 200), ("e8-12+e8-8", 8), ("2:8+e8-9", 136),
]  # fmt: skip


@pytest.mark.parametrize(("text", "columns"), CASES)
@pytest.mark.parametrize("rows", [1, 3, 130])
def test_codes_come_back_byte_for_byte(text, columns, rows):
    packed = pack_planes(random_planes(text, rows, columns))
    planes = RuntimePlanes.of(packed)
    assert torch.equal(planes.packed().codes, packed.codes)
    assert planes.packed().form == packed.form


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize(("text", "columns"), CASES)
@pytest.mark.parametrize("scale_block", [16, 20, 48, 128])
def test_decoded_rows_equal_the_planes_bit_for_bit(kernel, name, text, columns, scale_block):
    kernel(name)
    packed = pack_planes(random_planes(text, 7, columns, scale_block=scale_block))
    planes = RuntimePlanes.of(packed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(planes.decode(dtype), packed.decode().to(dtype))
    assert torch.equal(planes.rows(2, 5).decode(), packed.rows(2, 5).decode())


@pytest.mark.parametrize(("text", "bits"), [("4:8", 1.5), ("2:8", 1.25), ("8:8", 1.0), ("4:8+2:16", 2.625)])
def test_the_layout_takes_one_bit_for_each_weight_and_one_for_each_kept(text, bits):
    planes = RuntimePlanes.of(pack_planes(random_planes(text, 16, 1024, scale_block=128)))
    assert planes.layout.nbytes * 8 == bits * 16 * 1024


def test_a_packed_linear_holds_the_layout_instead_of_the_codes():
    planes = random_planes("4:8", 64, 128, scale_block=128)
    linear = PackedLinear.of(planes)
    layout = RuntimePlanes.of(pack_planes(planes)).layout
    assert linear.prepared
    assert torch.equal(linear.weight, layout)
    tensors = (*linear.parameters(), *linear.buffers())
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    linear(torch.randn(40, 128))
    assert held <= 1.1 * (layout.nbytes + 64)  # a byte of scale for each row
    assert sum(t.untyped_storage().nbytes() for t in (*linear.parameters(), *linear.buffers())) == held


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_loaded_model_is_prepared_and_saves_the_same_bytes_again(tmp_path, model):
    packed_model(model).save_pretrained(tmp_path / "first")
    loaded = load(tmp_path / "first")
    assert packed_linears(loaded)
    assert all(module.prepared for module in packed_linears(loaded).values())
    logits(loaded)
    loaded.save_pretrained(tmp_path / "second")
    first, second = (tmp_path / folder / "model.safetensors" for folder in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def copies(linear):
    yield copy.deepcopy(linear)
    yield pickle.loads(pickle.dumps(linear))
    memory = io.BytesIO()
    torch.save(linear.state_dict(), memory)
    fresh = PackedLinear.of(random_planes("4:8", 7, 96, seed=1), torch.zeros(7))
    fresh.load_state_dict(torch.load(io.BytesIO(memory.getvalue())))
    yield fresh
    empty = PackedLinear(linear.form, bias_dtype=torch.float32, device="meta")
    empty.load_state_dict(linear.state_dict(), assign=True)
    yield empty


def test_copies_and_state_dicts_carry_the_codes():
    planes = random_planes("4:8", 7, 96)
    linear = PackedLinear.of(planes, torch.randn(7))
    x = torch.randn(2, 96)
    expected = linear(x)
    assert torch.equal(linear.state_dict()["weight"], pack_planes(planes).codes)
    for other in copies(linear):
        assert torch.equal(other.packed.codes, pack_planes(planes).codes)
        assert torch.equal(other(x), expected)
        assert other.prepared
    assert linear.prepared


def test_a_linear_that_leaves_the_cpu_takes_its_codes_along():
    linear = PackedLinear.of(random_planes("4:8", 7, 96))
    shape = pack_planes(random_planes("4:8", 7, 96)).codes.shape
    assert linear.bfloat16().prepared
    assert linear.to("meta").weight.shape == shape
    assert not linear.prepared


def test_doubles_and_the_reference_kernel_still_work_on_a_prepared_linear():
    planes = random_planes("4:8+2:8", 7, 96)
    linear = PackedLinear.of(planes)
    x = torch.randn(2, 96, dtype=torch.float64)
    torch.testing.assert_close(linear(x), x @ planes.dense().double().T)


def test_layout_paper_stays_as_it_is_stored():
    linear = PackedLinear.of(random_grouped("4:8", 6, 48))
    linear(torch.randn(1, 48))
    assert not linear.prepare()
