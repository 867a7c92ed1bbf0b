"""Claims about the task: every server gives what was asked for, and the record says how it ended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from serve_harness import passes_recorded

from llmsys import compose, job, lorafa, models, schema
from llmsys.bench.serve import served
from llmsys.dispatch.child import descendants
from rank_pool import briefly

Run = Callable[..., "CompletedProcess[str]"]


def record(results: Path) -> dict[str, Any]:
    (path,) = results.glob("*/*/record.json")
    made: dict[str, Any] = json.loads(path.read_text())
    return made


def lines(results: Path) -> list[dict[str, Any]]:
    (path,) = results.glob("*/*/requests.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [each for each in found if each["repeat"] >= 0]  # -1: of warming up


@pytest.mark.parametrize("server", briefly(["transformers", "static"], "transformers"))
def test_an_engine_in_process_gives_every_token(llmsys: Run, results: Path, server: str) -> None:
    """More requests than it takes at a time, of unequal lengths."""
    words = ["task.requests=5", "server.max_batch=2", "task.lengths=uniform", "task.spread=0.5"]
    done = llmsys("+exp=bench_serve_burst", "smoke=true", f"server={server}", *words)
    assert done.returncode == 0, done.stderr
    found = lines(results)
    assert len(found) == 10
    assert all(each["status"] == "ok" and len(each["token_s"]) == each["wanted"] for each in found)
    assert len({each["wanted"] for each in found}) > 1
    summary = record(results)["summary"]
    assert summary["ok"] == 10
    assert summary["output_tokens_per_s"] > 0


def test_a_run_of_which_requests_fail_keeps_its_figures_and_says_so(llmsys: Run, results: Path) -> None:
    done = llmsys("+exp=bench_serve_stub", "smoke=true", "server.faults=['500:4']")
    assert done.returncode == 1
    made = record(results)
    assert (made["status"], made["reason"]) == ("failed", "requests")
    assert made["error"].startswith("2 of 8 requests did not end well: 2 error; the first: HTTP 500")
    assert (made["summary"]["ok"], made["summary"]["error"]) == (6, 2)
    assert sorted(each["status"] for each in lines(results)) == ["error"] * 2 + ["ok"] * 6


def test_a_server_that_dies_ends_the_run_with_what_it_has(llmsys: Run, results: Path) -> None:
    done = llmsys("+exp=bench_serve_stub", "smoke=true", "server.faults=['die:5']", "task.repeats=3")
    assert done.returncode == 1
    made = record(results)
    assert (made["status"], made["reason"]) == ("failed", "server")
    assert "1 of 3 repeats were begun" in made["error"]
    assert "the server ended with code" in made["error"]
    assert made["summary"]["ok"] >= 1


def test_a_server_that_dies_while_it_warms_up_is_what_the_run_says(llmsys: Run, results: Path) -> None:
    done = llmsys("+exp=bench_serve_stub", "smoke=true", "server.faults=['die:1']", "task.warmup=2")
    assert done.returncode == 1
    made = record(results)
    assert (made["status"], made["reason"]) == ("failed", "server")
    assert "the server ended with code" in made["error"]
    assert made["summary"]["requests"] == 0


def test_a_load_stands_beside_its_prediction_and_what_our_client_adds(llmsys: Run, results: Path) -> None:
    """Predicted from passes that were measured here; nothing but passes is in it, so that it is more than there was."""
    timed = llmsys("+exp=bench_serve_modules", "smoke=true")
    assert timed.returncode == 0, timed.stderr
    (path,) = results.glob("bench_serve_modules/*/record.json")
    words = ["task.check_client=true", f"task.speeds={path.parent}", "server=static", "task.output_tokens=8"]
    done = llmsys("+exp=bench_serve_burst", "smoke=true", *words)
    assert done.returncode == 0, done.stderr
    (path,) = results.glob("bench_serve_burst/*/record.json")
    made = json.loads(path.read_text())
    summary = made["summary"]
    assert made["notes"]["predicted"].startswith("by the passes of ")
    assert made["notes"]["peak_gbps"].endswith("the same for all servers")  # and of this machine
    assert 0.2 * summary["output_tokens_per_s"] < summary["predicted/output_tokens_per_s"]
    assert summary["predicted/ttft_ms_p50"] <= summary["predicted/e2e_ms_p50"]
    assert 0 < summary["client/added_ms_p50"] <= summary["client/added_ms_p99"]
    assert summary["client/lag_ms_p99"] >= 0
    text = (path.parent / "serve.md").read_text()
    again = llmsys("+exp=bench_serve_burst", "smoke=true", *words[1:], f"task.served={path.parent}", "task.seed=1")
    assert again.returncode == 0, again.stderr
    (other,) = set(results.glob("bench_serve_burst/*/record.json")) - {path}
    made = json.loads(other.read_text())
    assert f"as {path.parent} has found of this server with 4 requests under way" in made["notes"]["predicted"]
    nearer = made["summary"]["predicted/e2e_ms_p50"]  # another load of the same lengths: with what was measured there
    assert nearer == pytest.approx(summary["slower"] * summary["predicted/e2e_ms_p50"], rel=0.02)
    assert "Our client adds" in text
    assert "| first token p50, ms |" in text


@pytest.mark.slow
def test_a_rate_that_the_stub_always_keeps_is_said_to_have_no_bound(llmsys: Run, results: Path) -> None:
    """Until our own client cannot send as fast; then no rate of the server's is known."""
    words = ["task.arrivals=constant", "task.rate=500", "task.concurrency=0", "task.max_rate=true", "task.probe_s=0.2"]
    done = llmsys("+exp=bench_serve_stub", "smoke=true", *words, "task.slo_e2e_ms=60000", "task.output_tokens=1")
    assert done.returncode == 0, done.stderr
    made = record(results)
    assert (made["summary"]["max_rate_bounded"], made["summary"]["max_rate_confirmed"]) == (0, 0)
    assert "a second our client was late" in made["notes"]["max_rate_per_s"]


