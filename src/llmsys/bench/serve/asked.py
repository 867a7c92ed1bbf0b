"""Whether a model can be asked for a load: said before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmsys import schema
from llmsys.bench.serve import load, pace, slower


def check(config: schema.Config, inputs: Mapping[str, str]) -> None:
    """ValueError, in one line that names the key, for a model that generates no text or has too few positions, a trace
    that is none, what `pace.of_record` and `slower.of_record` do not take, and weights that no such server is given."""
    task, model, server = config.task, config.model, config.server
    if not isinstance(model, schema.Transformer) or model.objective != "causal_lm":
        raise ValueError(f"model={model.name}: generates no text; e.g. model=llama_6m")
    if isinstance(task, schema.ServeModules):
        keys, most = "task.contexts, and one more token", max(task.contexts) + 1
    else:
        assert isinstance(task, schema.Serve)
        keys = f"task.trace={task.trace}" if task.trace else "task.prompt_tokens and task.output_tokens"
        most = load.longest(task)
        if isinstance(server, schema.HttpServer) and not server.url and model.quant != "none":
            raise ValueError(f"model.quant={model.quant}: is for server=transformers; other servers are told their own")
        if speeds := inputs.get("speeds"):
            pace.of_record(Path(speeds), model, server)
        if served := inputs.get("served"):
            slower.of_record(Path(served), config)
    if most > model.max_length:
        raise ValueError(f"{keys}: {most} tokens, and model={model.name} has positions for model.max_length="
                         f"{model.max_length}")  # fmt: skip
