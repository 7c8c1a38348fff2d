"""What `forge` takes on its command line: one parser, with every command and its options."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from sdforge import __version__
from sdforge.errors import nearest
from sdforge.places import DEVICE

Command = Callable[[str, str], argparse.ArgumentParser]  # name, what it does → its arguments
SOMETHING_TO_DO = 10  # the exit code that `--exit-code` asks for
FIRST = "For the first time: `forge init mine` makes a project with a demo, and says what comes next."


class Parser(argparse.ArgumentParser):
    """A parser that guesses what was meant by a word that it does not know, and shows its help where none was said."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: COMMAND"):
            self.print_help(sys.stderr)
            self.exit(2)
        if found := re.search(r"argument COMMAND: invalid choice: '([^']*)' \(choose from (.*)\)", message):
            guess = nearest(found[1], re.findall(r"'([^']+)'", found[2]))
            hint = f"did you mean `forge {guess}`?" if guess else "`forge --help` lists them"
            self.exit(2, f"error: there is no command {found[1]!r}\nhint: {hint}\n")
        if found := re.search(r"unrecognized arguments: (--[a-z-]+)", message):
            having = [name for name, known in options().items() if found[1] in known]
            guess = nearest(found[1], {option for known in options().values() for option in known})
            hint = f"it belongs to {', '.join(having)}; " if having else f"did you mean {guess}? " if guess else ""
            here = " here" if having else ""
            self.exit(2, f"error: there is no option {found[1]}{here}\nhint: {hint}`forge COMMAND --help` lists them\n")
        super().error(message)


def parser() -> Parser:
    """Return the command line."""
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="for programs: JSON")
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    top = Parser(prog="forge", description="make for Stable Diffusion models", epilog=FIRST)
    top.add_argument("--version", action="version", version=f"forge {__version__}")
    top.add_argument("-C", dest="at", metavar="DIR", default=".", help="work in this folder")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, prog="forge")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    for add in (_building, _trying, _pinning, _looking, _keeping):
        add(command)
    return top


def _building(command: Command) -> None:
    """Add the commands about what is made."""
    build = command("build", "bring targets up to date, and write a preset's files")
    build.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help="a recipe, RECIPE@VARIANT, RECIPE:NAME, a name that is unique, a file",
    )
    build.add_argument("-j", "--jobs", type=_count, default=0, help="actions side by side; with --on: jobs there")
    build.add_argument("--device", type=_device, default=None, help="auto, cpu, cuda or cuda:N")
    build.add_argument(
        "--on", default="", metavar="CLUSTER", help="where jobs run: slurm, slurm:PARTITION, ray, ray://HOST:PORT"
    )
    build.add_argument("--vram", default="", help="what a training may use of the device's memory, as 8GB")
    build.add_argument(
        "-k", "--keep-going", action="store_true", help="after a failure, go on with what does not need it"
    )
    build.add_argument("-n", "--dry-run", action="store_true", help="only say what would be done (as `plan`)")
    build.add_argument("--locked", action="store_true", help="refuse whatever the lock does not hold")
    build.add_argument(
        "--retrain", action="append", default=[], metavar="TARGET", help="make a result again, and pin it"
    )
    build.add_argument("--no-checks", action="store_true", help="write a preset unchecked; its preset.json says so")
    build.add_argument(
        "--allow-commands", action="store_true", help="let commands of checks run: only for recipes that you have read"
    )
    build.add_argument("--plain", action="store_true", help="plain lines, also on a terminal")
    build.add_argument("--no-wait", action="store_true", help="do not wait for another build (exit code 5)")
    build.add_argument(
        "--remote", choices=("read", "write", "off"), default="", help="how the cache that [remote] names is used"
    )
    build.add_argument("--offline", action="store_true", help="open no connection: the same as --remote=off")
    plan = command("plan", "say what a build would do, and why")
    plan.add_argument("targets", nargs="*", metavar="TARGET")
    plan.add_argument("--locked", action="store_true", help="refuse whatever the lock does not hold")
    plan.add_argument("--no-checks", action="store_true", help="as `build --no-checks` would")
    plan.add_argument("--on", default="", metavar="CLUSTER", help="what each job would ask for there")
    plan.add_argument("--blocks", action="store_true", help="what weight each block gets of merges and bakes")
    plan.add_argument(
        "--exit-code", action="store_true", help=f"exit with {SOMETHING_TO_DO} if there is something to do"
    )
    plan.add_argument("--remote", choices=("read", "off"), default="", help="whether that cache is asked what it has")
    plan.add_argument("--offline", action="store_true", help="open no connection: the same as --remote=off")


