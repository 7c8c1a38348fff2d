"""Checks: what a preset's pictures are expected to show decides whether its files are written."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from sdforge.build import Build
from sdforge.checks import command
from sdforge.cli import main
from sdforge.errors import ActionFailed, CheckFailed, RecipeError
from sdforge.method import method, method_groups
from sdforge.order import Given, Order, Outcome
from sdforge.run.likeness import psnr, read, rms, ssim
from sdforge.store.files import is_alive
from sdforge.under_way import Options, Summary
from tests.build.inline import Bench, Silent

PRESET = """
[preset]
checkpoint = "base"
insert = ["word"]
bake = { glow = 1.0 }
[preset.previews]
prompts = ["a <word>", "a cat"]
seeds = [1]
steps = 1
"""
SHINES = """
[checks.effect.shines]
of = "glow"
least = 0.0001
"""
SPEAKS = """
[checks.effect.speaks]
of = "word"
least = 0.0001
"""


@pytest.fixture
def drawn(bench: Bench) -> Bench:
    """A project with a word that prompts may name, and a LoRA that a picture shows."""
    toml = (bench.root / "forge.toml").read_text().replace('from = "word.safetensors"', 'from = "<word>.safetensors"')
    (bench.root / "word.safetensors").rename(bench.root / "<word>.safetensors")
    (bench.root / "forge.toml").write_text(toml)
    where = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    factors = {"lora_down.weight": torch.ones(1, 8), "lora_up.weight": 50 * torch.eye(8)[:, :1]}
    save_file({f"{where}.{name}": t.half() for name, t in factors.items()}, bench.root / "glow.safetensors")
    return bench


@pytest.fixture
def painted(drawn: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The same, with pictures that are not drawn but noise: another one for every checkpoint, prompt and seed."""

    def paint(order: Order, report: Any) -> Outcome:  # noqa: ARG001 -- what runs answer
        outcome = Outcome(facts={"column": order.the("checkpoint").identity})
        for given in [order.the("checkpoint"), *order.inputs.get("beside", [])]:
            for number, prompt in enumerate(order.settings["prompts"], 1):
                name = f"{given.identity[:16]}/{number}-1.png"
                path = Path(order.work) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                digest = hashlib.sha256(f"{given.identity} {prompt}".encode()).digest()
                noise = np.random.default_rng(int.from_bytes(digest[:8])).integers(0, 256, (32, 32, 3), np.uint8)
                info = PngInfo()
                info.add_text("parameters", f"{prompt}\nSteps: 1")
                Image.fromarray(noise).save(path, pnginfo=info)
                data = path.read_bytes()
                outcome.files[name] = [hashlib.sha256(data).hexdigest(), len(data)]
        return outcome

    monkeypatch.setattr("sdforge.edits.previews.run", paint)
    return drawn


def described(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bench.root / "out" / "r" / "preset.json").read_bytes())["checks"]
    return found


def run(bench: Bench, **how: Any) -> Summary:
    session = bench.session()
    for name, value in how.items():
        setattr(session, name, value)
    summary = Build(session, bench, Silent(), Options(device="cpu")).run(session.resolve(["r"]))
    session.store.close()
    return summary


def test_effects_are_measured_against_what_is_drawn_without_and_at_strength_0(drawn: Bench) -> None:
    drawn.recipe(PRESET + SHINES + SPEAKS)
    drawn.build()
    shines, speaks = described(drawn)["results"]
    assert (shines["check"], shines["kind"], shines["state"]) == ("shines", "effect", "passed")
    assert shines["measured"]["present"] > 0.0001
    assert shines["measured"]["absent"] == 0  # at strength 0 it is the same checkpoint, and drawn once
    assert speaks["measured"]["present"] > 0.0001  # where a prompt names the word
    assert speaks["measured"]["absent"] == 0  # and nowhere else
    assert [step.state for step in drawn.plan().to_do] == []


