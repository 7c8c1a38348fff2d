"""Commands as a person (or a program) meets them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from sdforge.arguments import parser
from sdforge.cli import main
from sdforge.formats.safetensors import read_header
from sdforge.orders import state_folder
from sdforge.session import open_session
from tests.conftest import FORGE, Project, new_project

pytestmark = pytest.mark.usefixtures("forked")

Wait = Callable[[Callable[[], object]], None]

TWO = """\
family = "sd15"

[rehearsal.left]
on = "base"
dataset = "drawings"

[rehearsal.right]
on = "base"
dataset = "drawings"
rank = 4

[swap.both]
checkpoint = "left"
text_encoder = "right"

[preset]
checkpoint = "both"
"""

NOTHING_BUT_FILES = 'family = "sd15"\n[preset]\ncheckpoint = "base"\nexport = ["checkpoint", "diffusers"]\n'


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Path) -> Project:
    project = new_project(tmp_path_factory.mktemp("commands") / "project", toy_checkpoint)
    project.build()
    return project


@pytest.fixture
def built(finished: Project, tmp_path: Path) -> Project:
    shutil.copytree(finished.root, tmp_path / "project")
    shutil.rmtree(tmp_path / "project/cache/v1/roots")  # or the first project's recipes would count as well
    project = Project(tmp_path / "project")
    project.build()
    return project


def on_a_terminal(project: Project, *arguments: str, **environment: str) -> str:
    """Run a command on a terminal of its own; return all that it wrote there."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project.root)
        own = {"FORGE_METHODS": str(Path(__file__).parents[1] / "methods"), "TERM": "xterm-256color", "COLUMNS": "120"}
        os.execve(str(FORGE), [str(FORGE), *arguments], os.environ | own | environment)
    said = b""
    while True:
        try:
            chunk = os.read(terminal, 65536) if select.select([terminal], [], [], 60)[0] else b""
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        said += chunk
    os.waitpid(pid, 0)
    return said.decode()


# -- what is there -----------------------------------------------------------------------------------------------------


def test_version_and_help(project: Project) -> None:
    assert project.forge("--version").out.startswith("forge ")
    assert "bring targets up to date" in project.forge("--help").out


def test_a_mistyped_name_is_guessed(project: Project) -> None:
    ran = project.forge("build", "toi", code=2)
    assert "did you mean 'toy'?" in ran.err


def test_outside_a_project_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    ran = Project(tmp_path).forge("build", code=2)
    assert "forge init" in ran.err


def test_dash_c_works_elsewhere(built: Project, tmp_path: Path) -> None:
    assert "nothing to do" in Project(tmp_path).forge("-C", str(built.root), "build", FORGE_METHODS=_methods()).out


def _methods() -> str:
    return str(Path(__file__).parents[1] / "methods")


def test_list_show_log_and_graph(built: Project) -> None:
    assert re.search(r"✓ a +rehearsal +reuse", built.forge("list").out)
    assert "weighted_sum" in built.forge("list", "--methods").out
    assert "Stable Diffusion 1.x" in built.forge("list", "--families").out
    assert "base" in built.forge("list", "--sources").out
    shown = built.forge("show", "toy:a").out
    assert "rank = 8" in shown
    assert "threads  1" in shown
    assert re.search(r"^  on +base$", shown, re.MULTILINE), "what it was made from"
    file = built.forge("show", str(built.output)).out
    assert "modelspec" in file
    assert "10 steps" in built.forge("log", "a").out
    assert "flowchart" in built.forge("graph").out
    assert "digraph" in built.forge("graph", "--format", "dot").out
    nodes = json.loads(built.forge("graph", "--format", "json").out)["nodes"]
    assert {node["id"] for node in nodes} >= {"toy:a", "base", "drawings"}


def test_plan_says_what_would_be_done_and_does_nothing(project: Project) -> None:
    ran = project.forge("plan", "--exit-code", code=10)
    assert "4 to build" in ran.out
    assert "Nothing was done" in ran.out
    assert project.forge("build", "--dry-run").out == ran.out
    assert project.trained() == []
    assert not (project.root / "forge.lock").exists()


