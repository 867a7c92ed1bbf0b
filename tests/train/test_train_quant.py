"""Adapters learn over a quantised base, and go on after an interruption with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import train_harness as harness

FORMATS = ["nf4", "int8"]


@pytest.mark.parametrize(
    ("quant", "kind"),
    [
        ("nf4", "lora_peft"),
        ("nf4", "lorafa_peft"),
        ("int8", "lora_peft"),
        pytest.param("int8", "lorafa_peft", marks=pytest.mark.slow),
    ],
)
def test_loss_falls(tmp_path: Path, quant: str, kind: str) -> None:
    """Towards what 16 remembered sequences allow, and as far as over the full base."""
    losses = {}
    for name in ("none", quant):
        config = harness.config(kind, model__quant=name, train__steps=20, train__schedule="constant")
        harness.run(tmp_path / name, config)
        losses[name] = [row["loss"] for row in harness.curve(tmp_path / name) if "loss" in row]
    fall = {name: values[0] - values[-1] for name, values in losses.items()}
    assert fall[quant] > 0.05
    assert fall[quant] == pytest.approx(fall["none"], rel=0.3)
    assert losses[quant] != losses["none"]


@pytest.mark.parametrize("quant", FORMATS)
def test_resume_gives_the_same_bits(tmp_path: Path, quant: str) -> None:
    """The base is not in the checkpoint: it is quantised again, from the same weights, to the same bits."""

    class Stop(Exception):
        pass

    def stop_after_5(progress: dict[str, float]) -> None:
        if progress.get("step") == 5:
            raise Stop

    config = harness.config("lora_peft", model__quant=quant, train__steps=8, train__checkpoint_every=2)
    harness.run(tmp_path / "whole", config)
    with pytest.raises(Stop):
        harness.run(tmp_path / "cut", config, listener=stop_after_5)
    assert harness.run(tmp_path / "cut", config)["resumed_from_step"] == 4
    assert harness.curve(tmp_path / "cut") == harness.curve(tmp_path / "whole")
    files = [tmp_path / run / "weights" / "adapter_model.safetensors" for run in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