def test_a_check_that_fails_leaves_the_last_good_export_and_shows_the_pictures(painted: Bench) -> None:
    painted.recipe(PRESET + SHINES)
    painted.build()
    folder = painted.root / "out" / "r"
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    painted.recipe((PRESET + SHINES).replace("glow = 1.0", "glow = 0.5").replace("0.0001", "0.9"))
    for _ in range(2):  # the verdict is kept, and is one the second time too
        summary = run(painted)
        error = summary.failed["r:check.shines"]
        assert isinstance(error, CheckFailed)
        assert error.message.startswith("no picture shows it: the largest difference is 0.4")
        assert "--no-checks" in error.hint
        assert summary.skipped == ["r:preset.export", "r:preset.previews"]
        assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    failed = painted.root / "out" / ".failed" / "r"
    assert {p.name for p in failed.iterdir()} >= {"sheet.png", "1-1-r.png", "2-1-r.png"}
    assert (failed / "1-1-r.png").read_bytes() != (folder / "previews" / "1-1-r.png").read_bytes()


def test_without_checks_it_is_written_with_a_mark_that_the_next_build_takes_away(painted: Bench) -> None:
    strict, mild = (PRESET + SHINES.replace("0.0001", least) for least in ("0.9", "0.0"))
    painted.recipe(strict)
    assert not run(painted, checked=False).failed
    assert described(painted) == {"state": "skipped", "results": []}
    assert "r:check.shines" in run(painted).failed
    assert described(painted)["state"] == "skipped"
    assert (painted.root / "out" / ".failed" / "r").is_dir()
    painted.recipe(mild)
    painted.build()
    assert described(painted)["state"] == "passed"
    assert not (painted.root / "out" / ".failed" / "r").exists()


def test_pictures_are_compared_with_a_reference(painted: Bench) -> None:
    painted.recipe(PRESET)
    painted.build()
    assert described(painted) == {"state": "none", "results": []}
    shutil.copyfile(painted.root / "out" / "r" / "previews" / "1-1-r.png", painted.root / "golden.png")
    golden = (
        '\n[source.golden]\nfrom = "golden.png"\n[checks.likeness.as-chosen]\nto = "golden"\nprompt = 1\nssim = 0.99'
    )
    painted.recipe(PRESET + golden)
    painted.build()
    (alike,) = described(painted)["results"]
    assert alike["measured"] == {"least_ssim": 1.0, "most_ssim": 1.0}
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(painted.root / "golden.png")
    assert "prompt 1, seed 1: SSIM" in painted.failure("check.as-chosen").message


def test_the_previous_build_that_passed_is_what_a_new_one_is_compared_with(painted: Bench) -> None:
    asked = "\n[checks.previous.steady]\nssim = 0.9"
    painted.recipe(PRESET + asked)
    painted.build()
    assert "nothing to compare with" in described(painted)["results"][0]["says"]
    assert painted.states()["check.steady"] == "reuse"
    painted.recipe(PRESET.replace("glow = 1.0", "glow = 9.0") + asked)
    assert "is less than 0.9" in painted.failure("check.steady").message
    assert "is less than 0.9" in painted.failure("check.steady").message  # one that failed is nothing to compare with
    assert not run(painted, checked=False).failed  # somebody wants it so
    painted.build()
    assert "nothing to compare with" in described(painted)["results"][0]["says"]
    painted.recipe(PRESET.replace("glow = 1.0", "glow = 2.0") + asked.replace("0.9", "-1.0"))
    painted.build()
    assert described(painted)["results"][0]["says"].startswith("SSIM ")


COMMAND = '\n[checks.command.own]\ncommand = ["python", "own.py", "%s"]\nseconds = 20'
OWN = """
import json, sys
told = json.load(sys.stdin)
open("seen.json", "a").write(json.dumps(told) + "\\n")
print("working")
print(sys.argv[1])
sys.exit(sys.argv[1] == "bad")
"""