def test_why_names_the_setting_with_both_values_and_its_place(built: Project) -> None:
    built.edit("rank = 6", "rank = 7")
    line = built.recipe.read_text().splitlines().index("rank = 7") + 1
    ran = built.forge("why", "b")
    assert "rank 6 → 7" in ran.out
    assert f"recipes/toy.toml:{line}\n" in ran.out
    behind = built.forge("why", "c").out
    assert "`b`" in behind
    assert "rank 6 → 7" in behind


def test_why_names_the_picture_and_the_caption_that_changed(built: Project) -> None:
    (built.root / "drawings" / "1.txt").write_text("a green circle\n")
    ran = built.forge("why", "a")
    assert "1.png" in ran.out
    assert "green circle" in ran.out


def test_check_finds_mistakes_before_anything_runs(project: Project) -> None:
    project.edit("rank = 8", 'rank = "eight"\nranc = 3')
    ran = project.forge("check", code=2)
    assert "recipes/toy.toml:6:" in ran.out + ran.err
    assert "ranc" in ran.out + ran.err


# -- how it tells ------------------------------------------------------------------------------------------------------


def test_a_thousand_mistakes_are_placed_in_no_time(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = "".join(f'"unet.in0?:no{i}" = [0.5, 0.5]\n' for i in range(1000))
    merge = '[weighted_sum.m]\ncheckpoints = ["base", "base"]\nweights = [0.5, 0.5]\n[weighted_sum.m.blocks]\n'
    project.recipe.write_text(f'family = "sd15"\n{merge}{blocks}')
    began = time.process_time()
    assert main(["-C", str(project.root), "check", "toy"]) == 2
    assert time.process_time() - began < 5
    assert capsys.readouterr().err.count("recipes/toy.toml:") == 1000


def test_plain_lines_name_steps(project: Project) -> None:
    out = project.forge("build", "--plain").out
    assert re.search(r"a: step \d+/10 +loss", out)
    assert "\x1b" not in out


def test_what_is_trained_and_its_cost_are_said_before_it_begins(project: Project) -> None:
    out = project.forge("build").out
    assert re.search(r"^  3 trainings, 30 steps · how long is not known yet · \+.* \(free: .*\)$", out, re.MULTILINE)
    assert out.index("3 trainings") < out.index("running")
    project.edit("[rehearsal.c]", "[rehearsal.c]\nsteps = 20")
    assert re.search(r"^  1 training, 1?\d steps · about", project.forge("build").out, re.MULTILINE)
    assert "training" not in project.forge("build").out


def test_a_terminal_shows_the_same_without_leaving_marks(project: Project) -> None:
    said = on_a_terminal(project, "build", REHEARSAL_PAUSE="0.1")
    assert re.search(r"step \d+/10 +loss \d+\.\d+ +\d+\.\d steps/s +\d+\.\d s left", said)
    assert re.search(r"a +rehearsal +built", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said))
    assert "\x1b[?25h" in said  # the cursor is back


def test_no_color_is_respected(project: Project) -> None:
    colours = re.compile(r"\x1b\[[0-9;]*m")
    assert colours.search(on_a_terminal(project, "build"))
    shutil.rmtree(project.root / "out")
    assert not colours.search(on_a_terminal(project, "build", NO_COLOR="1"))
    for command in ("plan", "list", "check"):
        assert "\x1b" not in on_a_terminal(project, command, NO_COLOR="1")


def test_hashes_by_which_other_programs_know_a_file_are_printed_and_recorded(project: Project) -> None:
    out = project.forge("build", "--plain").out
    data = project.output.read_bytes()
    whole = hashlib.sha256(data).hexdigest()
    body = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert f"SHA256 {whole}" in out
    assert f"AutoV2 {whole[:10].upper()}  AutoV3 {body[:12].upper()}" in out
    files = json.loads((project.output.parent / "preset.json").read_text())["files"]
    (row,) = (row for row in files if row["kind"] == "checkpoint")
    assert (row["sha256"], row["autov3"]) == (whole, body[:12].upper())


