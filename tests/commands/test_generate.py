from command_line import succeeds


def test_generate_answers_in_text_or_json(capsys, compressed):
    answer = succeeds(capsys, "generate", compressed, "hello", "--max-tokens", "4")
    found = succeeds(capsys, "generate", compressed, "hello", "--max-tokens", "4", "--json")
    assert found["text"] == answer.removesuffix("\n")
    assert found["tokens"] <= 4