def seen(bench: Bench) -> list[dict[str, Any]]:
    path = bench.root / "seen.json"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_strangers_command_is_not_run(painted: Bench) -> None:
    (painted.root / "own.py").write_text(OWN)
    painted.recipe(PRESET + COMMAND % "bad")
    assert painted.built() == ["preset.insert", "preset.bake", "preset.previews", "preset.export"]
    assert seen(painted) == []
    (row,) = described(painted)["results"]
    assert (row["state"], row["says"]) == ("not run", "this machine does not allow its command")
    other = '[checks]\ncommands = [["python", "own.py", "good"]]\n'  # other words than the recipe's
    (painted.root / "forge.local.toml").write_text(other)
    painted.build()
    assert seen(painted) == []


def test_a_command_that_this_machine_allows_gets_the_pictures_and_gives_the_verdict(painted: Bench) -> None:
    (painted.root / "own.py").write_text(OWN)
    (painted.root / "forge.local.toml").write_text('[checks]\ncommands = [["python", "own.py", "good"]]\n')
    painted.recipe(PRESET + COMMAND % "good")
    painted.build()
    (told,) = seen(painted)
    rows = [(row["prompt"], row["number"], row["seed"]) for row in told["pictures"]]
    assert rows == [("a <word>", 1, 1), ("a cat", 2, 1)]
    placed = [painted.root / "out" / "r" / "previews" / f"{n}-1-r.png" for n in (1, 2)]
    assert [Path(row["path"]).read_bytes() for row in told["pictures"]] == [p.read_bytes() for p in placed]
    (row,) = described(painted)["results"]
    assert (row["state"], row["says"], row["measured"]) == ("passed", "good", {"exit_code": 0})
    painted.build()
    assert len(seen(painted)) == 1  # its verdict is kept …
    (painted.root / "own.py").write_text(OWN + "\n")
    painted.build()
    assert len(seen(painted)) == 2  # … until a file that it names has changed
    painted.recipe(PRESET + COMMAND % "bad")
    assert run(painted, trusting=True).failed["r:check.own"].message == "bad"


def test_a_reference_of_more_than_8_bits_is_refused_rather_than_made_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / "grey.png")
    with pytest.raises(ActionFailed, match="grey in more than 8 bits"):
        read(str(tmp_path / "grey.png"))


def test_what_a_command_leaves_running_ends_with_it(tmp_path: Path) -> None:
    """Its output stays open meanwhile, for which nobody waits."""
    left = tmp_path / "left"
    words = ["sh", "-c", f"sleep 30 & echo $! > {left}; echo fine"]
    given, how = {"pictures": [Given("pictures")]}, {"root": str(tmp_path)}
    order = Order("", "", "command", "checks", "sd15", {"command": words, "seconds": 20.0}, "", given, how=how)
    began = time.monotonic()
    assert command.run(order, lambda **_: None).facts["says"] == "fine"
    assert time.monotonic() - began < 10
    while is_alive(int(left.read_text())):
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import time\ntime.sleep(30)", "python took more than 0.2 s"),
        ("import os\nos.kill(os.getpid(), 9)", "python gave no verdict: exit code -9"),
    ],
)
def test_a_command_that_gives_no_verdict_is_no_verdict(painted: Bench, text: str, said: str) -> None:
    (painted.root / "own.py").write_text(text)
    painted.recipe(PRESET + (COMMAND % "good").replace("seconds = 20", "seconds = 0.2" if "sleep" in text else ""))
    summary = run(painted, trusting=True)
    assert summary.failed["r:check.own"].message == said
    assert painted.states()["check.own"] == "unneeded"  # nothing was kept, and it is not allowed here


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[checks.efect.x]", "there is no check `efect`"),
        ('[checks.effect.x]\nof = "glov"', "[preset] does not take `glov`"),
        ("[checks.effect.x]", "checks.effect.x needs `of`"),
        ('[checks.effect.x]\nof = "glow"\nwithout = "base"', "`without` is no setting of checks.effect.x"),
        ("[checks.previous.x]\nssim = 2.0", "`ssim` is at most 1, not 2"),
        ('[checks.previous.x]\n[checks.command.x]\ncommand = ["x"]', "`x` is already the name of a check"),
        ("[checks]\nprevious = 3", "a check is written as a table"),
        ("[effect.x]", "`effect` belongs to [checks.effect.NAME]"),
    ],
)
def test_mistakes_in_checks_are_told_at_their_place(bench: Bench, text: str, said: str) -> None:
    bench.recipe(f"{PRESET}\n{text}")
    with pytest.raises(RecipeError) as caught:
        bench.plan()
    assert said in caught.value.problems[0].message
    assert all(problem.place and problem.place.line for problem in caught.value.problems)


