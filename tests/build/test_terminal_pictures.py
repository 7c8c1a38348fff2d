"""Previews in terminals that can show them, and nothing of the kind anywhere else."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from sdforge.cli import main
from sdforge.report.inline import escape, protocol


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-256color"}, ""),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, ""),
        ({}, ""),
    ],
)
def test_a_terminal_is_known_by_what_it_says_of_itself(environment: dict[str, str], kind: str) -> None:
    assert protocol(Terminal(), environment) == kind
    assert protocol(io.StringIO(), environment) == ""


def test_what_a_terminal_is_sent_holds_the_picture() -> None:
    png = bytes(range(256)) * 40
    text = escape("kitty", png)
    parts = re.findall(r"\x1b_G(?:a=T,f=100,q=2,r=6,)?m=([01]);([^\x1b]*)\x1b\\", text)
    assert [more for more, _ in parts] == ["1"] * (len(parts) - 1) + ["0"]
    assert max(len(data) for _, data in parts) <= 4096
    assert base64.b64decode("".join(data for _, data in parts)) == png
    (found,) = re.findall(
        r"\x1b\]1337;File=inline=1;size=10240;height=6;preserveAspectRatio=1:([^\x07]*)\x07", escape("iterm", png)
    )
    assert base64.b64decode(found) == png


def test_list_shows_the_previews_of_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "forge.toml").write_text("")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.toml").write_text('family = "sd15"\n')
    folder = tmp_path / "out" / "r" / "previews"
    folder.mkdir(parents=True)
    for name in ("1-1-r", "1-2-r", "1-1-base", "sheet"):
        Image.new("RGB", (64, 64), "red").save(folder / f"{name}.png")
    for arguments in (["list"], ["list", "--pictures", "kitty"]):
        assert main(["-C", str(tmp_path), *arguments]) == 0
        assert "\x1b" not in capsys.readouterr().out  # it is no terminal
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    monkeypatch.delenv("TMUX", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["-C", str(tmp_path), "list"]) == 0
    (found,) = re.findall(r":([^:\x07]*)\x07", terminal.getvalue())
    with Image.open(io.BytesIO(base64.b64decode(found))) as picture:
        assert picture.size == (324, 160)  # the two of the preset
    assert main(["-C", str(tmp_path), "list", "--pictures", "never"]) == 0
    assert terminal.getvalue().count("\x1b") == 1


def test_a_project_without_recipes_is_told_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "forge.toml").write_text("")
    assert main(["-C", str(tmp_path), "list"]) == 0
    assert "`forge init DIR`" in capsys.readouterr().out
