"""A user's own reward: `module:function`, imported in the reward worker.

The function is called with keywords, those of them that it takes:

    completion   what the model answered
    answer       the row's reference answer, "" if it has none
    prompt       the question: the last user message
    messages     the whole chat that was asked, a list of {role, content}
    row          every column of the row, as a dict
    tokens       the completion's length in tokens

and returns a number, or a dict of numbers, whose sum is the part's value and each of which is logged.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from shared.config.load import RecipeError
from shared.config.schema import PythonPart
from shared.rewards.base import PartFunction, Sample

KEYWORDS = ("completion", "answer", "prompt", "messages", "row", "tokens")


def load_function(part: PythonPart) -> PartFunction:
    """The user's function as a part. RecipeError if it cannot be imported, or cannot be called as above."""
    module_name, _, name = part.function.partition(":")
    folder = Path(part.path).expanduser().absolute() if part.path else Path.cwd()
    module = _import(part, module_name, folder)
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; define it there: def {name}(completion, answer, **_): ..."
        raise RecipeError(f"reward part {part.name!r}: {module.__file__} has no function {name!r}{hint}")
    wanted = _keywords(part, function)
    here = os.getpid()

    def call(sample: Sample) -> object:
        row = sample.judge.row(sample.row)
        asked = [message["content"] for message in row.messages if message["role"] == "user"]
        given = {
            "completion": sample.completion,
            "answer": row.answer,
            "prompt": asked[-1] if asked else "",
            "messages": [dict(message) for message in row.messages],
            "row": dict(row.columns),
            "tokens": sample.tokens,
        }
        try:
            return function(**{key: given[key] for key in wanted})
        finally:
            if os.getpid() != here:  # it forked, and this is the copy: there is one worker, and it is not this
                print(f"reward part {part.name!r} forked a process that came back: it is ended", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)

    return call


def _import(part: PythonPart, name: str, folder: Path) -> ModuleType:
    top = name.partition(".")[0]
    # last, so that no file of the user's hides a module of the standard library or of this project
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()
    try:
        found = importlib.util.find_spec(top)
    except ValueError:  # a module that was made by hand
        found = None
    meant = next((path for path in (folder / f"{top}.py", folder / top) if path.exists()), None)
    origin = Path(found.origin).absolute() if found is not None and found.origin is not None else None
    if meant is not None and origin is not None and not origin.is_relative_to(folder):
        raise RecipeError(
            f"reward part {part.name!r}: the name {top!r} of {meant} is taken by {origin}; rename the file"
        )
    try:
        return importlib.import_module(name)
    except BaseException as error:  # foreign code may even raise SystemExit
        if isinstance(error, ModuleNotFoundError) and error.name in (name, top):
            raise RecipeError(
                f"reward part {part.name!r}: no module {error.name!r} in {folder}, nor among the packages of "
                f"{sys.executable}; put {name.replace('.', '/')}.py there, or name its folder with `path`"
            ) from error
        raise RecipeError(
            f"reward part {part.name!r}: importing {name!r} from {origin or folder} failed: {what_was_raised(error)}; "
            "mend the module, or install what it needs"
        ) from error


def _keywords(part: PythonPart, function: Callable[..., object]) -> tuple[str, ...]:
    """The keywords that the function takes. RecipeError if it wants another one, or answers later."""
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise RecipeError(
            f"reward part {part.name!r}: {part.function} is async or a generator; make it return a number"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have none
        return KEYWORDS
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        taken: tuple[str, ...] = KEYWORDS
    else:
        taken = tuple(parameter.name for parameter in parameters if parameter.name in KEYWORDS)
    for parameter in parameters:
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        if needed and parameter.kind is not parameter.VAR_KEYWORD and not (named and parameter.name in KEYWORDS):
            raise RecipeError(
                f"reward part {part.name!r}: {part.function} wants a parameter {parameter.name!r}, but is called with "
                f"the keywords {', '.join(KEYWORDS)}; rename it, or give it a default"
            )
    return taken


def what_was_raised(error: BaseException) -> str:
    """An exception in one line, with the place that raised it."""
    if isinstance(error, SystemExit):
        said = f"it called sys.exit({error.code!r})"
    else:
        said = f"it raised {type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{said} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else said