def test_json_lines_are_events_of_a_known_shape(project: Project) -> None:
    ran = project.build()
    assert all(event["v"] == 1 for event in ran.events)
    states = {event["state"] for event in ran.of("action")}
    assert {"build", "running", "built"} <= states
    assert all({"target", "method", "key", "reason"} <= set(event) for event in ran.of("action"))
    reasons = {
        event["target"].removeprefix("toy:"): event["reason"] for event in ran.of("action") if event["state"] == "build"
    }
    assert reasons["a"] == ["it has never been made here"]
    assert reasons["b"] == ["`a` is made first"]
    progress = [event for event in ran.of("progress") if "loss" in event]
    assert progress[-1]["step"] == progress[-1]["steps"] == 10
    assert ran.events[-1]["event"] == "result"
    plan = json.loads(project.forge("plan", "--json").out)
    assert [action["state"] for action in plan["actions"]] == ["reuse"] * 4
    assert plan["free"] > 0
    error = json.loads(project.forge("build", "--json", "nothing", code=2).out)
    assert (error["event"], error["code"]) == ("error", 2)


# -- how it runs -------------------------------------------------------------------------------------------------------


def test_independent_actions_run_side_by_side(tmp_path: Path, toy_checkpoint: Path, wait_for: Wait) -> None:
    project = new_project(tmp_path / "project", toy_checkpoint, TWO)
    gate = project.root / "gate"
    gate.mkdir()
    running = project.start("build", "-j", "2", REHEARSAL_GATE=str(gate))
    wait_for(lambda: {"toy-left", "toy-right"} <= {path.name for path in gate.iterdir()})
    (gate / "go").touch()
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0, out + err


def test_nothing_starts_before_what_it_needs_is_done(tmp_path: Path, toy_checkpoint: Path) -> None:
    recipe = 'family = "sd15"\n[halves.soft]\nfirst = "base"\nsecond = "other"\n'
    recipe += '[rehearsal.a]\non = "soft"\ndataset = "drawings"\n[preset]\ncheckpoint = "a"\n'
    project = new_project(tmp_path / "project", toy_checkpoint, recipe)
    shutil.copytree(toy_checkpoint, project.root / "other")
    weights = project.root / "other" / "text_encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2:] = b"\x00\x40"  # the last number of the last tensor becomes 2
    weights.write_bytes(data)
    with (project.root / "forge.toml").open("a") as file:
        file.write('[source.other]\nfrom = "other"\n')
    assert project.build("-j", "4").built == ["soft", "a", "preset.export"]


def test_a_device_computes_one_thing_at_a_time(tmp_path: Path, toy_checkpoint: Path, wait_for: Wait) -> None:
    project = new_project(tmp_path / "project", toy_checkpoint, TWO)
    project.environment["XDG_RUNTIME_DIR"] = str(tmp_path)
    gate = project.root / "gate"
    gate.mkdir()
    running = project.start("build", "--plain", "-j", "2", "--device", "cuda:0", REHEARSAL_GATE=str(gate))
    wait_for(lambda: any(gate.iterdir()))
    other = new_project(tmp_path / "other", toy_checkpoint)
    other.environment["XDG_RUNTIME_DIR"] = str(tmp_path)
    patient = other.start("build", "--plain", "--device", "cuda:0")
    line = ""
    while "waiting for cuda:0" not in line:
        assert patient.stdout
        line = patient.stdout.readline()
    assert f"which process {running.pid} uses" in line
    patient.send_signal(signal.SIGINT)
    assert patient.wait(timeout=20) == 130
    assert len(list(gate.iterdir())) == 1
    (gate / "go").touch()
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0, out + err


def test_the_device_is_that_of_this_machine_unless_the_command_names_one(project: Project) -> None:
    (project.root / "forge.local.toml").write_text('[run]\ndevice = "cuda:7"\n')

    def devices(*arguments: str) -> set[str]:
        started = [e for e in project.build(*arguments).of("action") if e["state"] == "running"]
        return {event["device"] for event in started if event["target"] == "toy:a"}

    assert devices() == {"cuda:7"}
    project.edit("rank = 8", "rank = 9")
    assert devices("--device", "cpu") == {"cpu"}


