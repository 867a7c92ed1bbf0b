"""The task `decentral_attack`: how many of a job's tokens a provider finds again, by how deep its stage begins. Keys:

    layer<n>/<attack>_percent           tokens found from what layer n is sent, by each attack of `privacy`
    layer<n>/noise<s>/<attack>_percent  the same with noise of s times the standard deviation added by the owner
    layer<n>/most_percent               of the best attack, without noise
    most_percent                        of all

Decoders are trained on public text, the training split; what they find is the other split's. `attack.md` is a table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsys import schema
from llmsys.decentral import privacy
from llmsys.files import write_atomic
from llmsys.table import piped

if TYPE_CHECKING:
    from llmsys.context import Context
    from llmsys.data import Split

ROWS = 8
"""Of a batch."""


def attack(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record's summary, and `attack.md`."""
    from llmsys import data, models
    from llmsys.models import weights
    from llmsys.train import checks
    from llmsys.train.reproducible import reproducible
    from llmsys.train.task import load_tokenizer

    task, model = config.task, config.model
    assert isinstance(task, schema.DecentralAttack)
    assert isinstance(model, schema.Transformer)
    checks.libraries(config)
    source = data.open(config.data, model.objective)
    folder = weights.find(model, config.results, context.run_folder)
    tokenizer = load_tokenizer(model, folder)
    dataset = data.encode(source, tokenizer, config.train, model)
    seed = config.train.seed
    with reproducible(seed, context.threads, config.train.deterministic):
        how: dict[str, Any] = {"objective": model.objective, "num_labels": 0, "device": context.device}
        whole: Any = models.load(model, **how, seed=seed, folder=folder).eval()
        embedding = whole.get_input_embeddings().weight.detach().cpu()
        public = seen(whole, dataset.train, task.public_tokens, context)
        private = seen(whole, dataset.val, task.private_tokens, context)
        summary: dict[str, float] = {}
        depths = task.depths or list(range(len(public[1])))
        for depth in depths:
            context.beat(phase=f"layer {depth}")
            if depth >= len(public[1]):
                raise ValueError(f"task.depths={task.depths}: the model has {len(public[1]) - 1} layers")
            for noise in (0.0, *task.noises):
                known = privacy.noisy(public[1][depth], noise, seed)
                hidden = privacy.noisy(private[1][depth], noise, seed + 1)
                found = privacy.decoders(known, public[0], embedding, seed)
                where = f"layer{depth}" + (f"/noise{noise:g}" if noise else "")
                for name, decode in found.items():
                    summary[f"{where}/{name}_percent"] = 100 * privacy.recovered(decode, hidden, private[0])
            own = [summary[f"layer{depth}/{name}_percent"] for name in privacy.ATTACKS]
            summary[f"layer{depth}/most_percent"] = max(own)
    summary["most_percent"] = max(summary[f"layer{depth}/most_percent"] for depth in depths)
    write_atomic(context.out / "attack.md", table(summary, depths, task.noises) + "\n")
    return {"summary": summary, "files": {"tables": "attack.md"}, "data_hash": source.hash}


@torch.no_grad()
def seen(model: Any, split: Split, count: int, context: Context) -> tuple[Tensor, list[Tensor]]:
    """About `count` tokens of a split [N], and what each layer is sent of them [N, D]: the first one the embedding."""
    tokens, states, got = [], [], 0
    for at in range(0, len(split), ROWS):
        batch = split.batch(list(range(at, min(at + ROWS, len(split)))))
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        found = model(input_ids=batch["input_ids"].to(context.device), output_hidden_states=True, use_cache=False)
        states.append([each[mask.to(context.device)].float().cpu() for each in found.hidden_states])
        tokens.append(batch["input_ids"][mask])
        got += int(mask.sum())
        context.beat(phase=f"{got} tokens")
        if got >= count:
            break
    return torch.cat(tokens)[:count], [torch.cat(each)[:count] for each in zip(*states, strict=True)]


def table(summary: dict[str, float], depths: list[int], noises: list[float]) -> str:
    """A row for each depth and noise."""
    rows = []
    for depth in depths:
        for noise in (0.0, *noises):
            where = f"layer{depth}" + (f"/noise{noise:g}" if noise else "")
            values = [f"{summary[f'{where}/{name}_percent']:.1f}" for name in privacy.ATTACKS]
            rows.append([str(depth), f"{noise:g}", *values])
    return "\n".join(piped(("layers before", "noise", *(f"{name} %" for name in privacy.ATTACKS)), rows))
