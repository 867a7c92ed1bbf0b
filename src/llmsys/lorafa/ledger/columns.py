"""The ways to fine-tune that the ledger compares, all at one low-rank width r.

In the order of the tables:

    full                      every weight
    peft_lora                 peft's LoRA as it comes: adapters in fp32, beside a bf16 model too
    peft_lora_bf16            the same with adapters in the model's dtype
    peft_lora_compiled,       the same two under torch.compile, whose partitioner decides what to keep and what to
    peft_lora_bf16_compiled   compute again
    peft_lorafa,              peft's layers with A frozen, as peft's LoRA-FA optimizer leaves them; adapters in fp32
    peft_lorafa_bf16          (its default) and in the model's dtype
    lora/<policy>             ours with A trained, under a policy of `train.recompute`
    lorafa/<policy>           ours with A frozen
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsys import schema
from llmsys.schema.recompute import POLICIES
from llmsys.schema.task import COLUMNS

FULL = schema.Method(kind="full")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One of them: a method, what its blocks compute again, and whether they are compiled."""

    name: str
    method: schema.Method
    policy: str = "none"
    compiled: bool = False

    @property
    def ours(self) -> bool:
        return isinstance(self.method, schema.LoRA)


def columns(r: int, dropout: float, *, compiled: bool, share_a: bool = False) -> list[Column]:
    """All of them, adapters of width `r`; without those under torch.compile where not `compiled`."""

    def adapter(kind: str, dtype: str) -> schema.Adapter:
        return schema.Adapter(kind=kind, r=r, alpha=2.0 * r, dropout=dropout, dtype=dtype)

    peft = {"peft_lora": adapter("lora_peft", "fp32"), "peft_lora_bf16": adapter("lora_peft", "model")}
    found = [Column(name="full", method=FULL)]
    found += [Column(name=name, method=method) for name, method in peft.items()]
    if compiled:
        found += [Column(name=f"{name}_compiled", method=method, compiled=True) for name, method in peft.items()]
    found.append(Column(name="peft_lorafa", method=adapter("lorafa_peft", "fp32")))
    found.append(Column(name="peft_lorafa_bf16", method=adapter("lorafa_peft", "model")))
    for kind in ("lora", "lorafa"):
        method = schema.LoRA(kind=kind, r=r, alpha=2.0 * r, dropout=dropout, share_a=share_a)
        found += [Column(name=f"{kind}/{policy}", method=method, policy=policy) for policy in POLICIES]
    assert [column.name for column in found] == [n for n in COLUMNS if compiled or not n.endswith("_compiled")]
    return found
