"""Reports from records with all, some and no parts; hostile text; wording; glue."""

from __future__ import annotations

import base64
import copy
import json
import random
import re
from html.parser import HTMLParser

import pytest

from cpugrpo_edu.data import DIFFICULTIES
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.record.evaluations import Evaluation
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.record.stats import accuracy_table, compare, forgetting_matrix
from cpugrpo_edu.show.palette import Plot
from cpugrpo_edu.show.plots import plot_accuracy, plot_forgetting, plot_time_and_memory
from cpugrpo_edu.show.report import COMPONENTS, acted, headline, write_report
from cpugrpo_edu.show.text import number, replace_between_markers, results_table, value

HOSTILE = (
    "</pre><script>alert(1)</script> ``\n```\n| $x$ \x00 \u202e <img src=x onerror=alert(2)> \ud800"
)


def evaluation(label, shares, n=60, seed=0):
    """``shares``: accuracy on basic, intermediate, advanced; domains alternate."""
    rng = random.Random(f"{label}{seed}")
    cells = [(("chain", "linear")[i % 2], x) for x in DIFFICULTIES for i in range(n)]
    share = dict(zip(DIFFICULTIES, shares, strict=True))
    return Evaluation(
        label=label,
        seed=seed,
        temperature=0.0,
        item_ids=[str(i) for i in range(len(cells))],
        domains=[d for d, _ in cells],
        difficulties=[x for _, x in cells],
        correct=[rng.random() < share[x] for _, x in cells],
        step_score=[0.5] * len(cells),
        tokens=[20] * len(cells),
        finished=[True] * len(cells),
        completions=[""] * len(cells),
        seconds=1.0,
    )


def full_record(seed=0, ewc=True, after=(0.95, 0.8, 0.6)):
    runs = [
        evaluation("before", (0.8, 0.4, 0.2), seed=seed),
        evaluation("after basic", (0.95, 0.45, 0.2), seed=seed),
        evaluation("after intermediate", (0.9, 0.7, 0.3), seed=seed),
        evaluation("after advanced", after, seed=seed),
    ]
    quantized = copy.deepcopy(runs[-1])
    quantized.label = "after, INT8"
    results = {
        "evaluations": [{"label": e.label, "table": accuracy_table(e)} for e in [*runs, quantized]],
        "comparisons": {
            "INT8 vs fp32": compare(runs[-1], quantized, samples=200),
            "after vs before": compare(runs[0], runs[-1], samples=200),
        },
        "forgetting": forgetting_matrix(runs, samples=200),
        "stages": [
            {
                "name": x,
                "steps": 4,
                "seconds": 9.5,
                "learning_rate": 3e-5,
                "tokens_generated": 12345,
            }
            for x in DIFFICULTIES
        ],
        "components": {
            "ewc": {"on": ewc, "detail": {"strength": 10.0, "anchors": [1, 2]}},
            "int8_rollouts": {"on": False, "detail": {}},
            "a_new_one": {"on": True},
        },
        "seconds": {"load": 1.0, "train": 30.0, "evaluate": 12.0, "report": 0.5, "total": 63.0},
        "peak_rss_bytes": 3 * 2**29,
        "cpu_percent": 187.0,
        "tokens_per_second": {"rollout": 4321.0},
        "weights_changed": {"changed": True, "relative_l2": 1.5e-3},
        "samples": [
            {
                "question": HOSTILE,
                "answer": HOSTILE,
                "difficulty": "basic",
                "domain": HOSTILE,
                "before": HOSTILE,
                "after": "#### 4",
                "before_correct": False,
                "after_correct": True,
            },
            {"question": "2+2", "after": "4"},
        ],
    }
    return RunRecord(
        kind="run",
        created="2030-01-01",
        seed=seed,
        commit="abc",
        machine={"cpu": HOSTILE, "cores": 2},
        versions={"torch": "2"},
        config={"group_size": 8, "path": HOSTILE},
        results=results,
    )


