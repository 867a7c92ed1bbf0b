"""`train.recompute` from config to record: what was chosen, what it saved, and that the numbers stay."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness

from llmsys import schema
from llmsys.cost import room
from llmsys.errors import Refused
from llmsys.train import checks

CPU = torch.device("cpu")


def config(mem_gib: float | None = None, text: str = "auto", **changes: Any) -> schema.Config:
    settings = {"model__num_layers": 6, "train__steps": 2, "train__save_final": False, **changes}
    made = harness.config("lorafa_peft", **settings)
    made.method = schema.LoRA(kind="lorafa", r=4, dropout=0.1)
    made.train.recompute, made.train.lr_by_method["lorafa"] = text, 1e-3
    made.hardware.mem_gib = mem_gib
    return made


def peak(text: str, **changes: Any) -> float:
    """GiB with which `text` just fits."""
    return checks.kinds_and_peak(config(text=text, **changes), CPU)[1] / (1 - room.SLACK) / checks.GIB * 1.0001


def test_a_run_is_the_same_with_less_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Dropout on. The record counts the blocks by policy, the log says why, and saved bytes fall."""
    found = {}
    for name, mem in (("none", peak("none")), ("mixed", (peak("none") + peak("attn+mlp")) / 2), ("block", 1e-4)):
        with caplog.at_level(logging.INFO):
            found[name] = harness.run(tmp_path / name, config(mem, force=name == "block"))["summary"]
    counted = {
        name: {key: value for key, value in summary.items() if key.startswith("blocks_")}
        for name, summary in found.items()
    }
    assert counted["none"] == {}
    assert counted["block"] == {"blocks_block": 6}
    assert sum(counted["mixed"].values()) == 6 > counted["mixed"].get("blocks_none", 0)
    assert "train.recompute=auto: block, which needs" in caplog.text
    assert found["none"]["saved_bytes"] > found["mixed"]["saved_bytes"] > found["block"]["saved_bytes"]
    for key in ("loss", "val_loss"):
        assert found["none"][key] == found["mixed"][key] == found["block"][key]


@pytest.mark.parametrize("family", ["bert", pytest.param("t5", marks=pytest.mark.slow), "gpt2"])
def test_every_family_can_be_fitted(tmp_path: Path, family: str) -> None:
    """With the same loss, in the memory that lies between no recomputation and the most."""
    changes: dict[str, Any] = {"family": family, "train__steps": 1}
    least = "block" if family == "gpt2" else "attn+mlp"
    tight = (peak("none", **changes) + peak(least, **changes)) / 2
    found = [
        harness.run(tmp_path / name, config(mem, **changes))["summary"]
        for name, mem in (("whole", 8.0), ("tight", tight))
    ]
    assert "blocks_none" not in found[0]
    assert sum(count for key, count in found[1].items() if key.startswith("blocks_")) == 6 * (1 + (family == "t5"))
    assert found[0]["saved_bytes"] > found[1]["saved_bytes"]
    assert found[0]["loss"] == found[1]["loss"]


def test_what_cannot_fit_is_refused_as_the_leanest_and_what_can_is_offered() -> None:
    with pytest.raises(Refused, match=r"train\.recompute=block needs about"):
        checks.check_memory(checks.resolved(config(1e-4), CPU), CPU)
    whole = config((peak("none") + peak("attn+mlp")) / 2 * (1 - room.SLACK), "none")
    with pytest.raises(Refused, match=r"  python -m llmsys .* train\.recompute=auto\n"):
        checks.check_memory(whole, CPU)


def test_counted_policies_do_not_hinder_the_offer_of_fewer_blocks() -> None:
    counted = config(peak("none") / 2, "mlp:2,none:4")
    with pytest.raises(Refused) as refused:
        checks.check_memory(counted, CPU)
    assert re.search(r"train\.recompute=mlp model\.num_layers=\d", str(refused.value))
