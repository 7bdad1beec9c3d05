"""``wsgi-bg tasks PATH list|show|retry|discard``: look at durable tasks, and give orders.

The command writes no store: the process that owns a task obeys the order. Names, errors and
arguments come from rows that may be forged, so that characters that are not printable are
escaped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from wsgi_bg._messages.codec import describe
from wsgi_bg._process.printable import printable
from wsgi_bg._serving.output import cell, local_time, moment, say, table
from wsgi_bg._serving.usage import Parser, UsageError
from wsgi_bg._store.folder import Folder, check_folder
from wsgi_bg._store.inspection import ORDERS, Found, is_used, list_tasks, order
from wsgi_bg._store.rows import Outcome
from wsgi_bg.exceptions import StoreError

PAUSE = 0.05
"""Seconds between two looks whether orders were obeyed. The owner looks once a second."""

MAX_LOOKS = 100
"""The number of looks without progress after which the command waits no longer."""

_DESCRIPTION = """\
Look at the durable tasks in the folder PATH, run failed ones again, or discard them. All of
that is safe while processes use the folder. The exit status is 0 if the command did what was
asked, 1 if no task matched or a task was refused, and 2 for a wrong command or folder.
"""

_STATES = ("waiting", "running", "failed", "aside", "done")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status.

    :param arguments: those behind ``wsgi-bg tasks``.
    """
    try:
        given = _parser().parse_args(arguments)
        folder = _folder(given.path)
        if given.action == "list":
            return _list(folder, given)
        if given.action == "show":
            return _show(folder, given)
        return _give_orders(folder, given)
    except (UsageError, StoreError, OSError) as exc:
        _complain(exc)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="wsgi-bg tasks", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("path", metavar="PATH", help="the folder of a DurableRunner")
    actions = parser.add_subparsers(
        dest="action", metavar="list|show|retry|discard", required=True
    )
    texts = {
        "list": "show names, states, times and classes of errors",
        "show": "show everything about tasks: messages, tracebacks and arguments, too",
        "retry": "run failed tasks, and tasks that were put aside, again",
        "discard": "drop tasks that failed, were put aside or wait",
    }
    for action, text in texts.items():
        each = actions.add_parser(
            action,
            prog=f"wsgi-bg tasks PATH {action}",
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            allow_abbrev=False,
        )
        if action in ("list", "show"):
            each.add_argument("--json", action="store_true", help="print JSON")
        if action == "show":
            each.add_argument("ids", metavar="ID", nargs="+")
        if action in ORDERS:
            each.add_argument("ids", metavar="ID", nargs="*")
            each.add_argument(
                "--all", action="store_true", help=f"{action} all tasks that match the filters"
            )
        if action != "show":
            _add_filters(each, ORDERS.get(action, _STATES))
    return parser


def _add_filters(parser: argparse.ArgumentParser, states: Sequence[str]) -> None:
    parser.add_argument(
        "--name", metavar="PATTERN", help="only functions of that name; * stands for any text"
    )
    parser.add_argument(
        "--state",
        choices=states,
        action="append",
        help=f"only tasks in that state: {', '.join(states)}; may be repeated",
    )
    parser.add_argument(
        "--older-than",
        metavar="AGE",
        type=_age,
        help="only tasks added before that: 90, 90s, 5m, 2h or 7d",
    )
    parser.add_argument(
        "--newer-than", metavar="AGE", type=_age, help="only tasks added since then"
    )


