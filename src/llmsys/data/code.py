"""The three data sets cut from the pinned corpus; all of them hold out the same modules.

`code_lm`          the modules, whole; packed end to end when encoded
`code_docstrings`  a function without its docstring -> the docstring, as instruction pairs or source and target
`code_packages`    a function's statements, names of sub-packages made neutral -> the sub-package
"""

from __future__ import annotations

from llmsys import schema
from llmsys.data import corpus, functions
from llmsys.data.examples import Example, Pair, template

DOCSTRING_INSTRUCTION = "Write the docstring of this Python function."


def lm(cfg: schema.Data) -> Pair:
    """Whole modules, without a prompt. ValueError for a name in `data.packages` that is no sub-package."""
    modules = corpus.modules()
    chosen = _chosen(cfg, modules)
    examples = [Example(m.text, origin=m.path) for m in modules if m.package in chosen and m.text.strip()]
    return _by_module(examples, modules, cfg.val_percent)


def docstrings(cfg: schema.Data, objective: str) -> Pair:
    """Every documented function: a causal LM is asked in words, an encoder gets `data.prefix` and the function.

    ValueError for a name in `data.packages` that is no sub-package.
    """
    modules = corpus.modules()
    chosen = _chosen(cfg, modules)
    examples = []
    for function in functions.load(modules):
        if function.doc and corpus.package_of(function.module) in chosen:
            asked = objective == "causal_lm"
            prompt = template(DOCSTRING_INSTRUCTION, function.source) if asked else cfg.prefix + function.source
            examples.append(Example(function.doc, prompt=prompt, origin=function.module))
    return _by_module(examples, modules, cfg.val_percent)


def packages(cfg: schema.Data) -> Pair:
    """Functions of the sub-packages in `data.labels`. ValueError for a label that is none, or that has no function in
    one of the splits."""
    modules = corpus.modules()
    _check_packages("data.labels", cfg.labels, modules)
    if len(set(cfg.labels)) < len(cfg.labels):
        raise ValueError(f"data.labels: {', '.join(cfg.labels)}: one is given twice")
    index = {label: i for i, label in enumerate(cfg.labels)}
    seen: set[str] = set()
    examples = []
    for function in functions.load(modules):
        target = index.get(corpus.package_of(function.module))
        # One text in two places would be in both splits, or have two labels: the first counts.
        if target is not None and function.num_lines >= cfg.min_lines and function.body not in seen:
            seen.add(function.body)
            examples.append(Example(function.body, label=target, origin=function.module))
    train, val = _by_module(examples, modules, cfg.val_percent)
    for name, split in (("training", train), ("validation", val)):
        missing = set(index.values()) - {example.label for example in split}
        if missing:
            names = ", ".join(cfg.labels[i] for i in sorted(missing))
            raise ValueError(f"data.labels: {names}: no function of at least {cfg.min_lines} lines in the {name} split")
    return train, val


def _chosen(cfg: schema.Data, modules: list[corpus.Module]) -> set[str]:
    """The sub-packages to take: `data.packages`, else all, and the files at the top ("")."""
    _check_packages("data.packages", cfg.packages, modules)
    return set(cfg.packages) or {module.package for module in modules}


def _check_packages(key: str, names: list[str], modules: list[corpus.Module]) -> None:
    there = sorted({module.package for module in modules} - {""})
    for name in names:
        if name not in there:
            raise ValueError(f"{key}: {name} is no sub-package of the corpus; there are {', '.join(there)}")


def _by_module(examples: list[Example], modules: list[corpus.Module], percent: int) -> Pair:
    held_out = corpus.validation_modules({module.path: len(module.text) for module in modules}, percent)
    train = [example for example in examples if example.origin not in held_out]
    return train, [example for example in examples if example.origin in held_out]