METRICS = [
    {
        "stage": DIFFICULTIES[i // 4],
        "step": i % 4 + 1,
        "time": 1000.0 + i,
        "reward": i / 12,
        "reward_std": 0.1,
        "kl": 0.01 * i,
        "completion_length": 20.0,
        "rss_bytes": 2**30,
    }
    for i in range(12)
]


class Page(HTMLParser):
    """Collects the tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    record = full_record()
    # As the pipeline does it: through JSON with sorted keys, so that no dictionary's order counts.
    record.results["samples"][0] |= {
        k: v.replace("\ud800", "") for k, v in record.results["samples"][0].items() if k == "answer"
    }
    record.save(folder / "record.json")
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, METRICS)) + '\n{"half')
    paths = write_report(folder / "record.json", folder)
    return folder, *(path.read_text(encoding="utf-8") for path in paths)


# The report


def test_html_is_self_contained_and_accessible(written):
    _, _, text = written
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1 and len(page.all("h2")) == 9
    images = page.all("img")
    assert len(images) == 4
    for image in images:
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
        assert len(image["alt"]) > 60 and re.search(r"\d", image["alt"])
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 7
    assert not [a for _, attrs in page.tags for a in attrs if a in ("href", "onerror")]


def test_html_shows_hostile_text_without_running_it(written):
    _, _, text = written
    page = Page(text)
    assert not page.all("script")
    assert "<script>alert(1)</script>" in page.text  # there, as text
    assert "\x00" not in text and "\u202e" not in text
    allowed = {"html", "head", "meta", "title", "style", "body", "main", "section", "div", "p"}
    allowed |= {"h1", "h2", "h3", "h4", "pre", "ul", "li", "img"}
    allowed |= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert {tag for tag, _ in page.tags} <= allowed


def test_markdown_renders_hostile_text_as_text(written):
    markdown_it = pytest.importorskip("markdown_it")
    folder, text, _ = written
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
    kinds = [t for token in tokens for t in [token, *(token.children or [])]]
    assert not [t for t in kinds if t.type in ("html_block", "html_inline")]
    images = [t for t in kinds if t.type == "image"]
    assert len(images) == 4 and all(t.content for t in images)
    for image in images:
        assert (folder / image.attrs["src"]).read_bytes().startswith(b"\x89PNG")
    fences = [t.content for t in kinds if t.type == "fence"]
    assert sum("<script>" in f for f in fences) == 2  # question and completion, whole
    for table in re.split(r"\n\n", text):
        if table.startswith("| "):  # no cell broke its row
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_report_holds_the_numbers_of_the_record(written):
    _, text, page = written
    record = full_record()
    row = record.results["comparisons"]["after vs before"]["overall"]
    for part in (f"{100 * row['difference']:+.1f}", "1.50 GiB", "1:03", "187 %", "12,345", "4,321"):
        assert part in text and part in page
    assert "Time, other | 19.5 s" in text  # 63 - 43.5
    assert "| a new one | on | – |" in text and "| INT8 rollouts | off | – |" in text
    assert "| Threads | not recorded |" in text
    assert text.count("before: wrong") == 1 and "after: not checked" in text
    assert text.index("after vs before: paired") < text.index("INT8 vs fp32: paired")
    header = next(line for line in text.splitlines() if line.startswith("| Evaluation"))
    assert header.index("basic") < header.index("intermediate") < header.index("advanced")
    assert "does not follow" in text  # INT8: equality was not shown


@pytest.fixture
def undrawn(monkeypatch):
    """Plots are built but not drawn, which is the slow part and tested elsewhere."""
    monkeypatch.setattr(Plot, "png", lambda self: b"\x89PNG")


PARTS = list(full_record().results)


@pytest.mark.parametrize("missing", PARTS)
def test_report_without_any_one_part(missing, tmp_path, undrawn):
    record = full_record()
    del record.results[missing]
    markdown, page = write_report(record, tmp_path)
    assert "Not recorded in this run." in markdown.read_text()  # no metrics, at least
    assert len(Page(page.read_text()).all("h2")) == 9
    # And alone: a part must not lean on another one.
    record.results = {missing: full_record().results[missing]}
    markdown, page = write_report(record, tmp_path)
    assert len(Page(page.read_text()).all("h2")) == 9


def test_report_of_an_empty_and_of_an_interrupted_run(tmp_path, undrawn):
    record = full_record()
    evaluations = record.results["evaluations"]
    record.results = {}
    markdown, _ = write_report(record, tmp_path / "empty")
    text = markdown.read_text()
    assert "was not evaluated" in text and "![" not in text
    assert text.count("Not recorded in this run.") == 7
    for part in COMPONENTS:
        record.results = {"components": {part: {"on": True}}}
    record.results |= {"evaluations": evaluations[:1], "stages": [{"name": "basic"}]}
    markdown, _ = write_report(record, tmp_path / "interrupted", METRICS[:1])
    text = markdown.read_text()
    assert "nothing is compared" in text and "| basic | – | – |" in text
    assert "greedily" in text and "1 optimizer steps" in text


# Wording


@pytest.mark.parametrize(
    "row,says,never",
    [
        (dict(difference=0.1, low=0.07, high=0.13, significant=True), "accuracy rose", "not show"),
        (
            dict(difference=-0.1, low=-0.13, high=-0.07, significant=True),
            "made the model worse",
            "rose",
        ),
        (dict(difference=0.01, low=-0.01, high=0.03, significant=False), "does not show", "rose"),
        (dict(difference=-0.01, low=-0.03, high=0.01, significant=False), "does not show", "worse"),
        (dict(difference=0.0, low=-0.01, high=0.01, significant=False), "does not show", "fell"),
    ],
)
def test_headline_claims_no_more_than_the_interval(row, says, never):
    record = full_record()
    row |= dict(n=3600, before=0.5, after=0.5 + row["difference"], p_value=1e-9)
    record.results["comparisons"]["after vs before"]["overall"] = row
    text = headline(record)
    assert says in text and never not in text
    assert f"{100 * row['difference']:+.1f} points" in text
    assert f"95 % interval {100 * row['low']:+.1f} to {100 * row['high']:+.1f}" in text
    assert "3,600 problems" in text and "p < 0.001" in text
    assert "took 1:03 and peaked at 1.50 GiB" in text


def test_a_scenario_names_its_difficulties(tmp_path, undrawn):
    record = full_record(ewc=False)
    record.results["levels"] = {"basic": "three letters", "advanced": "five letters"}
    text = headline(record)
    rows = record.results["comparisons"]["after vs before"]["by_difficulty"]
    ends = [
        f"{100 * rows[x]['before']:.1f} % to {100 * rows[x]['after']:.1f} %" for x in DIFFICULTIES
    ]
    assert f"Of these, three letters from {ends[0]}, five letters from {ends[2]}." in text
    report = write_report(record, tmp_path)[0].read_text()
    assert "| All | three letters | intermediate | five letters |" in report
    assert "Of these" not in headline(full_record())


def test_what_acted_says_where_ewc_helps():
    without, held = full_record(ewc=False), full_record(ewc=True)
    assert "On: nothing." in acted(without) and "--scenario letters" in acted(without)
    assert acted(held) == "On: EWC."


def test_headline_says_when_nothing_was_trained():
    record = full_record()
    record.results["weights_changed"]["changed"] = False
    assert headline(record).startswith("The weights did not change")


def test_limits_follow_the_run(tmp_path, undrawn):
    record = full_record(after=(0.8, 0.4, 0.2))
    record.results = {
        "comparisons": {"after vs before": record.results["comparisons"]["INT8 vs fp32"]},
        "evaluations": [record.results["evaluations"][0]],
    }
    record.results["evaluations"][0]["table"]["temperature"] = 0.7
    text = write_report(record, tmp_path)[0].read_text()
    assert "not the same as no difference" in text and "temperature 0.7" in text


def test_own_data_are_not_called_generated(tmp_path, undrawn):
    record = full_record()
    assert "generated problems" in write_report(record, tmp_path)[0].read_text()
    record.config["data"] = "mine.jsonl"
    text = write_report(record, tmp_path)[0].read_text()
    assert "generated problems" not in text and "180 held-out problems of mine.jsonl" in text


def test_grades_of_a_verifier_are_named_beside_the_full_marks(tmp_path, undrawn):
    record = full_record()
    text = write_report(record, tmp_path)[0].read_text()
    assert "Mean grade" not in text and "mean grade" not in text and "Exact-match" in text
    for entry, grade in zip(record.results["evaluations"], (0.5, 0.9, 0.8, 0.7, 0.7), strict=True):
        entry["table"]["overall"]["grade"] = grade
    text = write_report(record, tmp_path)[0].read_text()
    assert "Share of full marks with" in text and "Mean grade" in text
    table = text[text.index("| Mean grade |") :]
    grades = [row.split("|")[-2].strip() for row in table.splitlines()[2:7]]
    assert grades == ["0.500", "0.900", "0.800", "0.700", "0.700"]
    assert "The mean grade is 0.500 before and 0.700 after, and accuracy the share of" in text


# Plots


def test_plots_say_what_they_show():
    record = full_record()
    accuracy = plot_accuracy(record).alt
    table = record.results["evaluations"][3]["table"]
    assert "before and after advanced" in accuracy and "INT8" not in accuracy
    assert f"{100 * table['overall']['accuracy']:.1f} %" in accuracy
    assert accuracy.index("linear, basic") < accuracy.index("linear, advanced")
    forgetting = plot_forgetting(record).alt
    assert (
        f"{record.results['forgetting']['forgetting']['basic']['points']:+.1f} points" in forgetting
    )
    costs = plot_time_and_memory(record, METRICS)
    assert "train 30.0 s" in costs.alt and "1.00 to 1.00 GiB" in costs.alt
    assert len(costs.figure.axes) == 2
    assert len(plot_time_and_memory(record).figure.axes) == 1


def test_plots_of_nothing_say_so():
    record = full_record()
    record.results = {}
    for plot in (plot_accuracy(record), plot_forgetting(record), plot_time_and_memory(record)):
        assert plot.alt.startswith("No ") and plot.png().startswith(b"\x89PNG")


# Glue


def test_value_walks_dictionaries_and_lists():
    record = full_record()
    assert value(record, "seed") == 0
    assert value(record, "results.seconds.train") == 30.0
    assert value(record, "results.stages.1.name") == "intermediate"
    assert value(record, "results.comparisons.after vs before.overall.n") == 180


@pytest.mark.parametrize(
    "key,message",
    [
        ("result", "'result' in the record, which has .*results"),
        ("results.seconds.trian", "'trian' in results.seconds, which has .*train"),
        ("results.stages.9", "'9' in results.stages, which has positions 0 to 2"),
        ("results.stages.x", "positions 0 to 2"),
        ("results.cpu_percent.x", "the value 187.0"),
    ],
)
def test_value_names_what_is_missing(key, message):
    with pytest.raises(UserError, match=message):
        value(full_record(), key)


def test_number_reads_records(tmp_path, monkeypatch):
    record = full_record()
    record.machine = record.config = {}
    record.results = {"peak_rss_bytes": 3 * 2**29, "n": 3600, "none": None, "name": "x"}
    record.save(tmp_path / "records" / "smoke.json")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")  # found from a subfolder, as a notebook runs
    assert number("smoke", "results.peak_rss_bytes", "{:.2f} GiB", scale=2**-30) == "1.50 GiB"
    assert number("smoke", "results.n", "{:,}") == "3,600"
    with pytest.raises(UserError, match="no record 'smok' .* there are: smoke"):
        number("smok", "results.n")
    with pytest.raises(UserError, match="no 'm' in results"):
        number("smoke", "results.m")
    for key in ("none", "name"):
        with pytest.raises(UserError, match="cannot show"):
            number("smoke", f"results.{key}")
        with pytest.raises(UserError, match="cannot show"):
            number("smoke", f"results.{key}", scale=0.5)
    assert number("smoke", "results.n", "{:d}", folder=tmp_path / "records") == "3600"
    with pytest.raises(UserError, match="there are: none"):
        number("smoke", "results.n", folder=tmp_path / "nowhere")


# The table of the README


def cells(table):
    return [[c.strip() for c in line.strip("|").split(" | ")] for line in table.splitlines()]


def test_results_table_has_a_row_a_seed_and_the_mean_with_and_without_ewc():
    records = [full_record(seed, ewc) for seed in (1, 0) for ewc in (True, False)]
    for record, lost, difference in zip(
        records, (4.0, 12.0, 2.0, 10.0), (0.10, 0.50, 0.14, 0.50), strict=True
    ):
        interval = {"points_low": lost - 3, "points_high": lost + 3}
        record.results["forgetting"]["forgetting"] = {
            "basic": {"points": lost - 5, "points_low": -99.0, "points_high": 99.0},
            "intermediate": {"points": lost, **interval},
            "advanced": None,
        }
        record.results["comparisons"]["after vs before"]["overall"] |= {
            "before": 0.4,
            "after": 0.4 + difference,
            "difference": difference,
            "low": difference - 0.05,
            "high": difference + 0.05,
        }
    header, _, *without, zero, one, mean = cells(results_table(records))
    assert {len(row) for row in (header, zero, one, mean, *without)} == {9}
    assert zero == [
        "0",
        "on",
        "40.0 %",
        "54.0 %",
        "+14.0 (+9.0 to +19.0)",
        "+2.0 (-1.0 to +5.0)",
        "51.0 s",
        "1:03",
        "1.50 GiB",
    ]
    assert one[:3] == ["1", "on", "40.0 %"] and one[5] == "+4.0 (+1.0 to +7.0)"
    # Two values d apart: sd (ddof 1) = d/sqrt 2, t(0.975; 1) = 12.706, half width 6.353 d.
    assert mean[:2] == ["mean of 2 seeds", "on"] and mean[3] == "52.0 %"
    assert mean[4] == f"+12.0 ({12 - 6.3531 * 4:+.1f} to {12 + 6.3531 * 4:+.1f})"
    assert mean[5] == f"+3.0 ({3 - 6.3531 * 2:+.1f} to {3 + 6.3531 * 2:+.1f})"
    assert [row[:2] for row in without] == [["0", "off"], ["1", "off"], ["mean of 2 seeds", "off"]]
    assert [row[5] for row in without[:2]] == ["+10.0 (+7.0 to +13.0)", "+12.0 (+9.0 to +15.0)"]


def test_results_table_of_incomplete_records():
    bare = full_record(5, ewc=False)
    bare.results = {"components": {"ewc": {"on": False}}}
    only = cells(results_table([bare]))
    assert only[2:] == [["5", "off", *["–"] * 7]]
    both = cells(results_table([bare, full_record(0, ewc=False)]))
    assert both[-1][0] == "mean of 2 seeds" and both[-1][2].endswith("(n = 1)")
    apart = cells(results_table([bare, full_record(0, ewc=True)]))
    assert [row[:2] for row in apart[2:]] == [["5", "off"], ["0", "on"]]
    with pytest.raises(UserError, match="two records of seed 5 without EWC"):
        results_table([bare, bare])
    with pytest.raises(UserError, match="at least one"):
        results_table([])


def test_replace_between_markers():
    text = "a\n<!-- results:begin -->\nold\n<!-- results:end -->\nb"
    new = replace_between_markers(text, "| new |\n")
    assert new == "a\n<!-- results:begin -->\n| new |\n<!-- results:end -->\nb"
    assert replace_between_markers(new, "| new |") == new
    for bad in ("", text + text, "<!-- results:end --><!-- results:begin -->"):
        with pytest.raises(UserError, match="once"):
            replace_between_markers(bad, "")
