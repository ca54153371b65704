"""Check every jaxtyping annotation of the package while it is tested."""

import importlib

import pytest

import annotations

for library in (
    "torch",
    "transformers.modeling_utils",
    "transformers.integrations.finegrained_fp8",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
):
    importlib.import_module(library)  # within a module that is checked it would be compiled anew, for 20 s
annotations.install("pbsp")


@pytest.fixture
def kernel(monkeypatch):
    """Chooses the kernel and the activations of later products, and forgets the choice after the test."""

    from pbsp import compiled  # not before the hook is there

    def choose(name=None, activations=None):
        for variable, value in (("PBSP_KERNEL", name), ("PBSP_ACTIVATIONS", activations)):
            if value is None:
                monkeypatch.delenv(variable, raising=False)
            else:
                monkeypatch.setenv(variable, value)
        compiled.kernel_name.cache_clear()
        compiled.activations.cache_clear()

    yield choose
    compiled.kernel_name.cache_clear()
    compiled.activations.cache_clear()
