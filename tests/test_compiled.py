"""Which kernel runs, and what is said when the one that was asked for cannot."""

import warnings

import pytest
import torch

from pbsp import compiled
from pbsp.errors import ConfigError
from pbsp.packed_linear import PackedLinear
from random_planes import random_planes


@pytest.fixture
def no_library(monkeypatch, kernel):
    compiled._load.cache_clear()
    monkeypatch.setattr(compiled, "_PLACES", ())
    kernel()
    yield
    compiled._load.cache_clear()


def test_an_unknown_kernel_is_named(kernel):
    kernel("sse9")
    with pytest.raises(ConfigError, match=r"PBSP_KERNEL is 'sse9'; choose one of avx512, .*, reference"):
        compiled.kernel_name()


def test_unknown_activations_are_named(kernel):
    kernel(None, "int4")
    with pytest.raises(ConfigError, match="PBSP_ACTIVATIONS is 'int4'; choose one of int16, float, int8"):
        compiled.activations()


@pytest.mark.skipif(not compiled.loaded(), reason="pbsp was installed without a compiler")
def test_a_kernel_of_another_machine_is_refused(kernel):
    other = next(name for name in compiled.KERNELS if not compiled.library().pbsp_supports(name.encode()))
    kernel(other)
    with pytest.raises(
        ConfigError, match=f"PBSP_KERNEL is {other}, which this machine cannot run; it runs .*"
    ):
        compiled.kernel_name()


@pytest.mark.skipif(not compiled.loaded(), reason="pbsp was installed without a compiler")
def test_the_kernel_is_the_one_that_was_asked_for(kernel):
    kernel("portable")
    assert compiled.kernel_name() == "portable"
    kernel("reference")
    assert compiled.kernel_name() == "reference"
    assert not PackedLinear.of(random_planes("4:8", 7, 96)).prepared
    kernel()
    assert compiled.kernel_name() in compiled.KERNELS


def test_without_a_library_torch_computes_after_one_warning(no_library):
    planes = random_planes("4:8", 7, 96)
    x = torch.randn(2, 96)
    with pytest.warns(UserWarning, match="installed without its compiled kernels"):
        linear = PackedLinear.of(planes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(linear(x), x @ planes.dense().T)
        PackedLinear.of(planes)
    assert not linear.prepared


def test_without_a_library_a_kernel_cannot_be_asked_for(no_library, kernel):
    kernel("portable")
    with pytest.raises(ConfigError, match="without its compiled kernels; install it again"):
        compiled.kernel_name()
