"""Techniques as an algebra: a set of choices whose text is the notation of the toolkit of the paper's authors.

    F             fused attention, whose scores never lie in memory (torch's SDPA, or flash_attention_2)
    R             recomputation: a block keeps its input, and is computed again in the backward pass
    Z1, Z2, Z3    ZeRO: the optimizer's state is cut over the ranks; gradients too; weights too
    O             offload to host memory: of the optimizer, with Z3 of the weights too
    Q             the linear layers of the blocks in 4 bits, and frozen: without an adapter no linear weight is trained
    L, LFA        LoRA, LoRA-FA
    QL, QLFA      the same over 4 bits
    O8            the optimizer's moments in 8 bits
    Q8            linear layers that multiply in 8-bit floats; they are trained
    TP2, TP4, ... tensor parallelism over so many ranks

They are written with plus signs in any order (`z3+r+F+o`), and always printed in this one (`F+R+Z3+O`). A letter that
is not there means off: `Naive`, or `-`, is eager attention, everything kept, every weight trained by AdamW, on one rank
or on several that exchange gradients. F, R, Z2, Z3, O, Q, L and QL are those of the toolkit
(github.com/AaronZLT/llm-toolkit, arXiv 2311.03687); the others are ours.

What a text stands for in settings is `words`, and which text a config is, `of`. Both are here so that nothing else has
to know letters; putting one in the place of the other is `llmsys.bench.expand`.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llmsys import schema
from llmsys.schema import recompute as policies

NAIVE = "Naive"
ADAPTERS = {"": (), "lora": ("L",), "lorafa": ("LFA",)}
KINDS = {"lora": "lora", "lora_peft": "lora", "lorafa": "lorafa", "lorafa_peft": "lorafa"}
"""`method.kind` -> the adapter that it is."""
METHODS = {"": "full", "lora": "lora_peft", "lorafa": "lorafa"}
FUSED = ("sdpa", "flash_attention_2")
LETTERS: dict[str, dict[str, Any]] = {
    "F": {"flash": True},
    "R": {"recompute": True},
    "Z1": {"zero": 1},
    "Z2": {"zero": 2},
    "Z3": {"zero": 3},
    "O": {"offload": True},
    "Q": {"quantised": True},
    "L": {"adapter": "lora"},
    "QL": {"quantised": True, "adapter": "lora"},
    "LFA": {"adapter": "lorafa"},
    "QLFA": {"quantised": True, "adapter": "lorafa"},
    "O8": {"adam8": True},
    "Q8": {"fp8": True},
}
"""Letter -> the fields that it sets; `TP<n>` sets `tensor`."""
BASE = ("quantised", "adapter")
"""Fields of which one letter says all."""
MEANT = {"FLASH": "F", "LORA": "L", "QLORA": "QL", "LORAFA": "LFA", "LORA-FA": "LFA", "NF4": "Q", "FP8": "Q8"}
"""What people write instead."""


@dataclass(frozen=True, kw_only=True)
class Techniques:
    """One combination; see this file's head for what each field's letter means.

    `zero` is 0 to 3, `adapter` one of `""`, `lora` and `lorafa`, `tensor` the ranks that share a matrix. ValueError,
    with the reason, for what contradicts itself.
    """

    flash: bool = False
    recompute: bool = False
    zero: int = 0
    offload: bool = False
    quantised: bool = False
    adapter: str = ""
    adam8: bool = False
    fp8: bool = False
    tensor: int = 1

    def __post_init__(self) -> None:
        assert self.zero in (0, 1, 2, 3), self.zero
        assert self.adapter in ADAPTERS, self.adapter
        assert self.tensor >= 1, self.tensor
        cut = self.tensor > 1
        for wrong, reason in (
            (self.offload and not self.zero, "O is ZeRO's offload, and needs a Z: Z2+O or Z3+O"),
            (cut and self.zero, "TP cuts each matrix over all ranks, and leaves ZeRO none to cut over"),
            (cut and self.quantised, "TP cuts matrices, and one in 4 bits is packed in runs that must stay whole"),
            (cut and self.adapter == "lorafa", "TP cuts the matrices that LoRA-FA's blocks read whole; L works"),
            (self.adam8 and self.offload, "with O the moments are in host memory, of which O8 would save the device's"),
            (self.fp8 and self.quantised, "Q8 multiplies by weights in 8-bit floats, and Q reads 4-bit ones as bf16"),
        ):
            if wrong:
                raise ValueError(f"techniques={self}: {reason}")

    @classmethod
    def parse(cls, text: str) -> Techniques:
        """The combination that `text` stands for. ValueError says what is wrong with it, and what would be right."""
        if not isinstance(text, str):
            raise ValueError(f"techniques={text}: must be letters, F+R+Z3, or Naive")
        if text.strip().lower() in (NAIVE.lower(), "-"):
            return cls()
        values: dict[str, Any] = {}
        seen: dict[str, str] = {}
        for token in (part.strip().upper() for part in text.split("+")):
            for key, value in _fields(token, text).items():
                before = seen.setdefault("base" if key in BASE else key, token)
                if before != token or key in values:
                    raise ValueError(f"techniques={text}: {_twice(before, token)}")
                values[key] = value
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"techniques={text}: {str(error).partition(': ')[2]}") from None

    @classmethod
    def of(cls, config: schema.Config) -> Techniques:
        """What a config amounts to, whoever chose its settings.

        FSDP2 is Z3. Any recomputation is R, `auto` too. Any quantised base is Q, 8-bit integers too; `lora` and
        `lorafa` are L and LFA as peft's are. ValueError for settings that contradict each other.
        """
        model, train, engine = config.model, config.train, config.engine
        deepspeed = engine if isinstance(engine, schema.DeepSpeed) else None
        return cls(
            flash=isinstance(model, schema.Transformer) and model.attention in FUSED,
            recompute=train.recompute == "auto" or any(name != "none" for name in policies.named(train.recompute)),
            zero=deepspeed.zero if deepspeed else 3 * isinstance(engine, schema.FSDP2),
            offload=deepspeed is not None and deepspeed.offload != "none",
            quantised=model.quant != "none",
            adapter=KINDS.get(config.method.kind, ""),
            adam8=train.optimizer == "adamw_8bit",
            fp8=train.fp8,
            tensor=train.world if engine.kind == "tp" else 1,
        )

    @classmethod
    def combinations(cls, letters: Iterable[str]) -> list[Techniques]:
        """Every valid combination of `letters` (`["F", "R", "Z2", "Z3", "O", "QL", "TP2"]`), those of few letters
        first; `Naive` among them. ValueError for an unknown letter."""
        return cls.sorted_out(letters)[0]

    @classmethod
    def sorted_out(cls, letters: Iterable[str]) -> tuple[list[Techniques], list[str]]:
        """(`combinations`, one line for each of `letters`' other combinations: `techniques=<it>: <why it cannot be>`).
        ValueError for an unknown letter."""
        off = {field.name: field.default for field in dataclasses.fields(cls)}
        choices: dict[tuple[str, ...], dict[tuple[Any, ...], None]] = {}  # fields that go together -> their values
        for letter in letters:
            values = _fields(letter.strip().upper(), letter)
            names = BASE if set(values) <= set(BASE) else tuple(values)
            options = choices.setdefault(names, {tuple(off[name] for name in names): None})
            options[tuple(values.get(name, off[name]) for name in names)] = None
        found, refused = [], []
        for chosen in itertools.product(*choices.values()):
            pairs = (zip(names, values, strict=True) for names, values in zip(choices, chosen, strict=True))
            try:
                found.append(cls(**dict(itertools.chain(*pairs))))
            except ValueError as error:
                refused.append(str(error))
        return sorted(found, key=lambda each: len(each.letters)), refused

    @property
    def letters(self) -> tuple[str, ...]:
        """What it is made of, each of which could be dropped: `F+Z3+O+QL` is of F, Z3, O, Q and L."""
        flags = {"F": self.flash, "R": self.recompute, f"Z{self.zero}": self.zero, "O": self.offload}
        flags |= {"Q": self.quantised, **dict.fromkeys(ADAPTERS[self.adapter], True)}
        flags |= {"O8": self.adam8, "Q8": self.fp8, f"TP{self.tensor}": self.tensor > 1}
        return tuple(letter for letter, on in flags.items() if on)

    def without(self, letter: str) -> Techniques:
        """This combination without one of its `letters`; without a Z there is no O either.

        ValueError for a letter that it does not have.
        """
        token = letter.upper()
        if token not in self.letters:
            raise ValueError(f"techniques={self}: has no {letter}; there are {', '.join(self.letters) or 'none'}")
        off: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(self)}
        keys = {*_fields(token, token), *(["offload"] if token.startswith("Z") else [])}
        return dataclasses.replace(self, **{key: off[key] for key in keys})

    def words(self) -> list[str]:
        """The overrides that it stands for, each of another key. There is none for the engine without Z and TP, so that
        an experiment's own, `local` or `ddp`, stays."""
        engine = [f"engine=zero{self.zero}"] if self.zero else []
        if self.offload:
            engine = ["engine=zero1", "engine.offload=optimizer"] if self.zero == 1 else [f"{engine[0]}_offload"]
        if self.tensor > 1:
            engine = ["engine=tp", f"train.world={self.tensor}"]
        return [
            f"model.attention={FUSED[0] if self.flash else 'eager'}",
            f"train.recompute={'block' if self.recompute else 'none'}",
            f"model.quant={'nf4' if self.quantised else 'none'}",
            f"method={METHODS[self.adapter]}",
            *engine,
            f"train.optimizer={'adamw_8bit' if self.adam8 else 'adamw'}",
            f"train.fp8={'true' if self.fp8 else 'false'}",
        ]

    def __str__(self) -> str:
        parts = list(self.letters)
        if "Q" in parts and self.adapter:
            at = parts.index("Q")
            parts[at : at + 2] = ["Q" + parts[at + 1]]
        return "+".join(parts) or NAIVE


def _fields(token: str, text: str) -> dict[str, Any]:
    """What a letter sets. ValueError for one that is not known, with the nearest of those that are."""
    if token in LETTERS:
        return LETTERS[token]
    if (ranks := re.fullmatch("TP([0-9]+)", token)) and int(ranks[1]) > 1:
        return {"tensor": int(ranks[1])}
    known = [*LETTERS, "TP2"]
    meant = "TP2" if token.startswith("TP") else MEANT.get(token)
    near = [meant] if meant else difflib.get_close_matches(token, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}, and {NAIVE} for none"
    raise ValueError(f"techniques={text}: {token or 'an empty part'} is no technique; {hint}")


def _twice(before: str, token: str) -> str:
    """Why two letters cannot stand in one text."""
    if before == token:
        return f"{token} stands there twice"
    if "Q" in (before, token) and {before, token} <= {"Q", "L", "LFA"}:
        adapter = token if before == "Q" else before
        return f"{before} and {token}: an adapter over a quantised base is written Q{adapter}"
    if token.startswith("TP"):
        return f"{before} and {token}: one number of ranks at a time"
    kinds = "one stage of ZeRO" if token.startswith("Z") else "one of Q, L, QL, LFA and QLFA"
    return f"{before} and {token}: {kinds} at a time"
