"""Claims about the page: it needs nothing but itself, hides nothing, and believes no record."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_harness import ROOT, calibration, cell, on_gpu

from llmsys import results
from llmsys.bench import workloads
from llmsys.bench.modules import figures
from llmsys.bench.report import html, pictures, svg
from llmsys.bench.report.__main__ import main
from llmsys.bench.report.advised import advised
from llmsys.bench.report.page import page
from llmsys.bench.report.predicted import LEAST
from llmsys.job import Record
from llmsys.spread import spread

VOID = ("meta", "link", "br", "img", "input", "hr")
HOSTILE = """</style></svg><script>alert("1")</script><img src=x onerror='alert(2)'>"""
GRID = ["Naive", "F", "R", "F+R", "Z2", "F+Z2", "Z3", "F+Z3", "Z3+O", "Q"]


class Tags(HTMLParser):
    """Every tag that is opened and closed, in order; the text, by the section it stands in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.section, self.texts = "", dict[str, str]()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag == "section":
            self.section = str(dict(attrs)["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + data + " "


def parsed(records: Sequence[Record]) -> Tags:
    found = Tags(page(records, "results"))
    assert not found.open
    return found


def grid() -> list[Record]:
    """A sweep with repeats, predictions, phases, and every way to fail."""
    found = []
    for index, name in enumerate(GRID):
        for repeat in range(3):
            tokens = 1000 + 50 * index + 5 * repeat
            more = {"forward_ms_p50": 3e5 / tokens, "backward_ms_p50": 6e5 / tokens, "predicted_peak_gib": 1.0}
            more |= {"predicted_step_ms": 900.0, "profiler_overhead_us_per_step": 20.0, "tokens_per_j": 5.0}
            more |= {"mfu": 0.31, "hfu": 0.42, "achieved_tflops": 0.05, "weights_bytes": 3.0 * 2**30}
            more |= {"saved_bytes": 7.0 * 2**30, "activations_bytes": 5.0 * 2**30, "logits_bytes": 2.0 * 2**30}
            if "Z" in name:
                more |= {"communication_busy_ms": 123.0}
            found.append(cell(name, tokens, 1.0 + 0.1 * index, repeat=repeat, **more))
    found += [cell("F+R+Z2", status=status, reason=f"because {status}") for status in ("oom", "crashed", "hang")]
    found += [cell("R+Z3", batch=batch, status="skipped", reason="witness") for batch in (4, 16)]
    killed = cell("R+Z2", status="crashed", reason="unfinished")
    killed.env = {}
    return [*found, killed]


def modules(slow: float = 1.0) -> Record:
    """A record of bench_modules in which clocks of modules cost 2 percent times `slow`."""
    record = cell("F")
    record.task = record.name = "bench_modules"
    rows = {"qkv": {"forward": [2.0, 2.0], "backward": [4.0, 4.0]}, "optimizer": {"": [3.0, 3.0]}}
    rows["unattributed"] = {"": [1.0, 1.0]}
    summary = figures.modules(rows, {}, 1e12)
    summary |= figures.overheads({"bare": [100.0] * 3, "phases": [100.5] * 3, "modules": [100.0 + 2 * slow] * 3})
    record.summary = {**summary, "peak_measured": 1}
    return record


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    text = page([*grid(), modules()], "results")
    found = Tags(text)
    assert not {tag for tag, _ in found.seen} & {"script", "link", "img", "iframe", "object", "embed", "form"}
    links = [value for _, own in found.seen for key, value in own.items() if key in ("href", "src", "action", "data")]
    targets = {str(own["id"]) for _, own in found.seen if "id" in own}
    assert {str(link) for link in links} == {f"#{target}" for target in targets}
    assert not re.search(r"url\(|@import|https?://", text)
    assert not [key for _, own in found.seen for key in own if key.startswith("on")]


def test_what_records_say_is_text_wherever_it_stands() -> None:
    record = cell("F")
    record.name = record.run_id = record.reason = record.error = record.data_hash = HOSTILE
    record.config["model"]["name"] = record.config["data"]["kind"] = HOSTILE
    record.config |= {"command": [HOSTILE], "techniques": HOSTILE}
    record.env |= {
        "device_name": HOSTILE,
        "git_sha": HOSTILE,
        "variables": {HOSTILE: HOSTILE},
        "packages": {"torch": HOSTILE},
    }
    record.notes = {"communication_ms": HOSTILE, HOSTILE: HOSTILE}
    other = cell("R", status="failed", reason=HOSTILE)
    other.error = HOSTILE
    odd = cell("Z2")
    odd.config["method"]["kind"] = HOSTILE  # settings that this version does not know
    timed = modules()
    timed.config["model"]["name"] = timed.config["model"]["attention"] = HOSTILE
    advice = cell("F")
    advice.task, advice.notes = "bench_advise", {"choice": HOSTILE, "binds": HOSTILE}
    text = page([record, other, odd, timed, advice], HOSTILE)
    found = Tags(text)
    assert not found.open
    assert not {tag for tag, _ in found.seen} & {"script", "img"}
    assert not [key for _, own in found.seen for key in own if key.startswith("on")]
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 10


def test_it_needs_neither_torch_nor_a_picture_library_nor_a_display(tmp_path: Path) -> None:
    out = tmp_path / "made" / "report.html"
    words = [str(ROOT / "benchmarks" / "records" / "bench_engines"), "-o", str(out)]
    code = "import sys; sys.modules |= dict.fromkeys(('torch', 'matplotlib', 'pandas', 'hydra', 'transformers'))\n"
    code += f"from llmsys.bench.report.__main__ import main; main({words!r})"
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(out)), done.stderr
    assert out.read_text().startswith("<!doctype html>")


def test_an_empty_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, why in ((tmp_path, "no record.json below it"), (tmp_path / "none", "no such folder")):
        with pytest.raises(SystemExit) as ended:
            main([str(folder), "-o", str(tmp_path / "report.html")])
        assert why in str(ended.value)
        assert "\n" not in str(ended.value)
    assert not (tmp_path / "report.html").exists()
    assert not capsys.readouterr().out


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """A terminal, a pipe, a device: an atomic write would put a file in its place."""
    (tmp_path / "records").mkdir()
    cell("F").write(tmp_path / "records")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 2**20)
        main([str(tmp_path / "records"), "-o", str(pipe)])
        assert os.read(reader, 15) == b"<!doctype html>"
        assert pipe.is_fifo()
    finally:
        os.close(reader)
    with pytest.raises(SystemExit, match="is a folder"):
        main([str(tmp_path / "records"), "-o", str(tmp_path)])


