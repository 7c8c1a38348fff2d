"""What can go wrong, each with its exit code and one sentence that names the thing, the place and the way out."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from sdforge.hidden import hidden


class Place(NamedTuple):
    """Where in a text file: `line` and `column` count from 1; `length` is how many characters the caret covers."""

    file: str
    line: int = 0
    column: int = 0
    length: int = 1
    text: str = ""  # the line itself, for the caret

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class Problem(NamedTuple):
    """One thing that is wrong (or, as a warning, odd) in what a person wrote.

    code: short and stable, for scripts: `unknown-setting`, `family`, `cycle`, …
    hint: what to do about it, or what was probably meant.
    """

    code: str
    message: str
    place: Place | None = None
    hint: str = ""
    warning: bool = False

    def shown(self) -> Problem:
        """Return it as people may see it, without secrets."""
        place = self.place._replace(text=hidden(self.place.text)) if self.place else None
        return self._replace(message=hidden(self.message), place=place, hint=hidden(self.hint))


class ForgeError(Exception):
    """Base of every failure that a person may see. Raised where the mistake is known, printed once, in `cli`.

    message: one sentence that names the thing and the place; hint: the way out. Secrets are hidden in both.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = hidden(message), hidden(hint)
        super().__init__(self.message)


class ActionFailed(ForgeError):
    """An action did not end well: an error in it, NaN or Inf, an input that keeps changing. log: path of its log."""

    def __init__(self, message: str, hint: str = "", log: str = "") -> None:
        super().__init__(message, hint)
        self.log = log


class CheckFailed(ForgeError):
    """A preset's pictures are not what its recipe expects of them; its files are not written."""


class UsageError(ForgeError):
    """Text, names, kinds or files that can never work as they are; the command line itself."""

    exit_code = 2


class SettingErrors(UsageError):
    """Several settings of one table that do not fit. found: (the key in the table, message, hint) of each."""

    def __init__(self, found: list[tuple[str, str, str]]) -> None:
        super().__init__("; ".join(message for _, message, _ in found), found[0][2])
        self.found = found


GET_AGAIN = "get the file again, or take that part of another one with [swap.NAME]"  # a source that holds NaN or Inf


class InputError(UsageError):
    """One of a formula's inputs that does not fit. name: what the recipe calls it."""

    def __init__(self, name: str, message: str, hint: str = "") -> None:
        super().__init__(f"`{name}`: {message}", hint)
        self.name = name


class RecipeError(UsageError):
    """All that is wrong in recipes and `forge.toml`, together."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = problems


class BrokenPromise(ForgeError):
    """Something differs from what a hash, the lock or the store promised, or a pinned result is not to be had."""

    exit_code = 3


class LostObject(BrokenPromise):
    """An object of the store is damaged or not there. sha256: its name."""

    def __init__(self, message: str, sha256: str) -> None:
        super().__init__(message)
        self.sha256 = sha256


class ResourceError(ForgeError):
    """Disk, memory, device or network is missing or full."""

    exit_code = 4


class BusyError(ForgeError):
    """Somebody else is at work, and we were asked not to wait."""

    exit_code = 5


class Interrupted(ForgeError):
    """Stopped by a signal; what was done is kept."""

    def __init__(self, message: str, hint: str = "", signal: int = 2) -> None:
        super().__init__(message, hint)
        self.code = 128 + signal


def exit_code(errors: list[ForgeError]) -> int:
    """One exit code for several failures: an interrupt first, then 3 before 4 before 5 before 1 (2 stands alone)."""
    codes = [error.code if isinstance(error, Interrupted) else error.exit_code for error in errors]
    for code in (143, 130, 2, 3, 4, 5, 1):
        if code in codes:
            return code
    return max(codes, default=0)


def nearest(word: str, words: list[str] | set[str] | tuple[str, ...]) -> str:
    """Return the one of `words` that `word` was probably meant to be, or nothing. Capitals are no difference."""
    import difflib  # only when something is wrong already

    small = {each.lower(): each for each in sorted(words)}
    found = difflib.get_close_matches(word.lower(), list(small), n=1, cutoff=0.6)
    return small[found[0]] if found else ""


def counted(count: int, word: str) -> str:
    """Return how many there are of something: `1 checkpoint`, `2 checkpoints`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