def _age(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([smhd]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age, for instance 90s, 5m, 2h or 7d")
    return float(match[1]) * _UNITS[match[2]]


def _folder(path: str) -> Folder:
    # check_folder() would make the folder.
    if not os.path.isdir(path):
        there = "it is not a folder" if os.path.lexists(path) else "there is no such folder"
        raise StoreError(path, there)
    return check_folder(path)


def _list(folder: Folder, given: argparse.Namespace) -> int:
    found = _matching(folder, given)
    if given.json:
        _say_json(_as_json(task) for task in found)
    elif found:
        say(_table(found))
    else:
        _complain("no task matches")
    _say_who(folder, [task for task in found if task.outcome.state == "waiting"], "runs")
    return 0 if found else 1


def _show(folder: Folder, given: argparse.Namespace) -> int:
    shown = list_tasks(folder, lambda outcome: outcome.row.id in given.ids)
    if given.json:
        _say_json({**_as_json(task), **_secrets_as_json(task)} for task in shown)
    elif shown:
        say("\n\n".join(_block(task) for task in shown))
    _say_who(folder, [task for task in shown if task.outcome.state == "waiting"], "runs")
    return 1 if _complain_about_unknown(given.ids, shown) else 0


def _give_orders(folder: Folder, given: argparse.Namespace) -> int:
    what: str = given.action
    filters = (given.name, given.state, given.older_than, given.newer_than)
    has_filters = any(each is not None for each in filters)
    if given.ids and (given.all or has_filters):
        raise UsageError(f"give either ids or --all with filters to {what}, not both")
    if not given.ids and not given.all:
        raise UsageError(
            f"give the ids of the tasks to {what}, or --all for all that match the filters"
        )
    found = _matching(folder, given)
    if given.ids:
        is_refused = _complain_about_unknown(given.ids, found)
        chosen = found
    else:
        chosen = [task for task in found if task.outcome.state in ORDERS[what]]
        is_refused = not chosen
        if not chosen:
            _complain(f"no task to {what} matches")
        running = sum(task.outcome.state == "running" for task in found)
        if running and what == "discard" and not given.state:
            _complain(f"running tasks, which were left alone: {running}")
    ordered: list[tuple[Found, str]] = []
    for task in chosen:
        try:
            ordered.append((task, order(folder, task, what)))
        except StoreError as exc:
            _complain(exc)
            is_refused = True
    return 1 if not _follow(folder, what, ordered) or is_refused else 0


def _follow(folder: Folder, what: str, ordered: Sequence[tuple[Found, str]]) -> bool:
    """Wait until the orders are obeyed, and print the results; False if an order failed."""
    if not ordered:
        return True
    if not is_used(folder):
        later = "will run again" if what == "retry" else "will be discarded"
        say("\n".join(f"{_title(task)}: {later}" for task, _ in ordered))
        tasks = [task for task, _ in ordered]
        _say_who(folder, tasks, "runs" if what == "retry" else "discards")
        return True
    ignored = _wait(folder, {path for _, path in ordered})
    now: dict[str, list[Found]] = {task.outcome.row.id: [] for task, _ in ordered}
    for task in list_tasks(folder, lambda outcome: outcome.row.id in now, is_brief=True):
        now[task.outcome.row.id].append(task)
    lines = []
    for task, path in ordered:
        if path in ignored:
            _complain(
                f"task {task.outcome.row.id}: its process did not obey within "
                f"{MAX_LOOKS * PAUSE:.0f} seconds; the order stays"
            )
        elif state := _state_if_ignored(what, task, now[task.outcome.row.id]):
            name = task.outcome.row.id
            _complain(f"task {name} is {state} now: the order to {what} came too late")
        else:
            lines.append(f"{_title(task)}: {'runs again' if what == 'retry' else 'discarded'}")
    if lines:
        say("\n".join(lines))
    return len(lines) == len(ordered)


def _wait(folder: Folder, orders: set[str]) -> set[str]:
    """Wait until the orders are obeyed; return those of processes that do not obey."""
    left = orders & set(folder.orders())
    looks = 0
    while left and looks < MAX_LOOKS:
        time.sleep(PAUSE)
        now = left & set(folder.orders())
        looks = looks + 1 if now == left else 0
        left = now
    return left


def _state_if_ignored(what: str, task: Found, now: Iterable[Found]) -> str | None:
    """Return the state of a task whose order had no effect: the task had begun before."""
    for each in now:
        has_ended_again = each.outcome.ended != task.outcome.ended
        if what == "discard" or (each.outcome.state in ORDERS[what] and not has_ended_again):
            return each.outcome.state
    return None


def _matching(folder: Folder, given: argparse.Namespace) -> list[Found]:
    """Return the tasks that have the ids, if ids are given, and match the filters."""
    now = time.time()
    ids = set(getattr(given, "ids", ()))
    parts = () if given.name is None else given.name.split("*")
    name = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)

    def matches(outcome: Outcome) -> bool:
        row = outcome.row
        return (
            (not ids or row.id in ids)
            and (given.name is None or name.fullmatch(row.name) is not None)
            and (given.state is None or outcome.state in given.state)
            and (given.older_than is None or now - row.added >= given.older_than)
            and (given.newer_than is None or now - row.added <= given.newer_than)
        )

    return list_tasks(folder, matches, is_brief=True)


# Output.


def _complain_about_unknown(ids: Iterable[str], found: Iterable[Found]) -> bool:
    """Print a line for each id that no task has; return True if there is such an id."""
    known = {task.outcome.row.id for task in found}
    unknown = [id for id in ids if id not in known]  # noqa: A001
    for id in unknown:  # noqa: A001
        _complain(f"no task has the id {id!r}")
    return bool(unknown)


def _say_who(folder: Folder, tasks: Sequence[Found], does: str) -> None:
    """Print who will run or discard ``tasks`` if no process lives."""
    if tasks and not is_used(folder):
        them = "it" if len(tasks) == 1 else "them"
        _complain(f"no process uses the folder now: the next one that starts {does} {them}")


def _table(found: Iterable[Found]) -> str:
    titles = ("ID", "NAME", "STATE", "ADDED", "DUE", "ENDED", "ATTEMPTS", "CRASHES", "ERROR")
    return table(titles, map(_cells, found))


def _cells(task: Found) -> Sequence[str]:
    outcome, row = task.outcome, task.outcome.row
    return (
        row.id,
        row.name,
        outcome.state,
        local_time(row.added),
        local_time(_due(outcome)),
        local_time(outcome.ended),
        *map(_text_of, _counts(outcome)),
        outcome.error,
    )


def _counts(outcome: Outcome) -> tuple[int | None, int | None]:
    """Attempts that have raised, and crashes; None if the file does not keep them."""
    if outcome.state == "done":
        return None, None
    return outcome.row.attempts, outcome.row.crashes


def _text_of(count: int | None) -> str:
    return "" if count is None else str(count)


def _title(task: Found) -> str:
    return f"{cell(task.outcome.row.id)} {cell(task.outcome.row.name)}"


def _block(task: Found) -> str:
    """Everything about a task; indented, so that no stored text can look like another task."""
    row, state, begun, ended, error, traceback = task.outcome
    attempts, crashes = _counts(task.outcome)
    fields = {
        "name": row.name,
        "state": state,
        "added": local_time(row.added),
        "due": local_time(_due(task.outcome)),
        "begun": local_time(begun),
        "ended": local_time(ended),
        "attempts": _text_of(attempts),
        "crashes": _text_of(crashes),
        "process": "lives" if task.is_owned else "none",
        "error": error,
        "options": row.options,
        "context": row.context,
    }
    lines = [f"task {printable(row.id)}"]
    lines += [
        f"  {name:9} {printable(text)}"
        for name, text in fields.items()
        if text not in ("", "{}")
    ]
    if row.arguments:
        lines += [
            "  arguments",
            *(f"    {printable(text)}" for text in describe(row.arguments)),
        ]
    if traceback:
        lines += ["  traceback", *(f"    {printable(text)}" for text in _lines(traceback))]
    return "\n".join(lines)


def _lines(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n")


def _as_json(task: Found) -> dict[str, Any]:
    row, state, begun, ended, error, _ = task.outcome
    attempts, crashes = _counts(task.outcome)
    return {
        "id": row.id,
        "name": row.name,
        "state": state,
        "added": _utc(row.added),
        "due": _utc(_due(task.outcome)),
        "begun": _utc(begun),
        "ended": _utc(ended),
        "attempts": attempts,
        "crashes": crashes,
        "error": error or None,
        "owned": task.is_owned,
    }


def _secrets_as_json(task: Found) -> dict[str, Any]:
    """Return the parts that only ``show`` shows.

    ``arguments`` is the stored text: JSON, with marks for types that JSON lacks.
    """
    row = task.outcome.row
    return {
        "arguments": row.arguments or None,
        "options": row.options or None,
        "context": row.context or None,
        "traceback": task.outcome.traceback or None,
    }


def _due(outcome: Outcome) -> float:
    return outcome.row.due if outcome.state == "waiting" else 0.0


def _utc(seconds: float) -> str | None:
    time_of_day = moment(seconds)
    return None if time_of_day is None else time_of_day.isoformat()


def _say_json(objects: Iterable[dict[str, Any]]) -> None:
    """Print a list with a line for each object."""
    lines = ",\n ".join(map(json.dumps, objects))
    say(f"[{lines}]")


def _complain(message: object) -> None:
    print(f"wsgi-bg tasks: {printable(str(message))}", file=sys.stderr)
