"""What would run instead of a run that is refused, as commands to copy."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable, Iterator, Sequence

from llmsys import schema
from llmsys.schema import recompute as policies
from llmsys.words import key_of


def alternatives(
    config: schema.Config, fits: Callable[[schema.Config], bool], there: str, *, recompute: bool = False
) -> str:
    """The commands that would run: the experiment's smoke, the same run with more computed again (where `recompute` may
    help), a smaller run, each if it `fits`, and `force`. Each is what was typed, with a change."""
    words, rest = (_typed(config), []) if config.command else _told(config)
    one = []
    if ":" in config.train.recompute:  # one policy: counts are for so many blocks, and now there are to be fewer
        one = [f"train.recompute={max(policies.named(config.train.recompute), key=policies.POLICIES.index)}"]
    runs = []
    if config.smoke:
        runs.append(_command(words, [*one, *config.smoke]))
    words += rest
    if recompute and isinstance(config.model, schema.Transformer) and fits(_with(config, "auto")):
        runs.append(_command(words, ["train.recompute=auto"]))
    fewer = _with(config, one[0].partition("=")[2]) if one else config
    for override, smaller in _smaller(fewer):
        if fits(smaller):
            runs.append(_command(words, [*one, override]))
            break
    runs.append(_command(words, ["force=true"]))
    commands = "\n".join(f"  {run}" for run in runs)
    return f"What would run:\n{commands}   # in spite of this\n{there}"


def _command(words: Sequence[str], changes: Sequence[str]) -> str:
    """`words` with `changes` in the place of those for the same keys, as a shell takes them.

    A change that chooses for a group takes the place of the group's settings too: they were for the other choice.
    """
    kept = list(words)
    for change in changes:
        key = key_of(change)
        at = next((index for index, word in enumerate(kept) if key_of(word) == key), len(kept))
        before, after = (
            [word for word in part if key_of(word) != key and not key_of(word).startswith(f"{key}.")]
            for part in (kept[:at], kept[at:])
        )
        kept = [*before, change, *after]
    return " ".join(["python -m llmsys", *map(_quoted, kept)])


def _quoted(word: str) -> str:
    """A word as a shell takes it; one with Hydra's own quotes in double ones, so that it can be read."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def _typed(config: schema.Config) -> list[str]:
    """What was typed, and where results go if that is not where they go by themselves."""
    usual = os.environ.get("LLMSYS_RESULTS", "results")
    return [*config.command, *([f"results={config.results}"] if config.results != usual else [])]


def _told(config: schema.Config) -> tuple[list[str], list[str]]:
    """Of a config that a program has made: the words that come nearest to it, and further ones that are no part of the
    experiment's smoke."""
    data, engine = config.data, config.engine
    if config.name == "scratch":  # no experiment that would choose them again
        words = [f"model={config.model.name}", f"data={data.kind}"]
        words += [f"data.columns={{{', '.join(f'{k}: {v}' for k, v in data.columns.items())}}}"] if data.columns else []
    else:
        words = [f"+exp={config.name}"]
        words += [f"data={data.kind}"] if data.kind != "hub" else []  # its columns are the experiment's
    words.append(f"method={config.method.kind}")
    if data.path:
        words.append(f"data.path={data.path}")
    if engine.kind != "local":
        words += [f"engine={engine.kind}", f"train.world={config.train.world}"]
    if isinstance(engine, schema.DeepSpeed):
        words += [f"engine.zero={engine.zero}", f"engine.offload={engine.offload}"]
    again = config.train.recompute
    rest = [f"train.recompute='{again}'" if "," in again else f"train.recompute={again}"] if again != "none" else []
    return words, [f"model.weights={config.model.weights}", *rest]


def _with(config: schema.Config, text: str) -> schema.Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, recompute=text))


def _smaller(config: schema.Config) -> Iterator[tuple[str, schema.Config]]:
    """(override, config), halved each time: the depth of a transformer (32 -> 16, 8, 4, 2, 1), a convnet's micro-batch.

    A convnet's depths are a list of stages, none of which can be left out; with fewer images it is still that model.
    """
    if isinstance(config.model, schema.Transformer):
        layers = config.model.num_layers
        while layers > 1:
            layers //= 2
            model = dataclasses.replace(config.model, num_layers=layers)
            yield f"model.num_layers={layers}", dataclasses.replace(config, model=model)
    else:
        batch = config.train.micro_batch
        while batch % 2 == 0:  # else the global batch is no multiple of it any more
            batch //= 2
            train = dataclasses.replace(config.train, micro_batch=batch)
            yield f"train.micro_batch={batch}", dataclasses.replace(config, train=train)
