"""`forge`: arguments → one function per command. Errors end here, as one sentence with its exit code."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sdforge import __version__
from sdforge.errors import ActionFailed, ForgeError, Interrupted, LostObject, RecipeError, UsageError
from sdforge.places import DEVICE

if TYPE_CHECKING:
    from sdforge.plan import Plan
    from sdforge.session import Session

Command = Callable[[str, str], argparse.ArgumentParser]  # name, what it does → its arguments
SOMETHING_TO_DO = 10
FIRST = "For the first time: `forge init mine` makes a project with a demo, and says what comes next."
LARGE = 200  # steps of a plan that is worth remembering for itself


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="for programs: JSON")
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    top = argparse.ArgumentParser(prog="forge", description="make for Stable Diffusion models", epilog=FIRST)
    top.add_argument("--version", action="version", version=f"forge {__version__}")
    top.add_argument("-C", dest="at", metavar="DIR", default=".", help="work in this folder")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, prog="forge")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    for add in (_building, _pinning, _looking, _keeping):
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
    build.add_argument("-j", "--jobs", type=_count, default=0, help="actions side by side")
    build.add_argument("--device", type=_device, default=None, help="auto, cpu, cuda or cuda:N")
    build.add_argument(
        "--on", default="", metavar="CLUSTER", help="where trainings run: slurm, slurm:PARTITION, ray, ray://HOST:PORT"
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
    plan.add_argument("--blocks", action="store_true", help="what weight each block gets of merges and bakes")
    plan.add_argument(
        "--exit-code", action="store_true", help=f"exit with {SOMETHING_TO_DO} if there is something to do"
    )
    plan.add_argument("--remote", choices=("read", "off"), default="", help="whether that cache is asked what it has")
    plan.add_argument("--offline", action="store_true", help="open no connection: the same as --remote=off")
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
    fetch.add_argument("--offline", action="store_true", help="open no connection")
    push = command("push", "put trained results that the lock pins into the remote cache")
    push.add_argument("targets", nargs="*", metavar="TARGET", help="default: all that the lock pins")
    push.add_argument("--key", default="", metavar="FILE", help="sign what is put there with this Ed25519 key")
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
    add = command("add", "write a source into forge.toml")
    add.add_argument("name", metavar="NAME", help="how recipes call it")
    add.add_argument(
        "reference", metavar="REF", help="a path, hf://ORG/REPO@REVISION/FILE, https://…, a page of civitai.com, an AIR"
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
    command("doctor", "is this machine fit to build: versions, devices, disk, clock, golden vectors")
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


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    gc.disable()  # planning makes no circles, and many things that live to its end
    wishes = parser().parse_args(arguments)
    if getattr(wishes, "debug", False):
        return run(wishes)
    try:
        return run(wishes)
    except RecipeError as error:
        from sdforge.report.problems import show_problems

        show_problems(error.problems, as_json=wishes.json)
        return error.exit_code
    except ForgeError as error:
        return complain(error, as_json=wishes.json)
    except KeyboardInterrupt:
        return complain(Interrupted("interrupted"), as_json=wishes.json)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        return complain(unforeseen(error, Path(wishes.at)), as_json=wishes.json)


def complain(error: ForgeError, *, as_json: bool = False) -> int:
    """Say what went wrong; return the exit code. Where nothing can be written, the code alone says it."""
    code = error.code if isinstance(error, Interrupted) else error.exit_code
    for json_ in dict.fromkeys([as_json, False]):  # who cannot write to the one stream may be able to to the other
        with suppress(OSError):
            _say_error(error, code, as_json=json_)
            break
    return code


def _say_error(error: ForgeError, code: int, *, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps({"v": 1, "event": "error", "code": code, "message": error.message, "hint": error.hint}))
        return
    from sdforge.report.words import safe

    print(safe(f"error: {error.message}", sys.stderr), file=sys.stderr)
    if error.hint:
        print(safe(f"hint: {error.hint}", sys.stderr), file=sys.stderr)


def unforeseen(error: Exception, folder: Path) -> ForgeError:
    """Keep what is needed to mend a mistake of ours, and say where."""
    import traceback

    if isinstance(error, OSError) and error.errno is not None:
        from sdforge.errors import ResourceError

        return ResourceError(f"{error.strerror} ({error.filename or 'no file'})")
    place = folder / ".forge" / "log" / "unforeseen.txt"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(traceback.format_exc())
        hint = f"this is a mistake in forge; {place} says where"
    except OSError:
        hint = "this is a mistake in forge; --debug shows where"
    return ActionFailed(f"{type(error).__name__}: {error}", hint)


def _options() -> dict[str, list[str]]:
    """Return command → its options."""
    actions = next(action for action in parser()._actions if action.dest == "command")
    commands: dict[str, argparse.ArgumentParser] = dict(actions.choices or {})
    return {
        name: sorted(o for action in command._actions for o in action.option_strings if o.startswith("--"))
        for name, command in sorted(commands.items())
    }


def run(wishes: argparse.Namespace) -> int:
    """Call the command's function."""
    functions: dict[str, Callable[[argparse.Namespace], int]] = {"build": build, "plan": plan}
    return functions.get(wishes.command, other)(wishes)