def test_a_killed_run_leaves_no_server(results: Path) -> None:
    """SIGKILL, while a request is under way."""
    words = ["+exp=bench_serve_stub", "smoke=true", "server.ttft_ms=60000", f"results={results}"]
    run = subprocess.Popen([sys.executable, "-m", "llmsys", *words], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (servers := [pid for pid in descendants(run.pid) if b"serve.stub" in command(pid)]):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        run.kill()
        run.wait()
    while any(b"serve.stub" in command(pid) for pid in servers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["server=openai"], "needs either server.url"),
        *[
            (["server=openai", f"server.url={url}"], f"server.url={url}: must be http://")
            for url in ("localhost:80", "http://", "http://:80", "http://host:many", "http://host:0")
        ],
        (["server=openai", "server.command=[run]"], "says nowhere {port}"),
        (["server.merge=true"], "server.merge=true: needs server.adapter"),
        (["server.adapter=random:x"], "server.adapter=random:x: must be a folder, or a rank"),
        (["server=stub", "server.faults=['rain:2']"], "server.faults=rain:2: fault=rain: must be one of"),
    ],
)
def test_a_setting_that_cannot_be_is_named(words: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        schema.build(compose.compose(["+exp=bench_serve_burst", *words]))


MISTAKES = [
    ("burst", ["model=bert_tiny", "data=code_packages"], "model=bert_tiny: generates no text"),
    (
        "burst",
        ["task.output_tokens=5000"],
        "task.prompt_tokens and task.output_tokens: 5128 tokens, and",
    ),
    ("rate", ["task.output_tokens=600", "task.lengths=uniform", "task.spread=0.9"], "task.output_tokens: "),
    ("burst", ["task.arrivals=trace", "task.trace=none.csv"], "task.trace=none.csv: no such file"),
    ("burst", ["task.arrivals=trace", "task.trace={folder}/bad.csv"], "bad.csv: line 2: must be seconds and two"),
    ("burst", ["task.arrivals=trace", "task.trace={folder}/long.csv"], "long.csv: 5004 tokens, and model=llama_6m"),
    ("burst", ["server.adapter={folder}"], "has no adapter.safetensors"),
    ("modules", ["server.adapter={folder}"], "has no adapter.safetensors"),
    ("burst", ["server=vllm", "model.quant=nf4"], "model.quant=nf4: is for server=transformers"),
    ("burst", ["task.served={folder}"], "needs task.speeds too"),
    ("burst", ["task.speeds={folder}/record.json"], "passes of another model were measured"),
    ("modules", ["task.contexts=[8,64,5000]"], "task.contexts, and one more token: 5001 tokens"),
]


@pytest.mark.parametrize(("exp", "words", "why"), MISTAKES)
def test_a_mistake_is_said_before_anything_is_started(tmp_path: Path, exp: str, words: list[str], why: str) -> None:
    rows = "arrival_s,input_tokens,output_tokens\n"
    (tmp_path / "bad.csv").write_text(rows + "0,-1,4\n")
    (tmp_path / "long.csv").write_text(rows + "0,5000,4\n")
    passes_recorded(tmp_path)
    asked = [each.replace("{folder}", str(tmp_path)) for each in words]
    with pytest.raises(ValueError, match=re.escape(why)):
        job.make(compose.compose([f"+exp=bench_serve_{exp}", *asked]))


def test_a_mistake_is_one_line(llmsys: Run) -> None:
    done = llmsys("+exp=bench_serve_burst", "smoke=true", "task.output_tokens=5000")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("llmsys: task.prompt_tokens and task.output_tokens: 5008")
    assert "Traceback" not in done.stdout + done.stderr


def test_a_run_is_what_its_trace_and_its_adapters_hold(tmp_path: Path) -> None:
    """Wherever they lie: an edited trace is another load, and a copy of it is not."""

    def identifier(folder: str, row: str = "0,8,4", adapter: bytes = b"one") -> str:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "load.csv").write_text(f"arrival_s,input_tokens,output_tokens\n{row}\n")
        (place / "adapter.safetensors").write_bytes(adapter)
        words = ["task.arrivals=trace", f"task.trace={place}/load.csv", f"server.adapter={place}"]
        made = job.make(compose.compose(["+exp=bench_serve_burst", *words]))
        assert made.inputs == {"trace": str(place / "load.csv"), "adapter": str(place)}
        return made.run_id

    first = identifier("a")
    assert identifier("b") == first
    assert identifier("a", row="0,8,5") != first
    assert identifier("a", adapter=b"two") != first


