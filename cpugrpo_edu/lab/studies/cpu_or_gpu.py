"""Study: what a class needs in time, energy and money, and when a GPU would pay off.

A calculator over assumptions that are all in one list, ``ASSUMPTIONS``: each names its source or
says that it is to be edited. Only the run on a CPU is measured, in the records. No GPU was
measured: instead of its speed the calculator gives the speed from which it would pay off.

The same formulas, in JavaScript, are in ``book/_static/calculator.js``; a test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.lab.recorded import completion_lengths, recorded_config, recorded_runs
from cpugrpo_edu.lab.studies.setting import Setting, StudyResult, Table
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.show.palette import BLUE, ORANGE, VERMILLION, Plot, new_figure, tidy

EDIT = "assumption, edit it"

PLACES = {"laptop": "Own laptop", "cpu": "Cloud CPU", "gpu": "Cloud GPU"}

Values = dict[str, float | None]


@dataclass(frozen=True)
class Assumption:
    """One input of the calculator; the user gives those whose ``value`` is None."""

    key: str
    label: str
    value: float | None
    unit: str
    source: str = EDIT
    least: float = 0.0


ASSUMPTIONS = (
    Assumption("students", "Students", 30, "persons", least=1),
    Assumption("runs", "Runs each", 10, "runs", least=1),
    Assumption("seconds", "Seconds of a run", None, "s", "mean of the recorded runs", 0.001),
    Assumption("electricity", "Price of electricity", 0.30, "money/kWh"),
    Assumption("laptop_speed", "Laptop: speed", 1.0, "x the recorded machine", least=0.001),
    Assumption("laptop_watts", "Laptop: power at work", 30, "W"),
    Assumption("laptop_price", "Laptop: price", 0.0, "money/h", "owned already"),
    Assumption("laptop_setup", "Laptop: setup", 15, "min a student"),
    Assumption("cpu_speed", "Cloud CPU: speed", 1.0, "x the recorded machine", least=0.001),
    Assumption("cpu_watts", "Cloud CPU: power, its share", 20, "W"),
    Assumption("cpu_price", "Cloud CPU: price", 0.10, "money/h"),
    Assumption("cpu_setup", "Cloud CPU: start", 3, "min a student"),
    Assumption("cpu_machines", "Cloud CPU: at once", 30, "machines", least=1),
    Assumption(
        "gpu_speed",
        "Cloud GPU: speed",
        None,
        "x the recorded machine",
        "not measured: give yours, or read the speed from which it pays off",
        0.001,
    ),
    Assumption("gpu_watts", "Cloud GPU: power with its host", 300, "W"),
    Assumption("gpu_price", "Cloud GPU: price", 1.00, "money/h"),
    Assumption("gpu_setup", "Cloud GPU: start", 5, "min a student"),
    Assumption("gpu_machines", "Cloud GPU: at once", 1, "machines", least=1),
)


def pay_off(hours: float, each: float, rate: float, setup: float) -> float | None:
    """The speed (x the recorded machine) from which a GPU at ``rate`` an hour costs a student no
    more than ``each``; None if its start alone costs more."""
    if rate <= 0:
        return 0.0
    left = each / rate - setup
    return hours / left if left > 0 else None


def calculate(values: Mapping[str, float | None]) -> dict[str, Any]:
    """Time, energy and money of the class in each place, and when the GPU pays off.

    ``{place: {"hours_each", "machine_hours", "wall_hours", "kwh", "money"} or None,
    "gpu_pays_from": {"money", "energy"}}``: hours that one student waits for the machine,
    start included; hours of all machines; hours until the last student is done; None if no
    speed is given. ``gpu_pays_from`` compares with the cloud CPU, in multiples of the recorded
    machine's speed.
    """
    v = dict(values)
    students, hours = v["students"] or 0, (v["runs"] or 0) * (v["seconds"] or 0) / 3600
    found: dict[str, Any] = {}
    for place in PLACES:
        speed, setup = v[f"{place}_speed"], (v[f"{place}_setup"] or 0) / 60
        if not speed:
            found[place] = None
            continue
        each = hours / speed + setup
        total = students * each
        at_once = students if place == "laptop" else v[f"{place}_machines"] or 1
        rounds = math.ceil(students / at_once)
        kwh = total * (v[f"{place}_watts"] or 0) / 1000
        paid = kwh * (v["electricity"] or 0) if place == "laptop" else 0.0
        found[place] = {
            "hours_each": each,
            "machine_hours": total,
            "wall_hours": rounds * each,
            "kwh": kwh,
            "money": total * (v[f"{place}_price"] or 0) + paid,
        }
    cpu, start = found["cpu"], (v["gpu_setup"] or 0) / 60
    found["gpu_pays_from"] = {
        name: cpu and pay_off(hours, cpu[key] / students, rate, start)
        for name, key, rate in (
            ("money", "money", v["gpu_price"] or 0),
            ("energy", "kwh", (v["gpu_watts"] or 0) / 1000),
        )
    }
    return found


def check_values(given: Mapping[str, float]) -> None:
    """UserError for an unknown key or a value that is too small."""
    known = {a.key: a for a in ASSUMPTIONS}
    for key, number in given.items():
        if key not in known:
            raise UserError(f"unknown assumption {key!r}; allowed are {', '.join(known)}")
        if not known[key].least <= number < float("inf"):
            raise UserError(f"{key} is {number}; give a number of at least {known[key].least:g}")


def assumptions(given: Mapping[str, float] | None = None) -> list[Assumption]:
    """All inputs: the defaults and the recorded seconds of a run, or what is given instead."""
    given = given or {}
    check_values(given)
    found = []
    for each in ASSUMPTIONS:
        if each.key in given:
            each = replace(each, value=given[each.key], source="given")
        elif each.key == "seconds":
            each = recorded_seconds(each)
        found.append(each)
    return found


def values_of(inputs: list[Assumption]) -> Values:
    return {each.key: each.value for each in inputs}


# The records


def recorded_seconds(each: Assumption) -> Assumption:
    """The mean of the recorded runs. UserError without any."""
    runs = recorded_runs()
    if not runs:
        raise UserError(
            "no run is recorded here, so nothing says how long one takes; "
            "give seconds, or record runs with: make records"
        )
    seconds = fmean(run.results["seconds"]["total"] for run in runs)
    machine = runs[0].machine
    return replace(
        each,
        value=seconds,
        source=f"measured: mean of {len(runs)} recorded runs, {machine['cpu']}, "
        f"{machine['usable_cores']} cores",
    )


def error_row(run: RunRecord, predicted: float) -> dict[str, Any]:
    """A recorded run's seconds beside a prediction."""
    measured = run.results["seconds"]["total"]
    return {
        "seed": run.seed,
        "ewc": run.results["components"]["ewc"]["on"],
        "measured": measured,
        "predicted": predicted,
        "error": predicted / measured - 1,
    }