def _open(wishes: argparse.Namespace) -> Session:
    from sdforge.session import open_session

    if wishes.json:
        return open_session(Path(wishes.at))
    from sdforge.report.hashing import Hashing

    return open_session(Path(wishes.at), Hashing())


def build(wishes: argparse.Namespace) -> int:
    """`forge build`: plan; where there is something to do, do it."""
    if any(target.endswith(".safetensors") for target in wishes.targets):
        return _build_file(wishes)
    if wishes.dry_run:
        wishes.exit_code = wishes.blocks = False
        return plan(wishes)
    if not (wishes.retrain or wishes.json or wishes.no_checks or wishes.allow_commands):
        from sdforge.verdict import recall

        if words := recall(Path(wishes.at), wishes.targets, locked=wishes.locked):
            return _say(words)
    lost: set[str] = set()
    while True:
        session = _open(wishes)
        try:
            return _build(session, wishes)
        except LostObject as error:  # what is damaged has been set aside: all is planned without it, once for each
            if error.sha256 in lost:
                raise
            lost.add(error.sha256)
            session.do_without(error)


def _build(session: Session, wishes: argparse.Namespace) -> int:
    session.locked, session.checked = wishes.locked, not wishes.no_checks
    session.trusting = wishes.allow_commands
    session.share("off" if wishes.offline else wishes.remote)
    wanted = session.resolve(wishes.targets)
    session.want_again(wishes.retrain)
    from sdforge.lockfile import LockFile
    from sdforge.telling import is_told

    made = session.plan(wanted)
    settled = not made.to_do and not session.retrain and LockFile(session).is_settled(made)
    if settled and is_told(session, made) and not lacking_grids(session, made):
        return _nothing_to_do(session, made, wishes)
    from sdforge.commands import build_for_real

    return build_for_real(session, wanted, wishes)


def lacking_grids(session: Session, made: Plan) -> bool:
    """Say whether a grid is to be drawn; what is no variant has none, and need not look."""
    if all(step.node.recipe.name == step.node.recipe.home for step in made.steps.values()):
        return False
    from sdforge.grids import lacking

    return bool(lacking(session, made))


def _build_file(wishes: argparse.Namespace) -> int:
    """Build what a preset's file was made by: its manifests become a recipe of the project."""
    from sdforge.rebuild import tell, write_recipe

    if len(wishes.targets) > 1 or wishes.dry_run:
        raise UsageError("a file is built by itself", hint="`forge show --recipe FILE` shows what would be built")
    session, path = _open(wishes), Path(wishes.at) / wishes.targets[0]
    name = write_recipe(session, path)
    session.store.close()
    wishes.targets = [name]
    code = build(wishes)
    if code == 0:
        tell(session, name, path, as_json=wishes.json)
    return code


def _nothing_to_do(session: Session, made: Plan, wishes: argparse.Namespace) -> int:
    from sdforge.report.table import nothing_as_json, nothing_to_do
    from sdforge.verdict import keep

    words = nothing_to_do(made)
    # after a build, files that were too young are looked at once more; a small plan that writes nothing stays so
    if session.checked and (session.store.index.wrote or len(made.steps) > LARGE):
        keep(session, made, wishes.targets, words)
    if wishes.json:
        nothing_as_json(made)
        return 0
    return _say(words)


def _say(words: list[str]) -> int:
    from sdforge.report.words import safe

    print(safe("\n".join(words), sys.stdout))
    return 0


def plan(wishes: argparse.Namespace) -> int:
    """`forge plan`: say what a build would do."""
    session = _open(wishes)
    session.locked, session.checked = wishes.locked, not wishes.no_checks
    session.share("off" if wishes.offline else wishes.remote)
    wanted = session.resolve(wishes.targets)
    session.want_again(getattr(wishes, "retrain", []))
    made = session.plan(wanted)
    if made.to_do:
        from sdforge.advice import refuse_mistakes

        refuse_mistakes(session, made)
    from sdforge.commands import show_plan

    show_plan(session, made, as_json=wishes.json, blocks=wishes.blocks)
    return SOMETHING_TO_DO if wishes.exit_code and (made.to_do or lacking_grids(session, made)) else 0


