"""Whether something can be written somewhere, before it is computed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actors.outputs import check_file, check_folder
from configs import ConfigError


def test_what_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    assert check_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert check_folder(tmp_path) == tmp_path
    assert check_file(tmp_path / "a" / "answers.json") == tmp_path / "a" / "answers.json"
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match=r"--out .*/file/new: .*/file is a file; give a folder"):
        check_folder(tmp_path / "file" / "new")
    with pytest.raises(ConfigError, match=r"--out .* is a folder; give the file to write"):
        check_file(tmp_path)
    with pytest.raises(ConfigError, match=r"--page .*/file is a file"):
        check_file(tmp_path / "file" / "answers.json", "--page")
    assert (tmp_path / "file").read_text() == "kept"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(ConfigError, match=r"nothing can be written into .* \(No space left on device\)"):
        check_folder(tmp_path / "new")
