import pytest
import torch

from pbsp.errors import ConfigError, CorpusError, ModelError
from pbsp.generation import Answer, generate
from tiny import tiny_model, tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


class Recorder:
    """Stands before a model's generate and keeps the prompt that it was given."""

    def __init__(self, model, monkeypatch):
        def record(ids, **settings):
            self.tokens, self.settings = ids[0].tolist(), settings
            return self.generate(ids, **settings)

        self.generate = model.generate
        monkeypatch.setattr(model, "generate", record)


def test_chat_template_is_used_where_there_is_one_and_raw_goes_without(model, tokenizer, monkeypatch):
    recorder = Recorder(model, monkeypatch)
    generate(model, tokenizer, "Hello", max_tokens=1)
    assert tokenizer.decode(recorder.tokens) == "Hello"
    tokenizer.chat_template = TEMPLATE
    generate(model, tokenizer, "Hello", max_tokens=1)
    assert tokenizer.decode(recorder.tokens) == "<user>Hello<assistant>"
    generate(model, tokenizer, "Hello", max_tokens=1, raw=True)
    assert tokenizer.decode(recorder.tokens) == "Hello"


def test_template_gives_no_second_bos(model, monkeypatch):
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    recorder = Recorder(model, monkeypatch)
    generate(model, tokenizer, "Hello", max_tokens=1)
    assert recorder.tokens.count(tokenizer.bos_token_id) == 1


def test_a_template_that_fails_is_named(model, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(ModelError, match="no users here; --raw"):
        generate(model, tokenizer, "Hello")
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(ModelError, match="chat template fails"):
        generate(model, tokenizer, "Hello")


def test_answer_is_the_new_text_alone_and_its_length(model, tokenizer):
    answer = generate(model, tokenizer, "Hello", max_tokens=7)
    assert isinstance(answer, Answer)
    assert 1 <= answer.tokens <= 7
    assert not answer.text.startswith("Hello")
    assert generate(model, tokenizer, "Hello", max_tokens=7) == answer


def test_greedy_takes_the_likeliest_token(model, tokenizer, monkeypatch):
    recorder = Recorder(model, monkeypatch)
    answer = generate(model, tokenizer, "Hello", max_tokens=1)
    likeliest = model(torch.tensor([recorder.tokens])).logits[0, -1].argmax()
    assert answer.text == tokenizer.decode([int(likeliest)], skip_special_tokens=True)


def test_sampling_follows_the_seed_and_leaves_the_callers_random_state(model, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    answers = [
        generate(model, tokenizer, "Hello", temperature=2.0, max_tokens=20, seed=seed) for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(1), expected)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_an_answer_ends_at_the_models_last_position(name, tokenizer, capsys):
    model = tiny_model(name)
    model.generation_config.eos_token_id = None
    assert generate(model, tokenizer, "x" * 120, max_tokens=500).tokens == 8
    assert generate(model, tokenizer, "x" * 127, max_tokens=500).tokens == 1
    with pytest.raises(ConfigError, match="128 tokens and the model 128 positions"):
        generate(model, tokenizer, "x" * 128)
    assert capsys.readouterr().err == ""


def test_requests_without_sense_are_refused(model, tokenizer):
    with pytest.raises(ModelError, match="no tokenizer"):
        generate(model, None, "Hello")
    with pytest.raises(ConfigError, match="prompt is empty"):
        generate(model, tokenizer, "")
    for settings in ({"max_tokens": 0}, {"temperature": -0.1}, {"temperature": float("inf")}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            generate(model, tokenizer, "Hello", **settings)


def test_a_tokenizer_of_another_model_is_refused(model, tokenizer):
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(CorpusError, match="another model's"):
        generate(model, tokenizer, "Hello <extra>")