def test_records_of_every_kind_make_a_page() -> None:
    """The smallest of the published records: of tasks that have no cells too."""
    folders = ("bench_engines", "compress_simulate", "lorafa_speed", "loop_overhead", "pretrain_t5_4m", "lorafa_minilm")
    records = [record for name in folders for record in results.read(ROOT / "benchmarks" / "records" / name)]
    found = parsed(records)
    assert f"{len(records)} records from" in found.texts[""]
    for task in {record.task for record in records}:
        assert task in found.texts["origin"]


@pytest.mark.parametrize("reason", ["unfinished", "signal"])
def test_a_folder_in_which_nothing_has_ended_yet_says_so(reason: str) -> None:
    running = cell("F", status="crashed", reason=reason)
    running.env = {}
    found = parsed([running])
    assert "No workload has two cells" in found.texts["answer"]
    assert ("still running" in found.texts["failures"]) == (reason == "unfinished")


def test_every_failure_is_there_with_its_reason() -> None:
    records = grid()
    found = parsed(records)
    for record in records:
        if record.status != "ok":
            assert record.run_id in found.texts["failures"]
            assert f"{record.status} ({record.reason})" in found.texts["failures"]
    assert "OOM" in found.texts["tables"]
    assert "not run" in found.texts["tables"]


def test_the_answer_comes_first_and_names_what_it_left_out() -> None:
    found = parsed(grid())
    sections = [str(own["id"]) for tag, own in found.seen if tag == "section"]
    assert sections[0] == "answer"
    said = found.texts["answer"]
    assert "Most tokens a second Z3+O" in re.sub(r"\s+", " ", said)  # not Q, though it is faster
    assert "train no linear weight" in said
    assert "tokens/J" in said


def test_overhead_is_printed_in_every_report() -> None:
    """Also where nothing was measured; and flagged where it is more than it may be."""
    assert "not measured" in parsed([cell("F")]).texts["overhead"]
    good, bad = (parsed([cell("F"), modules(slow)]).texts["overhead"] for slow in (1.0, 3.0))
    assert "2.0 %" in good
    assert "flagged" not in good
    assert "6.0 %" in bad
    assert "flagged" in bad
    counted = parsed([cell("F", 1e6 / 20, profiler_overhead_us_per_step=400.0)]).texts["overhead"]
    assert "2.0 %" in counted, "0.4 ms of a step of 20 ms"
    assert "flagged" in counted