def test_checks_of_a_preset_that_draws_nothing_are_a_mistake(bench: Bench) -> None:
    bench.recipe('[preset]\ncheckpoint = "base"\n[checks.previous.x]\n')
    with pytest.raises(RecipeError, match="checks look at previews, and nothing draws any"):
        bench.plan()


def test_the_plan_shows_checks_and_the_command_fails_with_them(
    painted: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdforge.commands.LocalExecutor", lambda _: painted)
    (painted.root / "own.py").write_text(OWN)
    painted.recipe(PRESET + COMMAND % "bad")
    assert main(["-C", str(painted.root), "plan", "r"]) == 0
    planned = capsys.readouterr().out
    assert "check.own" in planned
    assert '["python", "own.py", "bad"] under [checks] commands in forge.local.toml' in planned
    assert main(["-C", str(painted.root), "build", "r", "--allow-commands", "--plain"]) == 1
    told = capsys.readouterr().out
    assert re.search(r"check.own +command +bad\n", told)
    assert "  out/r stays as it was; the pictures are in out/.failed/r; --no-checks writes it all the same\n" in told
    assert main(["-C", str(painted.root), "plan", "r"]) == 0
    planned = capsys.readouterr().out
    assert re.search(r"check.own +command +failed +\w+ +bad\n", planned)
    assert re.search(r"preset.export +export +build .*`check.own` failed\n", planned)
    assert main(["-C", str(painted.root), "build", "r", "--no-checks"]) == 0
    assert described(painted)["state"] == "skipped"


def test_of_a_variant_that_fails_its_own_targets_are_said_to_be_left_out(
    painted: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdforge.commands.LocalExecutor", lambda _: painted)
    painted.recipe(PRESET + SHINES + "[variant.dull]\npreset.bake.glow = 0.0\n")
    assert main(["-C", str(painted.root), "build", "r@dull", "--plain"]) == 1
    assert re.search(r"– @dull:preset.export +not built: needs what failed", capsys.readouterr().out)
    assert main(["-C", str(painted.root), "report", "r@dull"]) == 2
    assert "r@dull does not pass its checks" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(name for name, group in method_groups().items() if group == "checks"))
def test_every_check_in_the_folder_holds_to_the_contract(name: str) -> None:
    signature = method(name).signature
    assert (signature.makes, signature.kind, signature.pinned) == ("verdict", "content", False)
    assert signature.roles["pictures"].kind == "pictures"
    assert callable(method(name).module.run)
    assert f"`{name}`" in (Path(__file__).parents[2] / "README.md").read_text()


# -- the figures -------------------------------------------------------------------------------------------------------


def test_equal_pictures_are_alike_and_noise_is_not() -> None:
    noise = np.random.default_rng(0).random((2, 40, 48, 3))
    assert ssim(noise[0], noise[0]) == pytest.approx(1)
    assert abs(ssim(noise[0], noise[1])) < 0.1
    assert psnr(noise[0], noise[0]) == float("inf")
    assert rms(noise[0], noise[1]) == pytest.approx((1 / 6) ** 0.5, rel=0.02)  # of two uniform numbers


def test_a_constant_shift_has_the_ssim_and_psnr_that_the_formulas_give() -> None:
    """Without variance only the luminance term is left: (2ab + C₁) / (a² + b² + C₁); PSNR of 0.1 is 20 dB."""
    a, b = np.full((16, 16, 3), 0.5), np.full((16, 16, 3), 0.6)
    assert ssim(a, b) == pytest.approx((2 * 0.3 + 1e-4) / (0.25 + 0.36 + 1e-4))
    assert psnr(a, b) == pytest.approx(20)
