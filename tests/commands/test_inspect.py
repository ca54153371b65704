from command_line import succeeds


def test_inspect_prints_layers_and_bytes(capsys, compressed, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # parallel test runners set it for their workers
    output = succeeds(capsys, "inspect", compressed)
    assert "model.layers.1.mlp.down_proj" in output
    assert "plane codes" in output
    found = succeeds(capsys, "inspect", compressed, "--json")
    assert sum(found["bytes_by_kind"].values()) == found["file_bytes"]


def test_inspect_shows_names_in_full_on_a_narrow_screen(capsys, compressed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert "…" not in succeeds(capsys, "inspect", compressed)