def test_what_engines_do_behind_other_work_stands_beside_the_phases() -> None:
    """Collectives that are hidden in a phase, as overlapped: no part of the sum, which is still the step. Of a GPU that
    offloads also copies."""
    said = parsed(grid()).texts["phases"]
    assert "collectives, overlapped" in said
    assert "123 (15 %)" in re.sub(r"\s+", " ", said), "of Z2's 830 ms"
    assert "copies, overlapped" not in said
    assert "Ranks that wait for each other are in it" in said
    assert "overlapped" not in parsed([cell("F", forward_ms_p50=1.0)]).texts["phases"]
    away = on_gpu(cell("Z2+O", forward_ms_p50=300.0, offload_busy_ms=77.0), peak_gib=1.0)
    away.notes = {"offload_ms": "copies within backward and optimizer"}
    said = parsed([away]).texts["phases"]
    assert "77.0 (8 %)" in said
    assert "copies within backward" in said


def test_use_of_the_device_and_memory_by_kind_have_tables() -> None:
    said = {name: re.sub(r"\s+", " ", text) for name, text in parsed(grid()).texts.items()}
    for part in ("MFU %", "31.0", "HFU %", "42.0", "tokens/J", "5.00"):
        assert part in said["use"]
    for part in ("weights", "3.00", "activations", "5.00", "logits", "2.00", "together"):
        assert part in said["memory"]
    assert "saved" not in said["memory"].partition("GiB.")[0], "which is activations and logits"
    old = parsed([cell("F", weights_bytes=2.0**30, saved_bytes=7.0 * 2**30)])
    assert "saved 7" not in old.texts["use"]
    assert "7.00" in old.texts["memory"], "where they were not told apart"
    measured_on = on_gpu(cell("F", weights_bytes=2.0**30), peak_gib=9.0, reserved_gib=11.0, workspace_bytes=2.0**29)
    said = parsed([measured_on]).texts
    assert all(part in said["memory"] for part in ("workspace", "0.500", "peak", "9.00", "reserved", "11.0"))
    assert "No cell has MFU" in said["use"]


def test_predictions_are_made_of_the_records_and_the_lower_bound_is_called_one() -> None:
    """The chart of time needs a calibration, or a card that is listed; without either the reason is there."""
    records = grid()
    said = re.sub(r"\s+", " ", parsed(records).texts["predicted"])
    assert "Accounted memory of a rank" in said
    assert "10 cells without: no calibration of" in said
    assert LEAST in said
    assert "900" in said.partition(LEAST)[2]
    said = re.sub(r"\s+", " ", parsed([*records, calibration()]).texts["predicted"])
    assert said.count("10 of 10 cells have a prediction.") == 2
    assert "Time by speeds: measured on 2 ranks" in said
    failed = parsed([cell("F", status="oom", reason="host memory")]).texts["predicted"]
    assert "Nothing was measured" in failed


def test_drift_is_told_by_the_cell_that_was_repeated_most() -> None:
    """It got 10 % slower over three hours; what ran beside its last measurement is named, what ran early is not."""
    references = [cell("F", 1000.0 / slower, repeat=i) for i, slower in enumerate((1.0, 1.0, 1.1))]
    beside = [cell("R"), cell("F+R")]
    for record, hour in zip([*references, *beside], (0, 1, 3, 0, 3), strict=True):
        record.started = f"2026-01-01T{hour:02}:30:00+00:00"
    text = parsed([*references, *beside]).texts["spread"]
    assert "F was measured 3 times: drift +10.0 %, at most +10.0 % off its median." in text
    assert "Measured while it was off: F+R." in text
    assert "drift" not in parsed([*references[:2], *beside]).texts["spread"]


@pytest.mark.parametrize(("kind", "flagged"), [("cpu", False), ("cuda", True)])
def test_spread_is_flagged_beyond_what_the_device_is_allowed(kind: str, flagged: bool) -> None:
    """3 % over fresh processes: fine on a CPU (5 %), too much on a GPU (2 %)."""
    records = [cell("F", tokens, repeat=i) for i, tokens in enumerate((970, 1000, 1030))]
    if kind == "cuda":
        records = [on_gpu(record, peak_gib=1.0) for record in records]
    found = parsed(records).texts
    assert ("1 cell of 1 flagged" in found["spread"]) == flagged
    assert ("none of 1 cell flagged" in found["spread"]) != flagged
    assert "Nothing was repeated" in parsed([cell("F")]).texts["spread"]


def test_the_same_records_give_the_same_page() -> None:
    assert page(grid(), "results") == page(grid(), "results")


def test_one_run_in_two_folders_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        cell("F").write(tmp_path / name)
    main([str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "page.html")])
    assert "1 record from a, b" in (tmp_path / "page.html").read_text()
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((1234.5678,), "1,235"),
        ((0.012345,), "0.0123"),
        ((1000.0, 1010.0, 1020.0), "1,010 ± 25"),
        ((10000.0, 10400.0), "10,200 ± 2,500"),
        ((0.5, 0.51, 0.52), "0.510 ± 0.025"),
        ((7.0, 7.0, 7.0), "7.00"),
    ],
)
def test_no_digit_that_the_interval_does_not_allow(values: tuple[float, ...], text: str) -> None:
    assert html.measured(spread(values), len(values)) == text