def _trying(command: Command) -> None:
    """Add the commands that say or draw what would be made."""
    grid = command("grid", "draw a preset with other settings, as one picture with axes; the recipe stays as it is")
    grid.add_argument("preset", metavar="RECIPE")
    grid.add_argument(
        "--x", required=True, metavar="SETTING=VALUES", help='across: as in "inked.loras.pastel.strength=0.4,0.6,0.8"'
    )
    grid.add_argument("--y", default="", metavar="SETTING=VALUES", help="down; default: the seeds of the previews")
    grid.add_argument("--cell", default="", metavar="COLUMN,ROW", help="only print this cell as a variant, to be kept")
    grid.add_argument("-n", "--dry-run", action="store_true", help="only say what would be done")
    grid.add_argument("-j", "--jobs", type=_count, default=0, help="actions side by side")
    grid.add_argument("--device", type=_device, default=None, help="auto, cpu, cuda or cuda:N")
    grid.add_argument("--plain", action="store_true", help="plain lines, also on a terminal")
    why = command("why", "say why a target would be made, or is reused")
    why.add_argument("targets", nargs="+", metavar="TARGET")
    check = command("check", "find mistakes in recipes; nothing runs")
    check.add_argument("recipes", nargs="*", metavar="RECIPE")


def _pinning(command: Command) -> None:
    """Add the commands about what is pinned, and where it comes from or goes."""
    lock = command("lock", "pin sources and results that are there")
    lock.add_argument("--take", metavar="DIGEST", help="of two results of the same inputs, pin this one")
    lock.add_argument(
        "--update", action="store_true", help="pin anew what sources from elsewhere are now, and what is here"
    )
    lock.add_argument("--offline", action="store_true", help="open no connection")
    lock.add_argument("--prune", action="store_true", help="drop results that no recipe reaches")
    fetch = command("fetch", "bring sources here that come from elsewhere, and results that the lock pins")
    fetch.add_argument("sources", nargs="*", metavar="SOURCE|RECIPE", help="default: all of them")
    fetch.add_argument(
        "--offline", action="store_true", help="open no connection: link what this machine has, and name the rest"
    )
    push = command("push", "put trained results that the lock pins into the remote cache")
    push.add_argument("targets", nargs="*", metavar="TARGET", help="default: all that the lock pins")
    push.add_argument("--key", default="", metavar="FILE", help="sign what is put there with this Ed25519 key")
    push.add_argument("--verify", action="store_true", help="read back what lies there; put anew what is wrong")
    sign = command("sign", "sign forge.lock: FILE.sig beside it, as `ssh-keygen -Y sign` would")
    sign.add_argument("--key", required=True, metavar="FILE", help="a private key of `ssh-keygen -t ed25519`")
    pull = command("pull", "bring results that the lock pins here from the remote cache")
    pull.add_argument("targets", nargs="*", metavar="TARGET", help="default: all that the lock pins")
    bring = command("import", "write the recipe that does what another program's file says")
    bring.add_argument(
        "file", metavar="FILE", help="of kohya's scripts, sd-mecha or mergekit, or a list of block weights"
    )
    bring.add_argument("--name", default="", help="of the recipe; else after the file")
    bring.add_argument("--family", default="", help="where the file does not tell")
    bring.add_argument("--checkpoints", default="", metavar="A,B", help="what a list of block weights merges")
    bring.add_argument("-n", "--dry-run", action="store_true", help="only print the recipe")
    install = command("install", "put a preset's files where another program looks for them")
    install.add_argument("preset", metavar="PRESET")
    install.add_argument(
        "--into",
        required=True,
        metavar="PROGRAM:PATH",
        help="comfyui, a1111, forge, sdnext or invokeai, and its folder",
    )
    install.add_argument("--undo", action="store_true", help="remove exactly what was put there")
    install.add_argument("--copy", action="store_true", help="copy; else files are cloned or linked where that works")
    install.add_argument("-n", "--dry-run", action="store_true", help="only say what would be done")
    add = command("add", "write a source or a data set into forge.toml")
    add.add_argument("name", metavar="NAME", help="how recipes call it")
    add.add_argument(
        "reference",
        metavar="REF",
        help="a path (pictures too), hf://ORG/REPO@REVISION/FILE, https://…, a page of civitai.com, an AIR",
    )
    add.add_argument("--sha256", default="", help="of the file; it is then this file or none")
    add.add_argument("--licence", default="", help="reaches metadata and card of what is made from it")
    add.add_argument("--offline", action="store_true", help="open no connection")


