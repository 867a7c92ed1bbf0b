"""The benchmarks run, at a size that measures nothing, so that they cannot rot; and their arithmetic is right."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
TINY = ["model.num_layers=1", "train.length=16", "train.global_batch=2", "train.micro_batch=2", "train.threads=1"]


def test_overhead_is_the_median_ratio_with_an_interval_around_it() -> None:
    import side_by_side

    draw = random.Random(0)
    peer = [draw.uniform(50, 200) for _ in range(101)]  # a machine whose speed wanders by a factor of four
    ours = [1.03 * ms * draw.uniform(0.98, 1.02) for ms in peer]
    summary = side_by_side.overhead(ours, peer)
    assert summary["overhead_low_percent"] < 3 < summary["overhead_high_percent"]
    assert summary["overhead_high_percent"] - summary["overhead_low_percent"] < 1
    assert summary["overhead_percent"] == pytest.approx(3, abs=0.5)
    assert summary["peer_step_ms_p25"] < summary["peer_step_ms_p50"] < summary["peer_step_ms_p75"]
    assert side_by_side.overhead(peer, peer)["overhead_percent"] == 0


def test_turns_are_paired_by_step_and_neither_side_always_comes_second() -> None:
    import side_by_side

    order: list[str] = []
    turns = side_by_side.Turns(lambda: order.append("peer"), told=lambda _: order.append("ours"))
    for step in range(1, 7):
        turns({"step": step, "loss": 1.0})
    assert " ".join(order) == "ours peer peer ours ours peer peer ours ours peer peer ours"
    assert [len(side) for side in turns.pairs(warmup=0)] == [5, 5]
    for column, clock in enumerate(side_by_side.CLOCKS):
        sides = ([times[column] for times in side] for side in (turns.ours_ms[2:], turns.peer_ms[3:]))
        assert turns.pairs(warmup=3, clock=clock) == tuple(sides)
    for steps, warmup in ((7, 0), (2, 0), (10, 9)):
        with pytest.raises(ValueError, match=f"--steps {steps}"):
            side_by_side.check_steps(steps, warmup)


def test_loop_overhead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It asserts by itself that both loops give the same losses."""
    import loop_overhead
    import side_by_side
    from llmsys import results

    record = loop_overhead.main(["--steps", "6", "--warmup", "1", "--out", str(tmp_path), *TINY])
    assert results.read(tmp_path) == [record]
    assert {len(values) for values in record.samples.values()} == {5} == {record.summary["pairs"]}
    assert record.env["packages"]["torch"]
    printed = capsys.readouterr().out
    side_by_side.main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == printed.strip()
    assert "overhead" in printed


@pytest.mark.slow
def test_ddp_overhead(tmp_path: Path) -> None:
    """Two real ranks; it asserts by itself that the mean of the peer's losses over them is ours."""
    import ddp_overhead

    record = ddp_overhead.main(["--steps", "4", "--warmup", "1", "--out", str(tmp_path), *TINY, "train.micro_batch=1"])
    assert record.world == 2
    assert record.summary["pairs"] == 3


def test_a_fit_finds_latency_and_bandwidth() -> None:
    import links

    sizes = links.sizes(100)
    alpha, beta = links.fit(sizes, [2e-4 + 8e-8 * n for n in sizes])
    assert alpha == pytest.approx(2e-4, rel=0.3)  # a kB takes 0.08 ms by itself
    assert 8e-6 / beta == pytest.approx(100, rel=0.01)


@pytest.mark.slow
def test_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No link carries more than its rate; that it carries nearly as much is for the records, on a quiet machine."""
    import links
    from llmsys.comm import link

    if why := link.why_not():
        pytest.skip(why)
    (record,) = links.main(["--repeats", "1", "--out", str(tmp_path), "50/100"])
    for pattern in links.PATTERNS:
        assert 0 < record.summary[f"{pattern}_reached_mbit"] < record.summary["nominal_mbit"] == 50
    assert "| 50_100, 2 | 50 | all_reduce |" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^eth7: neither UP/DOWN in Mbit/s nor one of "):
        links.main(["eth7"])


@pytest.mark.slow
def test_ray_dispatch(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import ray_dispatch
    from llmsys import results

    for name in ray_dispatch.ALONE:
        monkeypatch.delenv(name, raising=False)  # what it sets is gone afterwards
    record = ray_dispatch.main(["--pairs", "1", "--jobs", "2", "--nodes", "1", "--out", str(tmp_path)])
    assert results.read(tmp_path) == [record]
    assert (record.summary["sweep/recorded"], record.summary["sweep/workers"]) == (2, 2)
    assert "overhead_s" in capsys.readouterr().out


@pytest.mark.slow
def test_decentral_recovery(tmp_path: Path) -> None:
    """It counts by itself whose losses are those of one provider alone."""
    import decentral_recovery

    record = decentral_recovery.main(["--runs", "1", "--steps", "8", "--out", str(tmp_path)])
    assert record.summary["equal"] == record.summary["runs"] == 4
    assert record.summary["steps_lost"] == 0
    assert {len(record.samples[f"{name}_s"]) for name in (*decentral_recovery.SCENARIOS, "broker")} == {1}


@pytest.mark.slow
def test_decentral_links(tmp_path: Path) -> None:
    import decentral_links

    record = decentral_links.main(["--mbit", "8", "--steps", "3", "--out", str(tmp_path)])
    assert len(record.samples["8mbit/step_ms"]) == 2
    assert record.summary["8mbit/step_ms"] >= 0.98 * record.summary["8mbit/predicted_ms"]  # a line is no faster


@pytest.mark.slow
def test_decentral_links_behind_codecs(tmp_path: Path) -> None:
    """A slow line is the faster, the fewer the bytes are; how much, on a machine with nothing else to do."""
    import decentral_links

    given = ["--mbit", "4", "--steps", "3", "--compress", "none,int8,adaptive", "--out", str(tmp_path)]
    found = decentral_links.main(given).summary
    assert found["4mbit/int8/step_ms"] < 0.7 * found["4mbit/step_ms"]
    assert found["4mbit/int8/predicted_ms"] == pytest.approx(0.27 * found["4mbit/predicted_ms"], rel=0.1)
    assert found["4mbit/int8/per_step_mib"] == pytest.approx(0.27 * found["4mbit/per_step_mib"], rel=0.1)
    assert found["4mbit/adaptive/compressed"] == found["4mbit/int8/compressed"] == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_decentral_generation(tmp_path: Path) -> None:
    """It compares texts by itself. Lines are slow by a clock: what has more of them to pay is slower on any machine."""
    import decentral_generation

    record = decentral_generation.main(["--runs", "1", "--lines", "home", "--out", str(tmp_path)])
    assert record.summary["same"] == record.summary["runs"] == 2
    assert record.summary["home/over_client"] > 1
    assert {len(took) for took in record.samples.values()} == {1}
    assert len(record.samples) == len(decentral_generation.WAYS) + len(decentral_generation.FAULTS)