def other(wishes: argparse.Namespace) -> int:
    """The commands that are not called a hundred times a day."""
    name = wishes.command
    if name in ("schema", "init", "completion", "doctor"):
        return _without_project(wishes)
    if name == "convert":
        from sdforge.convert import convert

        return convert(wishes)
    if name == "add":
        from sdforge.fetch.command import add

        return add(wishes)
    if name == "show":
        return _show(wishes)
    functions = {
        **dict.fromkeys(("fetch", "push", "pull", "sign", "install", "import"), _exchange),
        **dict.fromkeys(("why", "check", "lock", "grid"), _tell),
        **dict.fromkeys(("clean", "du", "verify"), _keep_house),
        **dict.fromkeys(("list", "log", "graph", "diff", "report"), _look),
    }
    return functions[name](_open(wishes), wishes)


def _show(wishes: argparse.Namespace) -> int:
    path = _shown_file(wishes)
    if wishes.recipe:
        from sdforge.rebuild import show_recipe

        show_recipe(_open(wishes), Path(wishes.at) / wishes.target, as_json=wishes.json)
    elif path is not None:
        from sdforge.describe import show_file

        show_file(path, as_json=wishes.json)
    else:
        from sdforge.looking import show

        show(_open(wishes), wishes.target, as_json=wishes.json)
    return 0


def _exchange(session: Session, wishes: argparse.Namespace) -> int:
    if wishes.command == "fetch":
        from sdforge.fetch.command import fetch

        return fetch(session, wishes)
    if wishes.command == "install":
        from sdforge.install.command import install

        return install(session, wishes)
    if wishes.command == "import":
        from sdforge.imports.command import import_recipe

        return import_recipe(session, wishes)
    import sdforge.exchange as exchange

    functions = {"push": exchange.push, "pull": exchange.pull, "sign": exchange.sign_lock}
    return functions[wishes.command](session, wishes)


def _tell(session: Session, wishes: argparse.Namespace) -> int:
    if wishes.command == "grid":
        from sdforge.trial import grid

        return grid(session, wishes)
    import sdforge.commands as found

    if wishes.command == "check":
        return found.check(session, wishes.recipes, as_json=wishes.json)
    if wishes.command == "lock":
        return found.lock(session, wishes)
    return found.why(session, wishes.targets, as_json=wishes.json)


def _keep_house(session: Session, wishes: argparse.Namespace) -> int:
    if wishes.command == "verify":
        return _verify(session, wishes)
    if wishes.command == "du":
        from sdforge.disk import show_usage

        show_usage(session, as_json=wishes.json)
        return 0
    from sdforge.housekeeping import clean

    clean(session, wishes)
    if session.project.max_cache:
        from sdforge.bounded import keep_bounded

        keep_bounded(session, as_json=wishes.json, dry_run=wishes.dry_run)
    return 0


def _look(session: Session, wishes: argparse.Namespace) -> int:
    if wishes.command == "diff":
        from sdforge.difference import diff

        return diff(session, wishes)
    import sdforge.looking as looking

    if wishes.command == "list":
        looking.show_list(session, wishes)
    elif wishes.command == "report":
        looking.report(session, wishes.preset, as_json=wishes.json)
    elif wishes.command == "log":
        looking.log(session, wishes.target, wishes.samples, as_json=wishes.json)
    else:
        looking.graph(session, wishes.targets, "json" if wishes.json else wishes.format)
    return 0


def _verify(session: Session, wishes: argparse.Namespace) -> int:
    if wishes.rebuild:
        from sdforge.made_again import rebuild

        return rebuild(session, wishes.rebuild, as_json=wishes.json)
    if wishes.signed:
        from sdforge.exchange import verify_signed

        return verify_signed(session, as_json=wishes.json)
    from sdforge.verify import verify

    return verify(session, wishes.targets, as_json=wishes.json)


def _shown_file(wishes: argparse.Namespace) -> Path | None:
    """Return the file that `show` is to look at; a plain word is a target, even if a folder is called so."""
    path = Path(wishes.at) / wishes.target
    plain = "/" not in wishes.target and "." not in wishes.target
    return path if path.is_file() or (path.exists() and not plain) else None


def _without_project(wishes: argparse.Namespace) -> int:
    if wishes.command == "doctor":
        from sdforge.doctor import doctor

        return doctor(Path(wishes.at), as_json=wishes.json)
    from sdforge.housekeeping import completion, init, write_schemas

    if wishes.command == "schema":
        from sdforge.places import find_root

        return write_schemas(find_root(Path(wishes.at).resolve()), check=wishes.check)
    if wishes.command == "init":
        init(Path(wishes.at) / wishes.folder)
    else:
        completion(wishes.shell, _options())
    return 0