@pytest.mark.parametrize(("flags", "others"), [([], []), (["-k"], ["right"])], ids=["stop", "keep going"])
def test_after_a_failure_it_is_said_what_was_kept(
    tmp_path: Path, toy_checkpoint: Path, flags: list[str], others: list[str]
) -> None:
    recipe = TWO.replace('dataset = "drawings"\n', 'dataset = "drawings"\nfails = true\n', 1)
    project = new_project(tmp_path / "project", toy_checkpoint, recipe)
    ran = project.forge("build", "--plain", *flags, code=1)
    assert "the rehearsal was told to fail" in ran.out
    assert "try   fails = false" in ran.out
    assert "what was built is kept" in ran.out
    again = project.build(*flags, code=1)
    assert again.built == []
    assert project.starts().count("right") == len(others)


def test_no_wait_ends_at_once_with_5(project: Project, wait_for: Wait) -> None:
    gate = project.root / "gate"
    gate.mkdir()
    running = project.start("build", REHEARSAL_GATE=str(gate))
    wait_for(lambda: (gate / "toy-a").exists())
    ran = project.forge("build", "--no-wait", code=5)
    assert str(running.pid) in ran.err
    assert project.forge("clean", code=5).err.startswith("error: a build or a download is using the cache")
    (gate / "go").touch()
    running.communicate(timeout=60)
    assert running.returncode == 0


