"""Check every jaxtyping annotation of the package while it is tested."""

import importlib

import pytest

import annotations
from fresh import LIBRARIES, Forks

for library in (*LIBRARIES, "lm_eval.evaluator", "lm_eval.models.huggingface"):
    importlib.import_module(library)  # within a module that is checked it would be compiled anew, for 20 s
annotations.install("pbsp")


def pytest_collection_modifyitems(items):
    """Put the longest file first, so that no two workers share it and each make what its tests share."""
    items.sort(key=lambda item: item.path.name != "test_ranks.py")


@pytest.fixture(scope="session")
def fresh():
    """Runs Python code in a process of its own, in which annotations are not checked; see fresh.py."""
    forks = Forks()
    yield forks.run
    forks.close()


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


@pytest.fixture(autouse=True)
def matrix_instructions(monkeypatch):
    """Chooses whether float32 models are tuned with products in bfloat16: no, whatever this machine has."""

    def choose(have):
        monkeypatch.setattr("pbsp.models.products._has_matrix_instructions", lambda: have)

    choose(False)
    return choose
