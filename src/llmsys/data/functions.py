"""The functions of the corpus, cut out once and cached.

Parsing 16.6 MB with `ast` takes some ten seconds, so its result is kept as JSON lines in a cache folder
(`LLMSYS_CACHE`, else `$XDG_CACHE_HOME/llmsys`, else `~/.cache/llmsys`). The file's name is a hash of the corpus and of
this file's own source: another corpus or another way to cut is another file, and a stale one is never read.

A cache must never decide whether a run works. The file is written beside its place and renamed, so two processes that
build it at once both leave the same whole file; its first line holds a hash of the rest, so a damaged one is noticed,
logged and built again; a folder that cannot be written is logged, and the functions are used as they are.

Functions are cut by *lines* of the parsed positions. (`ast.get_source_segment` splits the whole file again for every
function: 32 s instead of 1 s.)
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import logging
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from llmsys.data import corpus
from llmsys.data.neutral import Neutraliser
from llmsys.files import cache_folder, write_atomic

log = logging.getLogger("llmsys.data")

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Function:
    """A top-level function or method. Nested functions are part of the one around them.

    `source`: decorators, signature and body without the docstring. `doc`: the docstring, "" if there is none.
    `body`: the statements alone, without docstrings and imports, every name of a sub-package made neutral.
    """

    module: str
    name: str
    source: str
    doc: str
    body: str

    @property
    def num_lines(self) -> int:
        """Lines of the body that are not blank."""
        return sum(1 for line in self.body.split("\n") if line.strip())


def load(modules: list[corpus.Module]) -> list[Function]:
    """All functions of `corpus.modules()`, in the order of module and line: from the cache, else cut now and cached."""
    own_code = Path(__file__).read_bytes() + Path(__file__).with_name("neutral.py").read_bytes()
    content = corpus.digest({module.path: module.text.encode() for module in modules})
    key = hashlib.sha256(content.encode() + own_code).hexdigest()[:16]
    path = cache_folder() / f"functions-{key}.jsonl"
    found = _read(path)
    if found is None:
        log.info("cutting functions out of %d modules, once", len(modules))
        found = extract(modules)
        _write(path, found)
    return found


def extract(modules: Iterable[corpus.Module]) -> list[Function]:
    """Parses every module and cuts its functions out."""
    modules = list(modules)
    neutral = Neutraliser({module.package for module in modules} - {""} | {corpus.PACKAGE})
    functions = []
    for module in modules:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", SyntaxWarning
            )  # invalid escapes in old docstrings, which Python 3.12 reports
            warnings.simplefilter("ignore", DeprecationWarning)  # the same in 3.11
            tree = ast.parse(module.text)
        lines = module.text.split("\n")  # not splitlines(): ast counts only newlines, not form feeds
        functions += [_cut(module.path, name, node, lines, neutral) for name, node in _functions(tree, "")]
    return functions


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Function]]:
    for child in _children(node):
        if isinstance(child, _Function):
            yield prefix + child.name, child
        else:
            inner = f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix
            yield from _functions(child, inner)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """The statements directly inside a statement; expressions are not visited, which makes this fast."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        yield from getattr(node, block, ())


def _cut(module: str, name: str, node: _Function, lines: list[str], neutral: Neutraliser) -> Function:
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    first, end = node.body[0].lineno, node.end_lineno or node.lineno
    doc_lines = _docstring_lines(node)
    doc = (ast.get_docstring(node, clean=False) or "") if doc_lines else ""
    dropped = {line for inner in _within(node) for line in inner}
    source = "\n".join(lines[i - 1] for i in range(start, end + 1) if i not in doc_lines)
    body = ""
    if first > node.lineno:  # `def f(x): return x` has no body of its own lines
        body = "\n".join(lines[i - 1] for i in range(first, end + 1) if i not in dropped)
    return Function(
        module=module,
        name=name,
        source=textwrap.dedent(source).strip("\n"),
        doc=inspect.cleandoc(doc).strip(),
        body=neutral(textwrap.dedent(body).strip("\n")),
    )


def _docstring_lines(node: ast.AST) -> range:
    """Lines of the docstring, if it has lines of its own."""
    if not isinstance(node, _Function | ast.ClassDef) or ast.get_docstring(node, clean=False) is None:
        return range(0)
    first = node.body[0]
    return range(first.lineno, (first.end_lineno or first.lineno) + 1) if first.lineno > node.lineno else range(0)


def _within(node: ast.AST) -> Iterator[range]:
    """Lines of the docstrings and imports of a function and of everything nested in it."""
    yield _docstring_lines(node)
    for child in _children(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield range(child.lineno, (child.end_lineno or child.lineno) + 1)
        yield from _within(child)


def _read(path: Path) -> list[Function] | None:
    try:
        head, _, rest = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s: cache not readable (%s); functions are cut again", path, error.strerror)
        return None
    if head != hashlib.sha256(rest).hexdigest().encode():
        log.warning("%s: cache is damaged; it is built again", path)
        return None
    return [Function(**json.loads(line)) for line in rest.splitlines()]


def _write(path: Path, functions: list[Function]) -> None:
    rest = "".join(json.dumps(asdict(function)) + "\n" for function in functions)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"{hashlib.sha256(rest.encode()).hexdigest()}\n{rest}")
    except OSError as error:  # a folder of another's, a full disk
        log.warning("%s: cannot be written (%s); the next run cuts the functions again", path, error.strerror)