def test_passes_with_an_adapter_are_another_run() -> None:
    """Of `bench_serve_modules`, which looks at nothing else of a server."""

    def identifier(*words: str) -> str:
        return job.make(compose.compose(["+exp=bench_serve_modules", *words])).run_id

    assert identifier("server=stub") == identifier()
    assert identifier("server.adapter=random:4") != identifier()


TECHNIQUES = {
    "Q": ["model.quant=nf4"],
    "adapter": ["server.adapter=random:4"],
    "merged": ["server.adapter=random:4", "server.merge=true"],
    "eager": ["model.attention=eager"],
}


@pytest.mark.parametrize("technique", briefly(TECHNIQUES, "adapter"))
def test_techniques_are_served(llmsys: Run, results: Path, technique: str) -> None:
    done = llmsys("+exp=bench_serve_burst", "smoke=true", "task.repeats=1", *TECHNIQUES[technique])
    assert done.returncode == 0, done.stderr
    assert record(results)["summary"]["ok"] == 4


def test_adapters_say_the_same_merged_and_beside_the_weights(tmp_path: Path) -> None:
    def fresh() -> Any:
        cfg = schema.build(compose.compose(["model=llama_tiny"])).model
        how: dict[str, Any] = {"objective": "causal_lm", "num_labels": 0, "device": torch.device("cpu")}
        return models.load(cfg, **how, seed=0, folder=None).eval()

    ids = torch.arange(4, 20)[None]
    trained = lorafa.inject(fresh(), lorafa.LoRAFAConfig(r=4))
    draw = torch.Generator().manual_seed(0)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1, generator=draw)
    lorafa.save_adapter(trained, tmp_path)
    said = []
    for merge in (False, True):
        own = schema.InProcessServer(adapter=str(tmp_path), merge=merge)
        with torch.inference_mode():
            said.append(served.adapted(fresh(), own, 0, own.adapter)(input_ids=ids).logits)
    with torch.inference_mode():
        assert not torch.allclose(said[0], fresh()(input_ids=ids).logits, atol=1e-2)
    assert torch.allclose(said[0], said[1], atol=1e-4)
