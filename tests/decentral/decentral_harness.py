"""What tests of graphs share: small models of five families, and a cut one run in one process, message by message."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.decentral.cut import Stage
from llmsys.decentral.graph import Graph
from llmsys.decentral.planes.layout import packed, unpacked
from llmsys.decentral.planes.torch import Run
from llmsys.decentral.trace import Traced, trace

FAMILIES = ("llama", "gpt2", "bert", "t5", "resnet")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def model(family: str, attention: str = "eager", layers: int = 4) -> nn.Module:
    """In training mode, without dropout, its embeddings tied where the family ties them."""
    import transformers as t

    torch.manual_seed(0)
    if family == "llama":
        config = t.LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=2, tie_word_embeddings=True,
                               use_cache=False, attn_implementation=attention)  # fmt: skip
        return t.LlamaForCausalLM(config).train()
    if family == "gpt2":
        config = t.GPT2Config(vocab_size=64, n_embd=32, n_layer=layers, n_head=4, n_positions=64, use_cache=False,
                              bos_token_id=0, eos_token_id=1, attn_implementation=attention,
                              resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        return t.GPT2LMHeadModel(config).train()
    if family == "bert":
        config = t.BertConfig(**SIZES, num_hidden_layers=layers, attn_implementation=attention,
                              hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
        return t.BertForSequenceClassification(config).train()
    if family == "t5":
        config = t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=layers // 2, num_heads=4,
                            dropout_rate=0.0, use_cache=False, decoder_start_token_id=0)  # fmt: skip
        return t.T5ForConditionalGeneration(config).train()
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 1, 1], layer_type="basic",
                            num_labels=4)  # fmt: skip
    return t.ResNetForImageClassification(config).train()


def example(family: str, length: int = 16) -> dict[str, Tensor]:
    """Two rows."""
    random = torch.Generator().manual_seed(1)

    def tokens(size: int) -> Tensor:
        return torch.randint(2, 64, (2, size), generator=random)

    if family == "resnet":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=random), "labels": torch.tensor([0, 3])}
    if family == "bert":
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, length // 2 :] = 0
        return {"input_ids": tokens(length), "attention_mask": mask, "labels": torch.tensor([0, 1])}
    return {"input_ids": tokens(length), "labels": tokens(length // 2 if family == "t5" else length)}


@functools.cache
def traced(family: str, attention: str = "eager") -> Traced:
    return trace(model(family, attention), example(family))


def eager(family: str, attention: str = "eager") -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the model itself."""
    own = model(family, attention)
    loss = own(**example(family)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in own.named_parameters() if p.grad is not None}


def staged(
    graph: Graph, stages: Sequence[Stage], tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], int]:
    """(loss, gradients by key, next states of variables, bytes that went forward), each message packed and unpacked."""
    runs = [Run(graph, stage, {key: tensors[key] for key in _keys(stage)}) for stage in stages]
    way: dict[tuple[int, str], Tensor] = {}
    updates: dict[str, Tensor] = {}
    sent = 0
    for stage, run in zip(stages, runs, strict=True):
        received = {name: way[stage.index, name] for name in stage.receives}
        for name, tensor in run.forward({name: inputs[name] for name in stage.inputs}, received).items():
            message = packed(tensor)
            sent += len(message.data)
            way[stage.sends[name], name] = unpacked(message)
        updates |= run.updates
    (loss,) = runs[-1].outputs.values()
    back: dict[tuple[int, str], Tensor] = {}
    shared: dict[tuple[int, str], Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for stage, run in reversed(list(zip(stages, runs, strict=True))):
        given = {name: back[stage.index, name] for name in stage.sends if (stage.index, name) in back}
        sums = {key: shared[stage.index, key] for key in stage.parameters if (stage.index, key) in shared}
        returned, own = run.backward(given, sums)
        for name, gradient in returned.items():
            back[stage.receives[name], name] = unpacked(packed(gradient))
        for key, gradient in own.items():
            if key in stage.shares:
                shared[stage.shares[key], key] = gradient
            else:
                gradients[key] = gradient
    return loss, gradients, updates, sent


def crossing(graph: Graph, stages: Sequence[Stage]) -> int:
    """Bytes of a micro-batch that go forward from stage to stage."""
    return sum(graph.by_name[name].nbytes for stage in stages for name in stage.sends)


def _keys(stage: Stage) -> tuple[str, ...]:
    return (*stage.parameters, *stage.constants, *stage.variables)


def quarters(graph: Graph, count: int) -> list[int]:
    """Boundaries of so many stages of about equally many operators."""
    total = len(graph.operators)
    return [round(total * part / count) for part in range(1, count)]


def named(graph: Graph, gradients: Mapping[str, Any]) -> dict[str, Any]:
    """By each name that a parameter has."""
    return {**gradients, **{name: gradients[key] for name, key in graph.aliases.items() if key in gradients}}
