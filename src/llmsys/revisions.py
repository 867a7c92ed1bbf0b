"""Of which revisions of the code the rows of a table or a picture are: side by side they should be of one.

A run's record has the commit, whether the tree differed from it, and a hash of the package's source. What is of a tree
with changes has that hash beside its commit, since the commit alone does not say what ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

UNKNOWN = "no known revision"


def revisions(rows: Iterable[Mapping[str, Any]] | pandas.DataFrame) -> dict[str, int]:
    """Revision -> how many runs of `rows`, or of a frame of `results.load`, are of it, the most frequent first.

    A revision is `1a2b3c4`; `1a2b3c4 with changes (code 0123456789ab)` of a tree that differed from its commit; `code
    0123456789ab` outside a checkout; or `no known revision`. A mean over runs counts each of them.
    """
    found: Counter[str] = Counter()
    for each in _few(rows) if hasattr(rows, "to_dict") else rows:
        found.update(each["revisions"] if isinstance(each.get("revisions"), Mapping) else [_revision(each)])
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _few(frame: Any) -> Iterable[Mapping[str, Any]]:
    """The rows of a frame, of which only what is asked for is made a dict."""
    keys = [key for key in ("git_sha", "git_dirty", "code_hash") if key in frame]
    found: Iterable[Mapping[str, Any]] = frame[keys].to_dict("records")
    return found


def mixed(rows: Iterable[Mapping[str, Any]] | pandas.DataFrame) -> str:
    """One line to stand under a table or a picture of `rows`: of which revisions they are, and how many of each; empty
    where all are of one, without changes."""
    found = revisions(rows)
    if len(found) < 2 and not any(" with changes " in name for name in found):
        return ""
    parts = [f"{number} of {name}" for name, number in found.items()]
    several = "Runs of several revisions" if len(found) > 1 else "Runs of a tree with changes"
    return f"{several}: {', '.join(parts)}."


def _revision(row: Mapping[str, Any]) -> str:
    sha, code = (row[key] if isinstance(row.get(key), str) else "" for key in ("git_sha", "code_hash"))
    if not sha:
        return f"code {code}" if code else UNKNOWN
    return f"{sha[:7]} with changes (code {code or 'not known'})" if row.get("git_dirty") is True else sha[:7]
