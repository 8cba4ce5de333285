"""Figures, orders, cases, limits and reports of benchmarks, without a model."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from d2zero_bench.candidates import Outcome
from d2zero_bench.cases import Case, Photos, make_cases, parse_counts, parse_sizes
from d2zero_bench.environment import environment, instructions, without_folders
from d2zero_bench.gates import Gate, failures
from d2zero_bench.measure import Measurement, compare
from d2zero_bench.page import latency_figure, page, tradeoff_figure
from d2zero_bench.plan import Plan
from d2zero_bench.plots import COLOURS
from d2zero_bench.report import (
    ARRAY,
    FILE,
    STAGES,
    Accuracy,
    CandidateInfo,
    Equality,
    Report,
    Result,
    Sample,
    Spread,
    ratios,
    throughput,
)
from d2zero_bench.rounds import round_order
from d2zero_bench.tables import difference, tables
from d2zero_bench.worker import Memory, Worker, prepare, read_memory, run
from d2zero_runtime import D2ZeroError, Preprocessing
from studies import roofline, speed_tables

CASE = Case(96, 128)


def sample(network: float, rest: float = 1.0) -> Sample:
    """On a GPU, with half a millisecond of copies."""
    return {"decode": rest, "preprocess": rest, "inference": network + 0.5, "postprocess": rest, "network": network}


def full_report() -> Report:
    """Two models and a peer in four cases, with accuracy: every section has something to show."""
    report = Report(
        "a <title>", {"processor": "CPU & more", "versions": {"numpy": "2"}, "date": "2026-11-22"}, {"rounds": 3}, "a"
    )
    kinds = {"a": "d2zero", "b:published": "d2zero", "mask2former": "peer"}
    report.candidates = [CandidateInfo(name, kind, "torch", megabytes=2.5) for name, kind in kinds.items()]
    for case in (CASE, Case(192, 128), Case(96, 128, 4), Case(96, 128, 1, 80)):
        report.results += [
            Result("a", case, [sample(10), sample(20), sample(30)], 100.0),
            Result("b:published", case, [sample(20), sample(40), sample(90)], 200.0, 50.0),
            Result("mask2former", case, [{"network": 15.0}] * 3, 300.0),
        ]
    report.equality = [Equality("b:published", CASE, 1e-6, 2.5, ("mask_logits differ by 2.50e+00 (limit 1e-03)",))]
    report.accuracy = [
        Accuracy(n, "gzsis", 9, {"hm_ap50": v, "ap": 1.0}) for n, v in (("a", 61.5), ("b:published", 60))
    ]
    report.failures = {"c": "out of memory"}
    report.complete = True
    return report


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).exponential(10, count).tolist()
    found = Spread.of(values)
    for percent in (10, 50, 90, 99):
        assert getattr(found, f"p{percent}") == np.percentile(values, percent)


def test_stages_add_up_to_the_scopes() -> None:
    result = Result("a", CASE, [sample(9.5, 2), sample(29.5, 4)])
    assert result.times(FILE) == [16, 42] and result.times(ARRAY) == [14, 38] and result.whole
    assert sum(result.times(stage)[1] for stage in STAGES) == result.times(FILE)[1]
    peer = Result("peer", CASE, [{"network": 5.0}])
    assert peer.times(FILE) == peer.times(ARRAY) == [] and peer.times("network") == [5.0] and not peer.whole
    assert throughput([16, 42], 4) == pytest.approx(1000 * 8 / 58)
    assert Result("a", Case(96, 128, 4), result.samples).images_per_second == pytest.approx(1000 * 8 / 58)


def test_ratios_are_of_the_same_round() -> None:
    """A machine that slows down tenfold half way changes no ratio."""
    baseline = [1.0, 1.0, 10.0, 10.0]
    assert ratios([2.0, 2.0, 20.0, 20.0], baseline) == Spread(2, 2, 2, 2)
    assert ratios([20.0, 2.0, 20.0, 2.0], baseline).p50 == pytest.approx(2.0)
    with pytest.raises(ValueError):
        ratios([1.0], baseline)
    report = full_report()
    found = report.ratio(report.results[1], "network")
    assert found is not None and found.p50 == 2.0 and found.p90 == pytest.approx(2.8)
    assert report.ratio(report.results[2]) is None  # a peer has no whole


def test_the_order_of_a_round_is_drawn_from_the_seed() -> None:
    names = ["a", "b", "c"]
    orders = [tuple(round_order(names, str(CASE), number, 0)) for number in range(60)]
    assert orders == [tuple(round_order(names, str(CASE), number, 0)) for number in range(60)]
    assert len(set(orders)) == 6 and all(set(order) == set(names) for order in orders)
    assert orders != [tuple(round_order(names, str(CASE), number, 1)) for number in range(60)]
    first = [order[0] for order in orders]
    assert all(10 <= first.count(name) <= 32 for name in names)  # nobody is favoured


class Fake(Worker):
    """A worker that writes down when it ran, and fails or is interrupted when told to."""

    def __init__(self, name: str, log: list[str], error: BaseException | None = None, at: int = 0) -> None:
        self.info, self.log, self.error, self.at = CandidateInfo(name, "d2zero", "none"), log, error, at
        self.runs = 0

    def ask(self, function: object, *arguments: Any, **named: Any) -> Any:
        if function is prepare:
            self.log.append(f"prepare {self.info.name}")
        if named.get("with_logits"):
            return Outcome(sample(1.0), (np.zeros((1, 2, 3), np.float32), np.ones((1, 2, 4, 4), np.float32)))
        if function is run:
            self.runs += 1
            if self.error is not None and self.runs == self.at:
                raise self.error
            self.log.append(self.info.name)
            return Outcome(sample(float(self.runs)))
        return Memory(5.0, None) if function is read_memory else None


def measured(*fakes: Fake, rounds: int = 5) -> Report:
    report = Report("t", {}, {}, fakes[0].info.name)
    report.candidates = [fake.info for fake in fakes]
    photos = Photos(Path(), (Path("0.jpg"),))
    workers = {fake.info.name: fake for fake in fakes}
    plan = Plan((Path("a.onnx"),), rounds=rounds, warmup=1)
    measurement = Measurement(workers, photos, report, plan, lambda items, *_: items)
    try:
        measurement.run([CASE])
    except KeyboardInterrupt:
        return report
    report.complete = True
    return report


def test_candidates_take_turns_round_by_round() -> None:
    log: list[str] = []
    report = measured(Fake("a", log), Fake("b", log), Fake("c", log))
    assert log[:6] == ["prepare a", "a", "prepare b", "b", "prepare c", "c"]  # warm-up, which does not count
    rounds = [log[start : start + 3] for start in range(6, 21, 3)]
    assert rounds == [round_order(["a", "b", "c"], f"{CASE} (1 of 1)", number, 0) for number in range(5)]
    assert [len(result.samples) for result in report.results] == [5, 5, 5]
    assert report.results[0].samples[0]["network"] == 2.0 and report.results[0].host_mb == 5.0
    assert [entry.candidate for entry in report.equality] == ["b", "c"] and not report.equality[0].failures


def test_an_interruption_keeps_whole_rounds() -> None:
    report = measured(Fake("a", []), Fake("b", [], KeyboardInterrupt(), at=4))  # in the third round
    assert not report.complete
    assert [len(result.samples) for result in report.results] == [2, 2]


def test_who_fails_is_left_out_and_the_others_go_on() -> None:
    report = measured(Fake("a", []), Fake("b", [], D2ZeroError("cannot read /home/somebody/x.jpg"), at=3))
    assert report.complete and report.failures == {"b": "cannot read x.jpg"}
    assert [len(result.samples) for result in report.results] == [5, 1]
    early = measured(Fake("a", []), Fake("b", [], D2ZeroError("too large"), at=1))
    assert [result.candidate for result in early.results] == ["a"]


def test_a_different_model_is_marked_not_hidden() -> None:
    theirs = np.ones((1, 2, 3), np.float32), np.ones((1, 2, 4, 4), np.float32)
    both = CandidateInfo("b", "d2zero", "torch"), CandidateInfo("a", "d2zero", "torch")
    close = compare(both, CASE, theirs, (theirs[0] + np.float32(2**-17), theirs[1]))
    assert close.failures == () and close.class_logits == 2**-17
    far = compare(both, CASE, theirs, (theirs[0], theirs[1] - 0.5))
    assert far.mask_logits == 0.5 and far.failures[0].startswith("mask_logits differ by 5.00e-01 (limit 1e-03)")
    assert difference(close) == "8e-06" and difference(replace(close, mask_logits=6e-3)) == "8e-06 (6e-03)"
    assert difference(replace(close, class_most=None, mask_most=None)) == "8e-06"  # an older report
    other = compare(both, CASE, theirs, (np.zeros((1, 2, 9), np.float32), theirs[1]))
    assert other.class_logits is None and "another model" in other.failures[0]
    shorter = compare((replace(both[0], decoder_layers=3), replace(both[1], decoder_layers=9)), CASE, theirs, theirs)
    assert shorter.failures == ("another model: it has 3 decoder layers, the baseline 9",)
    console = Console(width=140)
    with console.capture() as shown:
        console.print(tables(full_report())[0].for_terminal())
    assert "DIFFERS" in shown.get() and "mask_logits differ by" in page(full_report())


def test_limits_name_candidate_value_and_limit() -> None:
    report = full_report()
    assert failures(report, (Gate.parse("--max-p90", "1000"),), (Gate.parse("--min-hm", "50"),)) == []
    slow = failures(report, (Gate(50.0),), ())
    assert (
        len(slow) == 4 and slow[0] == "b:published: p90 of file → detections 83.5 ms at 96×128, batch 1 (limit 50 ms)"
    )
    assert failures(report, (Gate.parse("--max-p90", "a=20"),), ())[0].startswith("a: p90 of file → detections 31.5 ms")
    assert failures(report, (), (Gate(61.0),)) == ["b:published: HM AP50 60.00 (limit 61)"]
    report.accuracy = []
    assert "a: HM AP50 was not measured" in failures(report, (), (Gate(1.0),))[0]
    report.results = []
    assert "a: p90 was not measured" in failures(report, (Gate(1.0),), ())[0]
    with pytest.raises(D2ZeroError, match="--max-p90 must be a number"):
        Gate.parse("--max-p90", "a=fast")
    with pytest.raises(D2ZeroError, match="a limit is for 'z'"):
        Plan((Path("a.onnx"),), max_p90=(Gate(1.0, "z"),))


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = full_report()
    report.write(tmp_path / "deep" / "r.json")
    assert Report.read(tmp_path / "deep" / "r.json") == report
    figures = json.loads((tmp_path / "deep" / "r.json").read_text())["results"][1]["figures"]
    assert figures["milliseconds"]["network"]["p50"] == 40 and figures["ratio"]["network"]["p50"] == 2.0
    for text, message in (('{"format_version": 9}', "version 9"), ("[]", "version None"), ("{", "no JSON")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(D2ZeroError, match=message):
            Report.read(tmp_path / "bad.json")
    assert set(figures["ratio"]) == {"network", ARRAY, FILE}
    content = report.to_dict()
    del content["results"][0]["samples"], content["baseline"]
    with pytest.raises(D2ZeroError, match="damaged"):
        Report.from_dict(content)


def test_a_report_of_version_1_is_read_with_its_network_as_inference() -> None:
    content = full_report().to_dict() | {"format_version": 1}
    for result in content["results"]:
        result["samples"] = [
            {stage: value for stage, value in entry.items() if stage != "inference"} for entry in result["samples"]
        ]
    report = Report.from_dict(content)
    assert report.results[0].times(FILE)[0] == 13 and report.results[0].times("inference")[0] == 10
    assert report.results[2].times("network") == [15.0] * 3 and not report.results[2].whole
    assert "96×128" in page(report)


def test_published_results_are_read() -> None:
    folder = Path(__file__).parents[2] / "benchmarks/results"
    reports = [Report.read(path) for path in sorted(folder.glob("*.json"))]
    assert reports and all(report.results[0].spread(FILE) for report in reports)


def test_the_page_is_well_formed_and_fetches_nothing() -> None:
    text = page(full_report())
    root = ElementTree.fromstring(text.split("\n", 1)[1])
    assert root.tag == "html"
    svg = "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall(f".//{svg}")) == 4 + 1 + 3  # bars a case, accuracy, three sweeps
    titles = [heading.text for heading in root.iter("h2")]
    assert "Cost against number of classes" in titles and "Left out" in titles
    bare = re.sub(r'xmlns(:xlink)?="[^"]*"|href="#|url\(#', "", text)  # names, and places in the page itself
    assert not any(sign in bare for sign in ("http:", "https:", "src=", "href=", "url(", "@import", "<script"))
    assert not any(colour in text.partition("</style>")[2] for colour in COLOURS.values())  # light and dark
    assert "prefers-color-scheme: dark" in text and "a &lt;title&gt;" in text


def test_what_was_not_measured_is_left_out_of_the_page() -> None:
    report = Report("t", {}, {}, "a", [CandidateInfo("a", "d2zero", "x")], [Result("a", CASE, [sample(1)])])
    titles = [heading.text for heading in ElementTree.fromstring(page(report).split("\n", 1)[1]).iter("h2")]
    assert titles == ["Latency by stage", "All measurements", "How it was measured"]
    assert "Stopped before the end" in page(report)


def colour_of(dots: Any) -> list[float]:
    return dots.get_facecolor()[0].tolist()


def test_accuracies_are_drawn_apart_and_to_scale() -> None:
    report = Report("t", {}, {}, "a")
    measured = (("a", 50.0, 71.16), ("b", 20.0, 70.54), ("c", 21.0, 68.1))
    for name, ms, hm in measured:
        report.candidates.append(CandidateInfo(name, "d2zero", "x"))
        report.results.append(Result(name, CASE, [sample(ms)]))
        report.accuracy.append(Accuracy(name, "gzsis", 60, {"hm_ap50": hm}))
    figure = tradeoff_figure(report)
    assert figure is not None
    axes, (legend,) = figure.axes[0], figure.legends
    places = [tuple(np.asarray(dots.get_offsets())[0]) for dots in axes.collections]
    assert places == [(ms + 3.5, hm) for _, ms, hm in measured]  # milliseconds of all stages
    low, high = axes.get_ylim()
    assert high - low >= 5 and low < 68.1 < 71.16 < high and axes.get_xlim()[0] == 0
    colours = [colour_of(dots) for dots in axes.collections]
    assert [entry.get_text() for entry in legend.get_texts()] == ["a", "b", "c"]
    assert [colour_of(dots) for dots in legend.legend_handles] == colours
    assert len({tuple(colour) for colour in colours}) == 3


def test_odd_names_are_shown_as_they_are() -> None:
    report, name = Report("t", {}, {}, "a"), "_a$b$ <&>.onnx"
    report.candidates.append(CandidateInfo(name, "d2zero", "x"))
    report.results.append(Result(name, CASE, [sample(5.0)]))
    report.accuracy.append(Accuracy(name, "gzsis", 60, {"hm_ap50": 50.0}))
    tree = ElementTree.fromstring(page(report).split("\n", 1)[1])
    shown = [text for text in tree.itertext() if name in text]
    assert len(shown) >= 4  # a bar, a legend, tables


def test_bars_are_the_stages_of_each_candidate() -> None:
    axes = latency_figure(full_report(), CASE).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "a",
        "b:published",
        "mask2former (only the network)",
    ]
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert [width for (width,) in widths] == [1, 1, 20.5, 1, 1, 1, 40.5, 1, 15]
    assert [text.get_text() for text in axes.texts] == ["23.5", "43.5", "15.0"]


def test_cases_vary_one_thing_at_a_time_or_all() -> None:
    sizes = parse_sizes("800x1216, 480X640")
    few = make_cases(sizes, parse_counts("--batch", "1,4"), [65, 80])
    assert [str(case) for case in few] == [
        "800×1216, batch 1, 65 classes",
        "800×1216, batch 1, 80 classes",
        "800×1216, batch 4, 65 classes",
        "480×640, batch 1, 65 classes",
    ]
    assert len(make_cases(sizes, [1, 4], [65, 80], grid=True)) == 8
    own = Case(426, 640).preprocessing(Preprocessing())
    assert own.static_size == (448, 640) and own.network_size((426, 640)) == (426, 640)
    assert own.network_size((3000, 2000)) == (448, 299)
    with pytest.raises(D2ZeroError, match="one fixed size, 64x64"):
        Case(96, 96).preprocessing(Preprocessing(static_size=(64, 64)))


def test_photos_are_the_same_for_all_and_go_round(tmp_path: Path) -> None:
    photos = Photos.of(tmp_path, None, [Case(64, 96, 3)])
    files = photos.batch(Case(64, 96, 3), 2)
    assert [path.name for path in files] == ["6.jpg", "7.jpg", "0.jpg"] and files == photos.batch(Case(64, 96, 3), 2)


def test_the_environment_tells_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment(["/home/somebody/m.onnx", "--json=/tmp/x/r.json", "--size", "64x64"], None)
    assert found["command"] == "d2zero benchmark m.onnx --json=r.json --size 64x64" and found["threads"] == "3"
    assert found["cores"] >= 1 and found["versions"]["numpy"] == np.__version__
    cpuinfo = "processor : 0\nflags\t\t: fpu sse avx2 avx512f avx512_vnni avx512_bf16\n\nprocessor : 1\nflags : fpu\n"
    assert instructions(cpuinfo) == "avx2, avx512f, avx512_vnni, avx512_bf16"
    assert instructions("Features\t: fp asimd i8mm bf16\n") == "i8mm, bf16" and instructions("") is None
    import getpass
    import platform

    text = json.dumps({key: value for key, value in found.items() if key not in ("processor", "system")})
    assert "/home" not in text and str(Path.cwd()) not in text and f'"{platform.node()}"' not in text
    assert f'"{getpass.getuser()}"' not in text
    assert without_folders("cannot open C:\\a\\b.jpg or 'x/y.png'") == "cannot open b.jpg or 'y.png'"


def test_the_tables_of_a_page_are_rewritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"before\n\n{speed_tables.MARKER}\nold\n{speed_tables.MARKER}\n\nafter\n"
    (tmp_path / "README.md").write_text(text)
    arguments = ["--page", str(tmp_path / "README.md"), "--results", str(tmp_path / "results")]
    assert speed_tables.main(arguments) == 2 and "no reports" in capsys.readouterr().err
    full_report().write(tmp_path / "results" / "r.json")
    assert speed_tables.main(arguments) == 0
    once = (tmp_path / "README.md").read_text()
    assert once.startswith("before\n\n") and once.endswith(f"{speed_tables.MARKER}\n\nafter\n") and "old" not in once
    assert "| b:published | 40.0 | 42.5 | 43.5 | 83.5 |" in once and "**2e+00 DIFFERS**" in once
    assert speed_tables.main(arguments) == 0 and (tmp_path / "README.md").read_text() == once
    (tmp_path / "README.md").write_text("no place")
    assert speed_tables.main(arguments) == 2 and "must have two lines" in capsys.readouterr().err


def test_each_provider_is_a_candidate_of_its_own() -> None:
    plan = Plan(models=(Path("m.onnx"), Path("c.safetensors")), providers=("cpu", "openvino-bf16"), masks="packed")
    assert [(spec.name, spec.providers) for spec in plan.specs] == [
        ("m.onnx:cpu", ("cpu",)),
        ("m.onnx:openvino-bf16", ("openvino-bf16",)),
        ("c.safetensors", None),
    ]
    assert {spec.masks for spec in plan.specs} == {"packed"}
    assert [spec.name for spec in Plan(models=(Path("m.onnx"),), providers=("cpu",)).specs] == ["m.onnx"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ()}, "no model"),
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"warmup": -1}, "--warmup 0"),
        ({"annotations": Path("a.json")}, "give --images"),
        ({"baseline": "z"}, "--baseline must be one of m.onnx"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(D2ZeroError, match=message):
        Plan(**{"models": (Path("m.onnx"),), **options})


def test_work_is_counted_without_computing() -> None:
    import torch

    from studies.roofline import Rates, Work, count, described

    linear = torch.nn.Linear(30, 20).requires_grad_(False)

    def sampled(x: torch.Tensor) -> torch.Tensor:
        grid = torch.zeros(len(x), 5, 6, 2)
        return torch.nn.functional.grid_sample(linear(x)[:, None, :, :].relu(), grid, align_corners=False)

    work = count(sampled, lambda: (torch.empty(4, 7, 30),))
    assert work.operations == 2 * 4 * 7 * 30 * 20 + 8 * 4 * 5 * 6
    product = 4 * (4 * 7 * 30 + 30 * 20 + 20 + 4 * 7 * 20)
    assert work.bytes == product + 4 * (4 * 7 * 20 + 4 * 5 * 6 * 2 + 4 * 5 * 6)
    rates = Rates(operations=1e12, bytes=1e11)
    assert rates.floors(Work(10**9, 10**8)) == (1.0, 1.0)
    assert "1.0 billion operations and 0.10 GB" in described(Work(10**9, 10**8), rates)


def test_the_faster_of_product_and_convolution_is_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    product, convolution = 2 * 64**3, 2 * (256 * 256 * 9) * (4 * 4)
    for seconds, rate in (((1.0, 50.0, 1.0), product), ((1e3, 1.0, 1.0), convolution)):
        spans = iter(seconds)  # product, convolution, copy
        monkeypatch.setattr(roofline, "_best", lambda run, device, spans=spans: (run(), next(spans))[1])
        found = roofline.measured_rates("cpu", "tf32", side=64, megabytes=1)
        assert found.operations == pytest.approx(rate) and found.bytes == 2 << 20


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_rates_are_measured_with_the_float32_math_of_the_precision(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    seen = []
    monkeypatch.setattr(roofline, "_best", lambda *_: seen.append(torch.get_float32_matmul_precision()) or 1.0)
    before = torch.get_float32_matmul_precision()
    roofline.measured_rates("cpu", precision, side=64, megabytes=1)
    assert set(seen) == {"high" if precision == "tf32" else "highest"}
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.slow
def test_a_gpu_is_measured_without_pycocotools() -> None:
    code = (
        "import sys; sys.modules['pycocotools'] = None\n"
        "import d2zero.demo.run, d2zero_bench.published, studies.standard, studies.training\n"
        "import d2zero_export.onnx_export, d2zero_export.pt2_export, numpy as np\n"
        "print(d2zero_bench.published._encoded(np.ones((2, 3), bool)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'size': [2, 3], 'counts': '06'}"