def test_marks_lie_where_their_axes_say() -> None:
    """The pixel of each point, read back through the ticks that are drawn."""
    points = [svg.Point(x=x, y=y, series="s", colour=0, title="t") for x, y in ((0.0, 0.0), (5.0, 20.0), (10.0, 40.0))]
    drawn = Tags(svg.scatter(points, svg.axis("x", [0, 10]), svg.axis("y", [0, 40])))
    dots = [(float(str(own["cx"])), float(str(own["cy"]))) for tag, own in drawn.seen if tag == "circle"]
    left, middle, right = dots
    assert middle == (pytest.approx((left[0] + right[0]) / 2), pytest.approx((left[1] + right[1]) / 2))
    vertical = [float(str(own["x1"])) for tag, own in drawn.seen if tag == "line" and own["x1"] == own["x2"]]
    assert (min(vertical), max(vertical)) == (left[0], right[0])


def test_bars_add_up_to_the_step() -> None:
    rows = [svg.Bar(name="a", parts={"forward": 10.0, "backward": 30.0}), svg.Bar(name="b", parts={"forward": 20.0})]
    rects = [own for tag, own in Tags(svg.bars(rows, "ms")).seen if tag == "rect"]
    widths = [float(str(own["width"])) for own in rects]
    assert widths[0] + widths[1] == pytest.approx(2 * widths[2], abs=0.2)
    assert float(str(rects[1]["x"])) == pytest.approx(float(str(rects[0]["x"])) + widths[0], abs=0.2)


@pytest.mark.parametrize("values", [(5.0, 5.0), (0.0, 0.0), (-3.0, 7.0), (1e-9, 2e-9), (1.0, 1e12)])
def test_axes_of_any_values_have_ticks_around_them(values: tuple[float, float]) -> None:
    found = svg.axis("x", values)
    assert found.low <= min(values) <= max(values) <= found.high
    assert 2 <= len(found.ticks) <= 12
    assert 0 <= found.share(values[0]) <= 1


def test_pictures_draw_the_same_cells() -> None:
    (workload,) = workloads.workloads([record for record in grid() if record.status == "ok"])
    assert len(pictures.predicted(workload, [calibration()]).axes) == 2
    axes = pictures.over_memory(workload).axes[0]
    drawn = [each for line in axes.lines if line.get_linestyle() == "None" for each in line.get_xdata()]
    wanted = {each.memory.mean / 2**30 for each in workload.measured if each.memory}
    assert {round(x, 9) for x in drawn} == {round(x, 9) for x in wanted}
    assert pictures.phases(workload).axes[0].patches
    assert len(pictures.predicted(workload).axes) == 1, "of time nothing is known without a calibration"
    assert pictures.letters(workload).axes[0].lines
    assert pictures.modules(modules()).axes[0].patches
    (empty,) = workloads.workloads([cell("F", status="oom", reason="host memory")])
    for draw in (pictures.over_memory, pictures.letters, pictures.phases, pictures.predicted):
        with pytest.raises(ValueError, match="llama_6m"):
            draw(empty)


def test_advice_is_asked_for_cards_that_are_known_and_for_no_other() -> None:
    """Of a CPU nothing is known without a calibration. Only letters that were tried are combined."""
    assert advised(workloads.workloads([cell("F"), cell("Z3")])[0]) == ""
    keys = {"train.precision": "bf16", "model.dtype": "bf16"}
    records = [on_gpu(cell(text, tokens, keys=keys), peak_gib=1.0) for text, tokens in (("F", 9e5), ("Z3", 3e5))]
    (workload,) = workloads.workloads(records)
    said = re.sub(r"\s+", " ", " ".join(Tags(advised(workload)).texts.values()))
    for goal in ("throughput", "fit"):
        assert re.search(rf"{goal} (Naive|F|Z3|F\+Z3) at micro-batch \d+ (measured|predicted) [\d,.]+", said), said


def test_every_class_of_a_mark_has_a_style() -> None:
    text = page([*grid(), modules()], "results")
    style = text[text.index("<style>") : text.index("</style>")]
    used = {name for _, own in Tags(text).seen for name in str(own.get("class") or "").split()}
    assert {"h0", "s0", "k0"} <= used, "Q is hollow"
    known = set(re.findall(r"\.([a-z][\w-]*)", style))
    assert used <= known
