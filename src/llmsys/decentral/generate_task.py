"""The task `decentral_generate`: text by a model whose stages, with their keys and values, providers have. Keys:

    tokens_per_s, step_ms_p50      new tokens of all sequences; a step is the next token of each of them
    recovery_s_p50, ...            as of `train_task`

`generated.jsonl` has a line for each sequence: its prompt, what was generated, and its tokens.
"""

from __future__ import annotations

import json
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.decentral import contributions, noise, owner
from llmsys.decentral.chain import chain
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.cost import Workload
from llmsys.decentral.decode import trace_decoder
from llmsys.decentral.event_log import EVENTS
from llmsys.decentral.exports import Exports
from llmsys.decentral.generation import Generation
from llmsys.decentral.planes.layout import packed
from llmsys.decentral.running import Running
from llmsys.decentral.training import Training
from llmsys.files import write_atomic

if TYPE_CHECKING:
    from llmsys.context import Context
    from llmsys.data.tokenizer import Tokenizer

NEVER = 10**9
"""Keys and values are computed again from the prefix: no copies of them are made but those of the beginning."""


def generate(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record's summary and samples, and `generated.jsonl`. ValueError for prompts that are too long."""
    from llmsys import models
    from llmsys.models import weights
    from llmsys.train import checks
    from llmsys.train.reproducible import reproducible
    from llmsys.train.task import load_tokenizer

    task, model = config.task, config.model
    assert isinstance(task, schema.DecentralGenerate)
    assert isinstance(model, schema.Transformer)
    checks.libraries(config)
    folder = weights.find(model, config.results, context.run_folder)
    tokenizer = load_tokenizer(model, folder)
    assert tokenizer is not None
    prompts, data_hash = _prompts(config, tokenizer)
    with reproducible(config.train.seed, context.threads, config.train.deterministic):
        how: dict[str, Any] = {"objective": model.objective, "num_labels": 0, "device": context.device}
        whole = models.load(model, **how, seed=config.train.seed, folder=folder)
        context.beat(phase="tracing the model")
        made = _Generating(config, context, task, whole, prompts)
        made.running.run()
    return {**made.record(tokenizer), "data_hash": data_hash}


def _prompts(config: schema.Config, tokenizer: Tokenizer) -> tuple[list[list[int]], str]:
    """One for each sequence, and the hash of where they are from."""
    from llmsys import data

    task = config.task
    assert isinstance(task, schema.DecentralGenerate)
    count = task.streams * task.rows
    source = data.open(config.data, config.model.objective)
    if task.prompts:
        found = tokenizer.encode(list(task.prompts))
    else:
        held = data.encode(source, tokenizer, config.train, config.model).val
        some = [held.batch([at % len(held)])["input_ids"][0] for at in range(count)]
        found = [[int(each) for each in row[: task.prompt_tokens]] for row in some]
    return [found[at % len(found)] for at in range(count)], source.hash


class _Generating:
    def __init__(
        self,
        config: schema.Config,
        context: Context,
        task: schema.DecentralGenerate,
        model: Any,
        prompts: list[list[int]],
    ) -> None:
        self.task, self.context = task, context
        length = max(map(len, prompts)) + task.new_tokens
        self.generation = Generation(
            prompts=[prompts[at : at + task.rows] for at in range(0, len(prompts), task.rows)],
            new=task.new_tokens,
            length=length,
            vocabulary=config.model.vocab_size if isinstance(config.model, schema.Transformer) else 0,
            temperature=task.temperature,
            seed=config.train.seed,
        )
        self.traced = trace_decoder(model, task.rows, length, chosen=True, noise=bool(task.temperature))
        self.chain = owner.carried(chain(self.traced.graph), task, {"task.rows": task.rows})
        pinned = owner.pins(self.chain, task.private)
        work = Workload(train=False, micro_batches=task.streams, most=1, private=pinned, compress=task.compress)
        self.running = Running(task, context, self.chain, work, self.training, self.committed, self.bound)

    def training(self, elsewhere: Executor) -> Training:
        own = self.generation
        return Training(
            graph=self.traced.graph,
            chain=self.chain,
            tensors={key: packed(tensor) for key, tensor in self.traced.tensors.items()},
            rules=own.rules(),
            data=lambda step: [{k: packed(v) for k, v in each.items()} for each in own.data(step)],
            steps=own.steps,
            rate=lambda step: 0.0,
            exports=Exports(own.rules(), elsewhere),
            copies=self.task.copies,
            owner_keeps=self.task.owner_keeps,
            hung_s=self.task.hung_s,
            copy_every=NEVER,
            vocabulary=own.vocabulary,
            rows=self.task.rows,
            noise=noise.of(self.task.noise, self.context.out),
        )

    def bound(self, coordinator: Coordinator) -> None:
        self.generation.updates = coordinator.updates

    def committed(self, step: int) -> None:
        self.context.beat(step=step, steps=self.generation.steps)

    def record(self, tokenizer: Tokenizer) -> dict[str, Any]:
        own, running = self.generation, self.running
        lines = []
        for stream, found in zip(own.prompts, own.texts(), strict=True):
            for prompt, new in zip(stream, found, strict=True):
                line = {"prompt": tokenizer.decode(list(prompt)), "text": tokenizer.decode(new), "tokens": new}
                lines.append(json.dumps(line, ensure_ascii=False))
        write_atomic(self.context.out / "generated.jsonl", "\n".join(lines) + "\n")
        summary, samples = running.figures()
        timed_ms = samples.get("step_ms", [])
        if timed_ms:
            rows = self.task.streams * self.task.rows
            summary["tokens_per_s"] = rows * len(timed_ms) / sum(timed_ms) * 1e3
        files = {"generated": "generated.jsonl", "events": EVENTS, "contributions": contributions.FILE}
        return {"summary": summary, "samples": samples, "files": files}
