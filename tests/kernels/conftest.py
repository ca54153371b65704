import pytest

from pbsp.kernels import library


@pytest.fixture
def kernel(monkeypatch):
    """Chooses the kernel and the activations of later products, and forgets the choice after the test."""

    def choose(name=None, activations=None):
        for variable, value in (("PBSP_KERNEL", name), ("PBSP_ACTIVATIONS", activations)):
            if value is None:
                monkeypatch.delenv(variable, raising=False)
            else:
                monkeypatch.setenv(variable, value)
        library.kernel_name.cache_clear()
        library.activations.cache_clear()

    yield choose
    library.kernel_name.cache_clear()
    library.activations.cache_clear()
