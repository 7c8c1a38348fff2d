"""`forge`: arguments → one function per command. Errors end here, as one sentence with its exit code."""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sdforge.arguments import SOMETHING_TO_DO, options, parser
from sdforge.errors import ActionFailed, ForgeError, Interrupted, LostObject, RecipeError, ResourceError, UsageError
from sdforge.hidden import hidden
from sdforge.interrupts import raised

if TYPE_CHECKING:
    from sdforge.plan import Plan
    from sdforge.session import Session

LARGE = 200  # steps of a plan that is worth remembering for itself


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    gc.disable()  # planning makes no circles, and many things that live to its end
    if None in (sys.stdin, sys.stdout, sys.stderr):
        _reopen()
    wishes = parser().parse_args(arguments)
    if getattr(wishes, "debug", False):
        return run(wishes)
    # a builder that SIGHUP ends leaves its worker, which keeps its state
    hangup = () if wishes.command in ("build", "grid") else (signal.SIGHUP,)
    came: list[int] = []
    try:
        with raised(signal.SIGINT, signal.SIGTERM, *hangup) as came:
            return run(wishes)
    except RecipeError as error:
        from sdforge.report.problems import show_problems

        show_problems(error.problems, as_json=wishes.json)
        return error.exit_code
    except ForgeError as error:
        return complain(error, as_json=wishes.json)
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and not came:
            raise
        return complain(_interrupted(came), as_json=wishes.json)
    except BrokenPipeError:
        return _unread()
    except Exception as error:
        return complain(_interrupted(came) if came else unforeseen(error, Path(wishes.at)), as_json=wishes.json)


def complain(error: ForgeError, *, as_json: bool = False) -> int:
    """Say what went wrong; return the exit code. Where nothing can be written, the code alone says it."""
    code = error.code if isinstance(error, Interrupted) else error.exit_code
    for json_ in dict.fromkeys([as_json, False]):  # who cannot write to the one stream may be able to to the other
        with suppress(OSError):
            _say_error(error, code, as_json=json_)
            break
    return code


def _interrupted(signals: list[int]) -> Interrupted:
    return Interrupted("interrupted", signal=signals[0] if signals else signal.SIGINT)


def _reopen() -> None:
    """Open what the caller has closed (`>&-`): the next file would be opened in its place, and be written to."""
    import os

    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != fd:
                os.dup2(nothing, fd)
                os.close(nothing)
            os.set_inheritable(fd, True)
            setattr(sys, name, os.fdopen(fd, "r" if fd == 0 else "w", encoding="utf-8", closefd=False))


def _unread() -> int:
    """Return the exit code where nobody reads what is said any more, as behind `| head`: SIGPIPE's, nothing is done."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written when the interpreter ends
    return 128 + signal.SIGPIPE


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
        from sdforge.store.files import FULL, MAKE_ROOM

        where = f" ({error.filename})" if error.filename else ""
        return ResourceError(f"{error.strerror}{where}", MAKE_ROOM if error.errno in FULL else "")
    if isinstance(error, MemoryError):
        return ResourceError("this machine is out of memory", "end other programs; what is done is kept")
    place = folder / ".forge" / "log" / "unforeseen.txt"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(hidden(traceback.format_exc()))
        hint = f"this is a mistake in forge; {place} says where"
    except OSError:
        hint = "this is a mistake in forge; --debug shows where"
    return ActionFailed(f"{type(error).__name__}: {error}", hint)


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

    return build_for_real(session, wanted, made, wishes)


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
    if not wishes.json:
        _say([f"  recipes/{name}.toml is how {path.name} was made"])
    session.store.close()
    wishes.targets = [name]
    code = build(wishes)
    if code == 0:
        tell(session, name, path, as_json=wishes.json)
    return code


def _nothing_to_do(session: Session, made: Plan, wishes: argparse.Namespace) -> int:
    from sdforge.report.table import nothing_as_json, nothing_to_do
    from sdforge.verdict import keep

    chronicle = session.chronicle
    if chronicle.moved or not all(chronicle.past(step.node.recipe.name).keys for step in made.steps.values()):
        from sdforge.chapters import remember

        remember(session, made, {}, {})  # of a project that was moved, or has lost what was remembered
    words = nothing_to_do(made)
    with suppress(ResourceError):  # a project that was moved here, or copied: what it needs stays in the cache
        session.store.register(session.project.root)
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
    from sdforge.resources import asked_there

    asked = asked_there(session, made, wishes.on, getattr(wishes, "device", "")) if wishes.on else {}
    show_plan(session, made, as_json=wishes.json, blocks=wishes.blocks, asked=asked)
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
        samples = Path(wishes.at) / wishes.samples if wishes.samples else None
        looking.log(session, wishes.target, samples, as_json=wishes.json)
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
    """Return the file that `show` is to look at; a plain word is a target before it is a folder.

    Raises UsageError where a path leads to nothing.
    """
    from sdforge.names import is_path
    from sdforge.store.files import refuse_nothing, stat_of

    path: Path = Path(wishes.at) / wishes.target
    if is_path(wishes.target):
        refuse_nothing(path)
    if stat_of(path) is None:
        return None
    plain = "/" not in wishes.target and "." not in wishes.target
    if path.is_file() or (path.exists() and not plain):
        return path
    return path if path.is_dir() and not _is_target(wishes) else None


def _is_target(wishes: argparse.Namespace) -> bool:
    """Say whether a word names a target, or a recipe that has mistakes."""
    try:
        return bool(_open(wishes).resolve([wishes.target]))
    except RecipeError:
        return True
    except UsageError:
        return False


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
        completion(wishes.shell, options())
    return 0
