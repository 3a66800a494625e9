"""Decide what of a data set's layouts and runs is kept, and why. Pure functions; reading and removing is elsewhere.

Keeping something that nobody needs costs disk space, removing something that is needed could cost a training. So
whatever does not say legibly what it needs is taken to need everything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta


@dataclass(frozen=True)
class LayoutFacts:
    """What matters of a committed layout.

    Attributes:
        name: Its name.
        id: Its id.
        ancestors: Ids of the layouts that it descends from, or that it supersedes (:func:`superseded`).
        borrows: Names of the layouts whose shards it reads.
    """

    name: str
    id: str
    ancestors: frozenset[str] = frozenset()
    borrows: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LayoutNeeds:
    """Who needs layouts.

    Attributes:
        current: Id of the current layout; None if there is none.
        tags: Id of the layout of each tag.
        runs: Ids of the layouts that each run needs; None for a run that does not say.
        models: Id of the layout of each model in use, by what the model is called.
        indexes: Id of the layout of each index, by the index's name.
        under_way: Id of the layout that each uncommitted one is made from, by the new one's name.
        joins: Names of the layouts that a joined layout of another data set reads, by "data set/layout".
    """

    current: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    runs: Mapping[str, Collection[str] | None] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    indexes: Mapping[str, str] = field(default_factory=dict)
    under_way: Mapping[str, str] = field(default_factory=dict)
    joins: Mapping[str, Collection[str]] = field(default_factory=dict)


def need_of(layout: LayoutFacts, needs: LayoutNeeds) -> str:
    """Return who needs a layout, in words; "" if nobody does. Shards that others borrow do not count here.

    Args:
        layout: The layout.
        needs: Who needs which layouts.
    """
    if layout.id == needs.current:
        return "the current layout"
    if tags := sorted(tag for tag, one in needs.tags.items() if one == layout.id):
        return f"tagged {', '.join(tags)}"
    if run := next((run for run, ids in needs.runs.items() if ids and layout.id in ids), None):
        return f"needed by run {run}"
    if run := next((run for run, ids in needs.runs.items() if ids is None), None):
        return f"run {run} does not say which layout it needs; delete it if it is none"
    if model := next((model for model, one in needs.models.items() if one == layout.id), None):
        return f"needed by {model}"
    if index := next((index for index, one in needs.indexes.items() if one == layout.id), None):
        return f"needed by index {index}"
    if new := next((new for new, parent in needs.under_way.items() if parent == layout.id), None):
        return f"{new} is being made from it"
    if joined := next((joined for joined, names in needs.joins.items() if layout.name in names), None):
        return f"joined by {joined}"
    return ""


def superseded(joined: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, list[str]]:
    """Find the joined layouts that others of the same data sets supersede: those that join an older layout of a line.

    Args:
        joined: By the name of a joined layout, for each data set that it joins the ids of the layout's ancestors there,
            the layout's own id last.

    Returns:
        The names of the layouts that each one supersedes. Of two that each join the newer layout of another data set,
        neither supersedes the other.
    """

    def is_older(one: Mapping[str, Sequence[str]], other: Mapping[str, Sequence[str]]) -> bool:
        mine, others = ({name: ids[-1] for name, ids in parts.items()} for parts in (one, other))
        return one.keys() == other.keys() and mine != others and all(mine[name] in other[name] for name in mine)

    return {name: [older for older in joined if is_older(joined[older], joined[name])] for name in joined}


def layouts_to_keep(layouts: Sequence[LayoutFacts], needs: LayoutNeeds) -> dict[str, str]:
    """Decide which layouts stay when the others are pruned.

    Besides those that somebody needs, the newest of each line stays, and every layout whose shards one of those reads.

    Args:
        layouts: All committed layouts of a data set.
        needs: Who needs which of them.

    Returns:
        The reason of each layout, in words; "" for one that may go.
    """
    descended = {ancestor for layout in layouts for ancestor in layout.ancestors}
    kept = {
        layout.name: need_of(layout, needs) or ("" if layout.id in descended else "the newest of its line")
        for layout in layouts
    }
    while lent := _lent(layouts, kept):  # a layout that stays for its shards may itself read those of another
        kept |= lent
    return kept


def _lent(layouts: Sequence[LayoutFacts], kept: Mapping[str, str]) -> dict[str, str]:
    return {
        lender: f"{layout.name} reads shards of it"
        for layout in layouts
        for lender in sorted(layout.borrows)
        if kept[layout.name] and kept.get(lender) == ""
    }


def why_not_removed(name: str, layouts: Sequence[LayoutFacts], needs: LayoutNeeds) -> str:
    """Return why a layout cannot be removed, in words; "" if it can.

    Args:
        name: The layout's name.
        layouts: All committed layouts of the data set.
        needs: Who needs which of them.
    """
    need = next(need_of(layout, needs) for layout in layouts if layout.name == name)
    reader = next((one.name for one in layouts if name in one.borrows), None)
    return need or (f"{reader} reads shards of it" if reader else "")


@dataclass(frozen=True)
class RunFacts:
    """What matters of a run.

    Attributes:
        name: Its name.
        last: When it last did something.
        is_training: Whether a process holds it now.
    """

    name: str
    last: datetime
    is_training: bool = False


@dataclass(frozen=True)
class Rule:
    """Say which runs are kept.

    Attributes:
        keep_last: How many of the newest.
        older_than: A run is only removed if it did nothing for so long; None: whatever its age.
        named: Names of runs that are kept in any case.
    """

    keep_last: int
    older_than: timedelta | None = None
    named: frozenset[str] = frozenset()


def runs_to_keep(runs: Sequence[RunFacts], models: Mapping[str, str], rule: Rule, now: datetime) -> dict[str, str]:
    """Decide which runs stay when the others are pruned.

    Args:
        runs: All runs of a data set.
        models: What each run's model in use is called, by the run's name.
        rule: The rule to keep by.
        now: The time now.

    Returns:
        The reason of each run, in words, the newest run first; "" for one that may go.
    """
    newest_first = sorted(runs, key=lambda run: (run.last, run.name), reverse=True)
    newest = {run.name for run in newest_first[: rule.keep_last]}

    def reason(run: RunFacts) -> str:
        if run.is_training:
            return "a process works on it now"
        if run.name in models:
            return f"needed by {models[run.name]}"
        if run.name in rule.named:
            return "named"
        if run.name in newest:
            return f"one of the newest {rule.keep_last}"
        if rule.older_than is not None and now - run.last <= rule.older_than:
            return f"not older than {rule.older_than / timedelta(days=1):g} days"
        return ""

    return {run.name: reason(run) for run in newest_first}