def test_what_the_disk_has_no_room_for_is_refused_before_anything_runs(project: Project) -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount anything")
    project.recipe.write_text(NOTHING_BUT_FILES)
    (project.root / "cache").mkdir()
    script = "mount -t tmpfs -o size=440k tmpfs cache && mkdir cache/v1 && "
    for command in ("plan", "build"):
        ran = subprocess.run(
            ["unshare", "-rm", "sh", "-c", f"{script} {FORGE} {command}"],
            cwd=project.root,
            env=os.environ | {"FORGE_METHODS": _methods()},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 4, ran.stdout + ran.stderr
        assert "are free" in ran.stderr
        assert "forge clean --dry-run" in ran.stderr


TUNED = """\
family = "sd15"

[weighted_sum.soft]
checkpoints = ["base", "base"]
weights = [0.5, 0.5]
dtype = "fp32"

[fine_tune.all]
on = "soft"
dataset = "drawings"
train = ["unet.mid"]
"""


def test_the_states_of_a_fine_tuning_count_among_what_the_disk_must_hold(project: Project) -> None:
    project.recipe.write_text(TUNED)
    few = json.loads(project.forge("plan", "--json").out)["bytes"]
    project.edit('train = ["unet.mid"]', 'train = ["unet"]')
    all_ = json.loads(project.forge("plan", "--json").out)["bytes"]
    tensors = read_header(project.root / "base" / "unet" / "diffusion_pytorch_model.safetensors").tensors
    numbers = {name: math.prod(entry.shape) for name, entry in tensors.items()}
    others = sum(count for name, count in numbers.items() if not name.startswith("mid_block."))
    assert all_ - few == 3 * 12 * others


def test_a_disk_that_becomes_full_loses_nothing(project: Project) -> None:
    # a limit on the size of files stands in for a full disk: the first larger write fails
    script = f"ulimit -f 8; exec {FORGE} build --plain"
    ran = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; {script}"],
        cwd=project.root,
        env=os.environ | {"FORGE_METHODS": _methods()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 4, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    assert project.build().built == ["a", "b", "c", "preset.export"]


# -- keeping house -----------------------------------------------------------------------------------------------------


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and "index.db" not in path.name)


def test_clean_frees_what_it_says_and_the_next_build_is_null(built: Project) -> None:
    built.edit("rank = 5", "rank = 3")
    built.build()
    (built.root / "cache/v1/objects/zz").mkdir()
    (built.root / "cache/v1/objects/zz/leftover").write_bytes(b"x" * 1000)
    promised = json.loads(built.forge("clean", "--dry-run", "--json").out)["bytes"]
    before = size(built.root / "cache/v1")
    freed = json.loads(built.forge("clean", "--json").out)["bytes"]
    assert freed == promised >= 1000
    assert before - size(built.root / "cache/v1") == freed
    again = built.build()
    assert again.built == again.restored == []
    built.edit("rank = 3", "rank = 5")
    built.trained()
    built.build()
    assert built.starts() == []  # trained results are kept


def test_clean_trained_removes_what_no_recipe_reaches(built: Project) -> None:
    built.edit("rank = 5", "rank = 3")
    built.build()
    built.forge("lock", "--prune")
    built.forge("clean", "--trained")
    assert built.build().built == []
    built.edit("rank = 3", "rank = 5")
    built.trained()
    built.build()
    assert built.starts() == ["c"]


def test_the_demo_is_in_what_pip_installs(tmp_path: Path) -> None:
    """What the wheel is made of, laid out as pip lays it out, makes a project without the repository."""
    root = Path(__file__).parents[2]
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    site = tmp_path / "site"
    for package in wheel["packages"]:
        shutil.copytree(root / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    for origin, place in wheel["force-include"].items():
        copy = shutil.copytree if (root / origin).is_dir() else shutil.copyfile
        copy(root / origin, site / place)
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from sdforge.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(site), "init", "mine"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "mine" / "recipes" / "anime-preset.toml").is_file()
    assert (tmp_path / "mine" / "recipes" / "bases" / "flat" / "unet").is_dir()


def test_init_makes_a_project_that_can_be_planned(tmp_path: Path) -> None:
    said = Project(tmp_path).forge("init", "mine").out
    mine = Project(tmp_path / "mine")
    copied = len(list((tmp_path / "mine" / "recipes").glob("*.toml")))
    assert f"two small trained bases and {copied} recipes" in said
    assert "to build" in mine.forge("plan").out
    assert mine.forge("schema", "--check").out
    assert "already" in Project(tmp_path).forge("init", "mine", code=2).err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_every_command(tmp_path: Path, shell: str) -> None:
    script = Project(tmp_path).forge("completion", shell).out
    actions = next(action for action in parser()._actions if action.dest == "command")
    assert all(command in script for command in actions.choices or ())
    assert "retrain" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["bu"], ["build"]),
        (["build", "--ret"], ["--retrain"]),
        (["why", "pres"], ["preset.export"]),
        (["build", "to"], ["toy", "toy:a", "toy:b", "toy:c", "toy:preset.export"]),
        (["build", "toy", ":", "pre"], ["preset.export"]),  # bash takes toy:pre for three words
        (["build", "toy", ":"], ["a", "b", "c", "preset.export"]),
        (["-C", ".", "pl"], ["plan"]),
    ],
)
def test_bash_completes_commands_options_and_targets(typed: list[str], offered: list[str], project: Project) -> None:
    script = project.forge("completion", "bash").out
    words = " ".join(f"'{word}'" for word in ["forge", *typed])
    line = " ".join(["forge", *typed]).replace(" : ", ":").replace(" :", ":")
    script += f"COMP_LINE='{line}'; COMP_POINT={len(line)}; COMP_WORDS=({words}); COMP_CWORD={len(typed)}\n"
    script += '_forge; printf "%s\\n" "${COMPREPLY[@]}"\n'
    environment = os.environ | {"PATH": f"{FORGE.parent}:{os.environ['PATH']}", "FORGE_METHODS": _methods()}
    ran = subprocess.run(
        ["bash", "-c", script], cwd=project.root, env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == offered


def test_the_module_runs_as_the_command_does(built: Project) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "sdforge", "build"],
        cwd=built.root,
        env=os.environ | {"FORGE_METHODS": _methods()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "nothing to do" in ran.stdout, ran.stderr


@pytest.mark.parametrize(("said", "code"), [("8GB", 0), ("500 MiB", 0), ("lots", 2), ("8", 2)])
def test_vram_is_an_amount_of_memory(said: str, code: int, project: Project) -> None:
    ran = project.forge("build", "--vram", said, code=code)
    assert ("--vram 8GB" in ran.err) == bool(code)


# -- what a command line may say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [["-j", "-1"], ["-j", "0"], ["-j", "many"], ["--device", "foo"]])
def test_numbers_and_devices_that_are_none_are_refused_at_once(wrong: list[str], project: Project) -> None:
    ran = project.forge("build", *wrong, code=2)
    assert wrong[1] in ran.err
    assert project.trained() == []


def test_only_what_is_pinned_can_be_trained_again(project: Project) -> None:
    assert "--retrain takes targets" in project.forge("build", "--retrain", "preset.export", code=2).err
    assert "no target" in project.forge("build", "--dry-run", "--retrain", "nosuch", code=2).err


def test_a_dry_run_takes_the_way_of_the_real_one(built: Project) -> None:
    built.trained()
    assert "to build" in built.forge("build", "--dry-run", "--retrain", "c").out
    assert built.trained() == []


def test_plan_refuses_what_build_refuses(project: Project) -> None:
    project.edit(
        "[preset]", '[textual_inversion.word]\non = "base"\ndataset = "drawings"\ntoken = "<other>"\n\n[preset]'
    )
    project.edit('checkpoint = "c"', 'checkpoint = "c"\ninsert = ["word"]')
    said = [project.forge(command, code=2).err for command in ("check", "plan", "build")]
    assert said[0] == said[1] == said[2]
    assert "names the token" in said[0]


def test_show_looks_for_files_where_it_works(project: Project) -> None:
    ran = project.forge("-C", "recipes", "show", "../base/unet/diffusion_pytorch_model.safetensors")
    assert "sha256" in ran.out
    (project.root / "a").mkdir()
    assert "has not been made yet" in project.forge("show", "a", code=2).err


def test_what_was_skipped_is_an_event(project: Project) -> None:
    project.edit("rank = 8", "rank = 8\nfails = true")
    ran = project.build(code=1)
    assert [event["target"] for event in ran.of("action") if event["state"] == "skipped"] == [
        "toy:b",
        "toy:c",
        "toy:preset.export",
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["list"],
        ["list", "--methods"],
        ["list", "--families"],
        ["list", "--sources"],
        ["graph"],
        ["lock"],
        ["show", "a"],
    ],
)
def test_json_is_json_with_a_version_and_an_event(command: list[str], built: Project) -> None:
    for line in built.forge(*command, "--json").out.splitlines():
        event = json.loads(line)
        assert event["v"] == 1
        assert event["event"]