def repeat_errors(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """Each recorded run's seconds predicted by the mean of the others; relative errors.

    This says how well a *similar* run on the *same* machine is predicted, and no more.
    """
    rows = []
    for run in runs:
        others = [r.results["seconds"]["total"] for r in runs if r is not run]
        if others:
            rows.append(error_row(run, fmean(others)))
    return rows


def model_errors(runs: list[RunRecord]) -> dict[str, Any]:
    """The same runs predicted by the cost model, which was fitted to the sweep and has seen no
    run; or why there is none."""
    from cpugrpo_edu.lab.cost import fit_sweep  # here: the calculator needs no torch
    from cpugrpo_edu.lab.estimate import recorded_sweep, run_parts

    try:
        sweep = recorded_sweep()
        model = fit_sweep(sweep.results)
    except UserError as error:
        return {"rows": [], "why_none": str(error)}
    rows = []
    for run in runs:
        parts = run_parts(recorded_config(run), model, *completion_lengths([run]))
        same = all(run.machine[key] == sweep.machine[key] for key in ("cpu", "usable_cores"))
        rows.append({**error_row(run, sum(parts.values())), "same_machine": same})
    return {"rows": rows, "why_none": ""}


def arithmetic(run: RunRecord) -> dict[str, float]:
    """Operations (2 a multiply-add) of a recorded run's rollouts and updates, in total and a
    second of training."""
    from cpugrpo_edu.lab.cost import rollout_work, training_work
    from cpugrpo_edu.lab.estimate import run_step
    from cpugrpo_edu.lab.floors import FLOORS

    config = recorded_config(run)
    step = run_step(config, completion_lengths([run])[0])
    unit = dict.fromkeys(FLOORS, 1e-9)  # one operation a second: seconds are operations
    works = (rollout_work(step, unit), training_work(step, unit))
    each = sum(n for work in works for kind, n in work.items() if kind.endswith("operations"))
    # The head, forward and backward, which the cost model leaves out
    each += 2 * 2 * step.rows * step.tokens * step.architecture.vocab * step.architecture.hidden
    total = sum(config.steps) * each
    return {
        "operations": total,
        "operations_per_second": total / run.results["seconds"]["train"],
        "prompt_tokens": step.prompt_tokens,
    }


# The study


def run(setting: Setting) -> StudyResult:
    """Calculate with the defaults, and compare the CPU side with the records.

    The reduced study is the same: nothing is trained.
    """
    runs = recorded_runs()
    inputs = assumptions()
    setting.say(f"{len(runs)} recorded runs")
    results: dict[str, Any] = {
        "assumptions": [asdict(each) for each in inputs],
        "class": calculate(values_of(inputs)),
        "validation": {"repeat": repeat_errors(runs), "cost_model": model_errors(runs)},
        "arithmetic": arithmetic(runs[0]),
        "measured_on": {
            key: runs[0].machine[key] for key in ("cpu", "usable_cores", "total_memory")
        },
    }
    validation = results["validation"]
    for rows in (validation["repeat"], validation["cost_model"]["rows"]):
        rows.sort(key=lambda row: (row["seed"], row["ewc"]))
    config = {"reduced": setting.reduced, "records": [f"run seed {r.seed}" for r in runs]}
    return StudyResult(new_record("study-cpu-or-gpu", config, results))


# Tables, findings and plot


def assumption_rows(inputs: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            each["label"],
            "–" if each["value"] is None else f"{each['value']:.4g}",
            each["unit"],
            each["source"],
        ]
        for each in inputs
    ]