def _looking(command: Command) -> None:
    """Add the commands about looking around."""
    listing = command("list", "recipes and the states of their targets")
    listing.add_argument("--methods", action="store_true", help="what targets can be made by")
    listing.add_argument("--families", action="store_true", help="architectures that are known")
    listing.add_argument("--sources", action="store_true", help="what forge.toml declares")
    listing.add_argument(
        "--pictures",
        choices=("auto", "kitty", "iterm", "never"),
        default="auto",
        help="show previews in terminals that can, or by this protocol; never where the output is no terminal",
    )
    listing.add_argument("--names", action="store_true", help="names that commands take, one a line")
    show = command("show", "an artifact's record, or what a safetensors file says of itself")
    show.add_argument("target", metavar="TARGET|FILE")
    show.add_argument("--recipe", action="store_true", help="the recipe by which a preset's file is made again")
    diff = command("diff", "what differs between two presets, builds or files: settings, inputs, tensors, pictures")
    diff.add_argument("a", metavar="A", help="a recipe, a target, a folder of out/, or a model's file")
    diff.add_argument("b", nargs="?", default="", metavar="B", help="default: A now, A being the build before")
    diff.add_argument("--pictures", default="", metavar="FILE.png", help="write their previews side by side")
    diff.add_argument("--exit-code", action="store_true", help=f"exit with {SOMETHING_TO_DO} if there is a difference")
    convert = command("convert", "write a file or folder in another form; nothing is overwritten")
    convert.add_argument("file", metavar="FILE")
    convert.add_argument("out", metavar="OUT")
    convert.add_argument("--to", default="", metavar="FORM", help="as in `[preset] export`; else by the name of OUT")
    convert.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="", help="round the numbers to this type")
    convert.add_argument("--family", default="", help="for which family it is, where the file does not tell")
    convert.add_argument("--embedding", default="", metavar="NAME", help="take this embedding out of a LoRA's file")
    convert.add_argument("--pickle", choices=("refuse", "allow"), default="refuse", help="whether FILE may be a pickle")
    log = command("log", "the last run of a target, and its losses")
    log.add_argument("target", nargs="?", default="", metavar="TARGET")
    log.add_argument(
        "--samples", default="", metavar="FILE.png", help="write the pictures that were drawn while it ran"
    )
    report = command("report", "write a preset's report and card anew; print where the report lies")
    report.add_argument("preset", nargs="?", default="", metavar="PRESET", help="default: the first of forge.toml")
    graph = command("graph", "what is made from what")
    graph.add_argument("targets", nargs="*", metavar="TARGET")
    graph.add_argument("--format", choices=("mermaid", "dot", "json"), default="mermaid")


def _keeping(command: Command) -> None:
    """Add the commands about keeping house."""
    clean = command("clean", "remove from the cache what no recipe reaches")
    clean.add_argument("-n", "--dry-run", action="store_true", help="only say what would go")
    clean.add_argument("--trained", action="store_true", help="trained results and train states too")
    command("du", "what the cache holds, by kind and for whom")
    verify = command("verify", "hash again what the cache keeps and out/ holds; name what is damaged")
    verify.add_argument("targets", nargs="*", metavar="TARGET", help="only these, and what they are made from")
    verify.add_argument("--signed", action="store_true", help="only whether a trusted key signed forge.lock as it is")
    verify.add_argument(
        "--rebuild", metavar="TARGET", help="make a target again, in a store of its own, and compare the bits"
    )
    command("doctor", "is this machine fit to build: versions, devices, disk, clock, arithmetic")
    schema = command("schema", "write the JSON Schemas of recipes and forge.toml")
    schema.add_argument("--check", action="store_true", help="only say whether they are up to date")
    init = command("init", "make a new project with the demo recipe")
    init.add_argument("folder", nargs="?", default=".", metavar="DIR")
    completion = command("completion", "print a script that completes commands")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 64")
    return int(text)


def _device(text: str) -> str:
    import re

    if not re.fullmatch(DEVICE, text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
    return text


def options() -> dict[str, list[str]]:
    """Return command → its options."""
    actions = next(action for action in parser()._actions if action.dest == "command")
    commands: dict[str, argparse.ArgumentParser] = dict(actions.choices or {})
    return {
        name: sorted(o for action in command._actions for o in action.option_strings if o.startswith("--"))
        for name, command in sorted(commands.items())
    }