def test_a_digest_that_is_printed_is_the_one_in_the_lock(project: Project) -> None:
    project.edit("[preset]", '[halves.mix]\nfirst = "base"\nsecond = "a"\n\n[preset]')
    project.edit('checkpoint = "c"', 'checkpoint = "mix"')
    printed = project.forge("build").out
    line = next(line for line in printed.splitlines() if "halves" in line and "built" in line)
    locked = tomllib.loads(project.lock)["target"]["toy:mix"]["digest"]
    assert locked[:8] in line
    assert locked[:8] in project.forge("plan").out
    assert locked in project.forge("show", "mix").out


def test_log_says_where_nothing_has_run(project: Project) -> None:
    assert "nothing of toy has run here" in project.forge("log").out


def test_log_tells_of_a_training_that_was_stopped_and_of_one_with_other_settings(built: Project) -> None:
    built.edit("rank = 5", "rank = 7")
    said = built.forge("log", "c").out
    assert "other settings" in said
    assert "10 steps" in said


def test_log_counts_a_step_once_of_a_training_that_was_killed_and_went_on(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.recipe.write_text('family = "sd15"\n[lora.a]\non = "base"\ndataset = "drawings"\n')
    session = open_session(project.root)
    step = session.plan(session.resolve(["toy:a"])).steps["toy:a"]
    folder = state_folder(session, step, step.content_manifest or step.manifest)
    folder.mkdir(parents=True)
    rows = [json.dumps({"step": i, "loss": float(i)}) for i in (1, 2, 3, 2, 3, 4)]
    (folder / "metrics.jsonl").write_text("\n".join([*rows[:3], '{"step": 4, "lo', *rows[3:], '{"step"']))
    assert main(["-C", str(project.root), "log", "toy:a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["losses"] == [1.0, 2.0, 3.0, 4.0]


# -- links and names ---------------------------------------------------------------------------------------------------


def test_a_recipe_behind_a_link_that_leads_out_is_not_read(project: Project, tmp_path: Path) -> None:
    (tmp_path / "secret.toml").write_text("password of mine\n")
    (project.root / "recipes" / "z.toml").symlink_to(tmp_path / "secret.toml")
    said = project.forge("plan", "z", code=2).err
    assert "leads out of the project" in said
    assert "password" not in said


@pytest.mark.parametrize(
    ("training", "needed"), [("dreambooth.d]\nprompt = 'a sks cat'", False), ("fine_tune.d]", True)]
)
def test_pictures_without_captions_are_named_where_captions_are_read(
    training: str, needed: bool, project: Project
) -> None:
    for text in (project.root / "drawings").glob("*.txt"):
        text.unlink()
    project.recipe.write_text(
        f'family = "sd15"\n[{training}\non = "base"\ndataset = "drawings"\n[preset]\ncheckpoint = "d"\n'
    )
    assert ("pictures of `drawings` have no caption" in project.forge("check").err) == needed


def test_a_build_says_beforehand_what_may_be_a_mistake_of_what_it_trains(project: Project) -> None:
    (project.root / "drawings" / "wave.gif").write_bytes(b"GIF89a")
    said = [event["text"] for event in project.build().of("note")]
    (text,) = (text for text in said if "wave.gif" in text)  # once, though three trainings take the data set
    assert text == "recipes/toy.toml:5:11: 1 picture in `drawings` is passed over: wave.gif"
    project.edit("rank = 5", "rank = 4")
    said = [event["text"] for event in project.build().of("note")]
    assert [text.partition(": ")[0] for text in said if "wave.gif" in text] == ["recipes/toy.toml:15:11"]


@pytest.mark.parametrize("place", ["drawings/zz.png", "drawings/0.txt", "base/unet/config.json"])
def test_a_source_does_not_reach_out_through_a_link(place: str, project: Project, tmp_path: Path) -> None:
    path = project.root / place
    outside = tmp_path / path.name
    (path if path.exists() else project.root / "drawings" / "0.png").rename(outside)
    path.symlink_to(outside)
    said = project.forge("plan", code=2).err
    assert "is a link that leads out of the project" in said
    (project.root / "forge.local.toml").write_text(f'folders = ["{tmp_path}"]\n')
    project.forge("plan")


def test_two_presets_of_one_name_do_not_share_a_file(project: Project) -> None:
    """LoRAs of one name from two recipes become two files, and the next build has nothing to do."""
    lora = '[lora.s]\non = "base"\ndataset = "drawings"\nrank = {rank}\nsteps = 1\nbatch = 1\nprecision = "fp32"\n'
    recipe = 'family = "sd15"\n' + lora
    (project.root / "recipes" / "o.toml").write_text(recipe.format(rank=2))
    preset = '[preset]\ncheckpoint = "base"\nbake = { s = 1.0, "o:s" = 0.5 }\nexport = ["loras"]\n'
    (project.root / "recipes" / "k.toml").write_text(recipe.format(rank=3) + preset)
    project.forge("build", "k")
    assert sorted(p.name for p in (project.root / "out" / "k" / "loras").glob("*.safetensors")) == [
        "o.s.safetensors",
        "s.safetensors",
    ]
    assert "nothing to do" in project.forge("build", "k").out


# -- what no training can do -------------------------------------------------------------------------------------------


def test_a_schedule_that_ends_in_noise_wants_v_prediction(project: Project) -> None:
    config = project.root / "base" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rescale_betas_zero_snr": True}))
    said = project.forge("check", code=2).err
    assert "zero terminal SNR" in said
    project.edit('from = "base"', 'from = "base"\nprediction = "v_prediction"', "forge.toml")
    project.forge("check")


def test_a_warm_up_as_long_as_the_training_is_remarked(project: Project) -> None:
    project.edit("rank = 8", "rank = 8\nsteps = 5\nwarmup = 9")
    assert "the warm-up of 9 steps is as long as the training, 5" in project.forge("check").err
