"""What would run instead of a run that is refused, as commands to copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from llmsys import schema
from llmsys.schema import recompute as policies


def alternatives(
    config: schema.Config, fits: Callable[[schema.Config], bool], there: str, *, recompute: bool = False
) -> str:
    """The commands that would run: the experiment's smoke, the same run with more computed again (where `recompute` may
    help), a smaller run, each if it `fits`, and `force`."""
    command = _command(config)
    runs = []
    if config.smoke:
        runs.append(f"{command} {' '.join(config.smoke)}")
    command += f" model.weights={config.model.weights}"
    if recompute and isinstance(config.model, schema.Transformer) and fits(_with(config, "auto")):
        runs.append(f"{command} train.recompute=auto")
    if config.train.recompute != "none":
        # one policy: counts are for so many blocks, and now there are to be fewer
        config = _with(config, max(policies.named(config.train.recompute), key=policies.POLICIES.index))
        command += f" train.recompute={config.train.recompute}"
    for override, smaller in _smaller(config):
        if fits(smaller):
            runs.append(f"{command} {override}")
            break
    runs.append(f"{command} force=true")
    commands = "\n".join(f"  {run}" for run in runs)
    return f"What would run:\n{commands}   # in spite of this\n{there}"


def _command(config: schema.Config) -> str:
    data, engine = config.data, config.engine
    words = ["python -m llmsys"]
    if config.name == "scratch":  # no experiment that would choose them again
        words.append(f"model={config.model.name} data={data.kind}")
        words += (
            [f"'data.columns={{{', '.join(f'{k}: {v}' for k, v in data.columns.items())}}}'"] if data.columns else []
        )
    else:
        words.append(f"+exp={config.name}")
        words += [f"data={data.kind}"] if data.kind != "hub" else []  # its columns are the experiment's
    words.append(f"method={config.method.kind}")
    if data.path:
        words.append(f"data.path={data.path}")
    if engine.kind != "local":
        words.append(f"engine={engine.kind} train.world={config.train.world}")
    if isinstance(engine, schema.DeepSpeed):
        words.append(f"engine.zero={engine.zero} engine.offload={engine.offload}")
    return " ".join(words)


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
