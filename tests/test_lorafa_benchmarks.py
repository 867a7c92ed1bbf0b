"""The benchmarks of LoRA-FA run, at a size that measures nothing, so that they cannot rot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's call
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def test_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It asserts by itself that all subjects begin with one loss, and that policies change no bit of later ones."""
    import lorafa_speed
    import side_by_side

    words = ["--size", "tiny", "--rounds", "2", "--warmup", "1", "--threads", "1", "--out", str(tmp_path)]
    record = lorafa_speed.main([*words, "--only", "peft_lora,peft_lorafa,lorafa/none,lorafa/mlp"])
    assert record.summary["lorafa/none:peft_lora_wall_ratio"] > 0
    printed = capsys.readouterr().out
    side_by_side.main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == printed.strip()


@pytest.mark.slow
def test_the_one_for_a_gpu_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every cell has its bytes, less of them where more is computed again and where the loss is chunked."""
    import lorafa_gpu

    names = ["peft_lora", "lorafa/none", "lorafa/attn+mlp"]
    words = ["--small", "--device", "cpu", "--threads", "1", "--steps", "1", "--only", ",".join(names)]
    record = lorafa_gpu.main([*words, "--out", str(tmp_path)])
    assert {cell["status"] for cell in record.config["benchmark"]["cells"]} == {"ok"}
    cell = "plain|2x16|saved_gib"
    peft, none, again = (record.summary[f"{name}|{cell}"] for name in names)
    assert peft > none > again > record.summary["lorafa/attn+mlp|chunked|2x16|saved_gib"] > 0
    assert "| lorafa/attn+mlp | " in capsys.readouterr().out
    late = lorafa_gpu.main([*words, "--minutes", "0", "--out", str(tmp_path)])
    assert {cell["status"] for cell in late.config["benchmark"]["cells"]} == {"left_out"}