CLASS_HEADER = ["Place", "Hours a student", "Hours until all are done", "Machine hours"]
CLASS_HEADER += ["kWh", "Money"]


def class_rows(found: Mapping[str, Any]) -> list[list[str]]:
    keys = ("hours_each", "wall_hours", "machine_hours", "kwh", "money")
    return [
        [name, *(f"{found[place][key]:.2f}" if found[place] else "–" for key in keys)]
        for place, name in PLACES.items()
    ]


def saves_from(what: str, speed: float | None) -> str:
    """From which speed the GPU saves money or energy; None for never."""
    if speed is None:
        return f"it saves no {what} at any speed, since its start alone takes more"
    return f"it saves {what} from {speed:.1f} times the recorded machine's speed"


def pays_text(found: Mapping[str, Any]) -> str:
    """From which speed the GPU pays off, in one sentence."""
    parts = [saves_from(name, found["gpu_pays_from"][name]) for name in ("money", "energy")]
    return f"The GPU against the cloud CPU: {'; '.join(parts)}."


def findings(record: RunRecord) -> list[str]:
    """What the record says, in sentences."""
    results = record.results
    work, model = results["arithmetic"], results["validation"]["cost_model"]
    said = [
        f"{pays_text(results['class'])} All of this depends on the assumptions above.",
        f"Rollouts and updates of a recorded run are {work['operations'] / 1e12:.2f} trillion "
        f"operations; over the time of training that is {work['operations_per_second'] / 1e9:.1f} "
        "billion a second.",
    ]
    if not model["rows"]:
        said.append(f"There is no prediction of the cost model: {model['why_none']}.")
    elif not all(row["same_machine"] for row in model["rows"]):
        said.append("The cost model was fitted on another machine than the runs'.")
    return said


def tables(record: RunRecord) -> list[Table]:
    results = record.results
    rows = results["validation"]["repeat"]
    model = results["validation"]["cost_model"]
    checked = [
        [
            f"{name}, {len(errors)} runs",
            f"{100 * fmean(abs(r['error']) for r in errors):.1f} %",
            f"{100 * max(abs(r['error']) for r in errors):.1f} %",
            f"{100 * fmean(r['error'] for r in errors):+.1f} %",
        ]
        for name, errors in (
            ("mean of the other recorded runs", rows),
            ("cost model, fitted to the sweep alone", model["rows"]),
        )
        if errors
    ]
    if not model["rows"]:
        checked.append(["cost model, fitted to the sweep alone", "–", "–", "–"])
    return [
        (
            "The assumptions; each can be changed",
            ["Assumption", "Value", "Unit", "Source"],
            assumption_rows(results["assumptions"]),
        ),
        (
            "The class under these assumptions",
            CLASS_HEADER,
            class_rows(results["class"]),
        ),
        (
            "Predicted against measured seconds of the recorded runs",
            ["Prediction", "Mean error", "Largest", "Bias"],
            checked,
        ),
    ]


def plot(record: RunRecord) -> Plot:
    """Money and energy against the GPU's speed, with the CPUs' for comparison."""
    values: Values = {a["key"]: a["value"] for a in record.results["assumptions"]}
    speeds = [10 ** (i / 20 - 0.5) for i in range(51)]
    found = [calculate({**values, "gpu_speed": speed}) for speed in speeds]
    figure = new_figure(7.4, 3)
    facts = []
    for panel, (key, unit) in enumerate((("money", "money, your currency"), ("kwh", "kWh"))):
        axes = figure.add_subplot(1, 2, panel + 1)
        axes.plot(speeds, [f["gpu"][key] for f in found], color=VERMILLION, label="cloud GPU")
        for place, colour, style in (("cpu", BLUE, "--"), ("laptop", ORANGE, ":")):
            level = found[0][place][key]
            name = PLACES[place].lower()
            axes.axhline(level, color=colour, ls=style, label=name)
            facts.append(f"{name} {level:.2f} {unit}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        tidy(axes, x="speed of the GPU, x the recorded machine", y=unit, grid="both")
        if panel == 0:
            axes.legend(frameon=False, fontsize=8)
    return Plot(
        figure,
        "Two line charts of what the class costs against an assumed speed of the GPU, falling "
        f"with it; level lines for the CPUs: {'; '.join(facts)}. No GPU was measured.",
    )
