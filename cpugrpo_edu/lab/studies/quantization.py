"""Study: what fewer bits cost in accuracy, and whether the cost can be predicted.

A family of small models, and the bundled one before and after GRPO, answer the same held-out
problems in six number formats. Two of the formats are *simulated*: weights are rounded to the
format's values and computed with in float32. That gives their accuracy, and no speed.

A second part trains with INT8 rollouts, with and without importance correction.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from cpugrpo_edu.data import DIFFICULTIES
from cpugrpo_edu.engine.hardware import BUNDLED_MODEL
from cpugrpo_edu.engine.int8 import Int8Linear, quantize_for_rollout
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.evaluate import evaluate
from cpugrpo_edu.lab.pieces import Pieces, made_once
from cpugrpo_edu.lab.studies.common import (
    decided_by,
    draw_differences,
    expected,
    holm,
    item_table,
    last_evaluation,
    packed_evaluation,
    paired_over_seeds,
    run_or_resume,
    signed,
    unpacked_evaluation,
)
from cpugrpo_edu.lab.studies.setting import Say, Setting, StudyResult, Table
from cpugrpo_edu.models.load import default_answer_format, load_policy
from cpugrpo_edu.models.pretrain import PretrainConfig, pretrain
from cpugrpo_edu.record.files import cache_folder, write_text
from cpugrpo_edu.record.run_record import RunRecord, new_record
from cpugrpo_edu.record.stats import accuracy_table, compare
from cpugrpo_edu.run.config import RunConfig
from cpugrpo_edu.sample import Sampling
from cpugrpo_edu.show.palette import BLUE, GREEN, GREY, ORANGE, VERMILLION, Plot, new_figure, tidy
from cpugrpo_edu.tasks import DOMAINS, held_out_problems, make_problems
from cpugrpo_edu.tasks.answers import with_answer_format

GROUP = 32
"""Weights that share a scale in INT4, along a row."""


# The formats


@dataclass(frozen=True)
class Format:
    name: str
    make: Callable[[Any], Any]
    """The copy to evaluate, from the float32 model."""
    simulated: bool = False
    bits: float = 32
    """Stored bits of a weight of a linear layer; in this study without its scales."""


def linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers without the head, which stays float in every integer format."""
    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not head:
            yield name, layer


def round_groups(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """(out, in) weights rounded to the values of a symmetric ``bits`` format, as float32.

    A scale is shared by a row, or by each ``group`` neighbours in it (such blocks: Dettmers &
    Zettlemoyer 2023, arXiv 2212.09720).
    """
    top = 2 ** (bits - 1) - 1
    parts = [weight.detach().float()] if group is None else weight.detach().float().split(group, 1)
    rounded = []
    for part in parts:
        scale = (part.abs().amax(1, keepdim=True) / top).clamp(min=torch.finfo(torch.float32).tiny)
        rounded.append((part / scale).round().clamp(-top, top) * scale)
    return torch.cat(rounded, 1)


def simulate(model: Any, rounding: Callable[[Tensor], Tensor]) -> Any:
    """A float32 copy with the weights of its linear layers rounded."""
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        for _, layer in linear_layers(copied):
            layer.weight.copy_(rounding(layer.weight))
    return copied


def simulated(name: str, bits: float, rounding: Callable[[Tensor], Tensor]) -> Format:
    return Format(name, lambda model: simulate(model, rounding), simulated=True, bits=bits)


FORMATS = (
    Format("fp32", lambda model: model),
    Format("bf16", lambda model: copy.deepcopy(model).to(torch.bfloat16).eval(), bits=16),
    Format("INT8 dynamic, per tensor", partial(quantize_for_rollout, per_channel=False), bits=8),
    Format("INT8 dynamic, per channel", partial(quantize_for_rollout, kernel="packed"), bits=8),
    simulated("INT8 weight-only", 8, partial(round_groups, bits=8)),
    simulated("INT4 weight-only", 4, partial(round_groups, bits=4, group=GROUP)),
)


def stored_bytes(model: Any, chosen: Format, changed: Any) -> int:
    """Bytes of the weights with their scales; of a simulated format, what they would take."""
    tensors = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*changed.parameters(), *changed.buffers())
    }
    total = sum(tensors.values())
    if not chosen.simulated:
        return total + sum(m.nbytes for m in changed.modules() if isinstance(m, Int8Linear))
    for _, layer in linear_layers(model):
        rows, columns = layer.weight.shape
        scales = rows * (-(-columns // GROUP) if chosen.bits == 4 else 1)
        total += int(layer.weight.numel() * chosen.bits / 8) + 4 * scales - layer.weight.nbytes
    return total


# What might predict the loss


def layer_errors(policy: Any, changed: Any, problems: Sequence[Any]) -> dict[str, float]:
    """The format's error, layer by layer; no answer is looked at.

    ``output_error``: ||W x - W' x'|| / ||W x|| of a linear layer on its own float inputs x, over
    the tokens of worked training problems; ``weight_error``: ||W - W'|| / ||W||. Both are means
    over layers. Weights of a packed layer are read back.
    """
    layers = dict(linear_layers(policy.model))
    wrong, size = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            other = changed.get_submodule(name)
            dtype = torch.float32 if hasattr(other, "dequantized") else other.weight.dtype
            theirs = other.forward(inputs[0].to(dtype)).float()  # without hooks: it may be itself
            wrong[name] += float((output - theirs).square().sum())
            size[name] += float(output.square().sum())

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    was_training = policy.model.training
    policy.model.eval()
    try:
        with torch.inference_mode():
            for problem in problems:
                solution = policy.tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
                policy.model(torch.tensor([policy.encode_problem(problem) + solution]))
    finally:
        policy.model.train(was_training)
        for handle in hooks:
            handle.remove()
    weights = []
    for name, layer in layers.items():
        other = changed.get_submodule(name)
        packed = hasattr(other, "dequantized")
        theirs = other.dequantized() if packed else other.weight.float()
        ours = layer.weight.detach()
        weights.append(float((ours - theirs.detach()).norm() / ours.norm()))
    outputs = [(wrong[name] / max(size[name], 1e-30)) ** 0.5 for name in layers]
    return {"output_error": fmean(outputs), "weight_error": fmean(weights)}


PREDICTORS = ("output_error", "weight_error")
JUDGED = ("no loss", "mean loss of the format", *PREDICTORS)


def judge_predictors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Predict each model's accuracy losses from the other models' alone.

    ``rows`` have ``model``, ``format``, ``loss`` and the ``PREDICTORS``. Each predictor is one
    number, loss = slope * error, fitted by least squares. Two baselines look at no model: no loss
    at all, and the format's mean loss on the others. Returns the mean absolute
    errors (fractions) and the rows with their predictions. UserError below two models.
    """
    models = sorted({row["model"] for row in rows})
    if len(models) < 2:
        raise UserError(f"{len(models)} models are too few to leave one out; give at least 2")
    found = []
    for row in rows:
        others = [r for r in rows if r["model"] != row["model"]]
        predicted = {"no loss": 0.0}
        predicted["mean loss of the format"] = fmean(
            r["loss"] for r in others if r["format"] == row["format"]
        )
        for name in PREDICTORS:
            predicted[name] = slope_of(name, others) * row[name]
        found.append({**row, "predicted": predicted})
    errors = {name: fmean(abs(r["predicted"][name] - r["loss"]) for r in found) for name in JUDGED}
    return {"mean_absolute_error": errors, "rows": found}


def slope_of(predictor: str, rows: Sequence[Mapping[str, Any]]) -> float:
    """The slope of loss = slope * predictor by least squares."""
    below = sum(row[predictor] ** 2 for row in rows)
    return sum(row[predictor] * row["loss"] for row in rows) / below if below else 0.0


# The models


@dataclass(frozen=True)
class Member:
    """A model of the family, made by ``pretrain`` with these sizes."""

    hidden: int
    layers: int
    steps: int = 3000

    @property
    def name(self) -> str:
        return f"depth {self.layers}, width {self.hidden}"


FAMILY = (Member(80, 2), Member(120, 4), Member(160, 2), Member(160, 6), Member(200, 4))
TINY = (Member(40, 1, steps=30),)


def pretraining_of(member: Member) -> PretrainConfig:
    """Like the bundled model's, but nine of ten solutions show their working to the end: a model
    that gives bare answers has little accuracy to lose."""
    config = PretrainConfig(steps=member.steps, hidden=member.hidden, layers=member.layers)
    return replace(config, bare_late=config.bare_early, warmup_steps=min(100, member.steps))


def member_folder(member: Member, cache: Path | None) -> Path:
    """Where the trained model is cached; the name depends on everything that decides it."""
    decides = json.dumps(asdict(pretraining_of(member)), sort_keys=True)
    name = f"{member.hidden}x{member.layers}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"
    return (cache or cache_folder()) / "family" / name


def make_member(member: Member, place: Path, say: Say) -> Path:
    """The folder of the trained model, pretrained on first use."""

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if step % max(1, member.steps // 10) == 0:
            say(f"  step {step} of {member.steps}, loss {metrics['loss']:.2f}")

    def make(folder: Path) -> None:
        summary = pretrain(pretraining_of(member), folder, on_step)
        write_text(folder / "pretraining.json", json.dumps(summary, indent=1))

    return made_once(place, make)


def pretraining_minutes(members: Sequence[Member]) -> tuple[float, str]:
    """Expected from the time that pretraining the bundled model took, in proportion to the
    arithmetic; and the processor it was made on."""
    made = json.loads((BUNDLED_MODEL.parent / "pretraining.json").read_text(encoding="utf-8"))

    def work(config: Mapping[str, Any]) -> float:
        layer = 4 * config["hidden"] ** 2 + 3 * config["hidden"] * config["ffn"]
        head = config["hidden"] * config["vocabulary"]
        return float(config["steps"] * config["batch_size"] * (config["layers"] * layer + head))

    share = sum(work(asdict(pretraining_of(m))) for m in members) / work(made["config"])
    return share * made["seconds"] / 60, made["machine"]["cpu"]


# Rollouts in INT8

ARMS: dict[str, dict[str, bool]] = {
    "float32 rollouts": {"int8_rollouts": False},
    "INT8, corrected": {"int8_rollouts": True, "importance_correction": True},
    "INT8, uncorrected": {"int8_rollouts": True, "importance_correction": False},
}
TRAINED = "INT8, corrected"
"""The default recipe; the first run of this arm gives the trained model of the first part."""


def run_config(reduced: bool, **more: Any) -> RunConfig:
    """The default run; reduced, one stage of two steps."""
    config = RunConfig(per_cell=200, int8_evaluation=False)
    if reduced:
        config = replace(
            config,
            steps=(2, 0, 0),
            prompts_per_step=8,
            num_generations=4,
            max_completion=48,
            fisher_examples=0,
            ewc_strength=0.0,
            per_cell=2,
        )
    return replace(config, **more)


def slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def train_arms(setting: Setting, seeds: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """One run for each arm and seed: its accuracies, time and memory."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for seed in range(seeds):
        for name, options in ARMS.items():
            setting.say(f"GRPO with {name}, seed {seed}")
            keep = ("model",) if name == TRAINED and seed == 0 else ()
            place = folder / f"{slug(name)}-{seed}"
            config = run_config(setting.reduced, seed=seed, **options)
            record = run_or_resume(config, place, setting.say, keep, not setting.reduced)
            found[name].append(
                {
                    "seed": seed,
                    "evaluation": last_evaluation(record, place),
                    "before": record.results["evaluations"][0]["table"]["overall"]["accuracy"],
                    "after": record.results["evaluations"][-1]["table"]["overall"]["accuracy"],
                    "seconds": record.results["seconds"]["total"],
                    "tokens_per_second": record.results["tokens_per_second"]["rollout"],
                    "peak_rss_bytes": record.results["peak_rss_bytes"],
                }
            )
    return found


def compare_arms(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Each arm against float32 rollouts: paired by seed, and within each seed by problem."""
    first = next(iter(arms))
    base = arms[first]
    found = {}
    for name, runs in arms.items():
        within = [
            compare(unpacked_evaluation(a["evaluation"]), unpacked_evaluation(b["evaluation"]))
            for a, b in zip(base, runs, strict=True)
        ]
        found[name] = {
            "runs": [{k: v for k, v in run.items() if k != "evaluation"} for run in runs],
            "after": fmean(run["after"] for run in runs),
            "tokens_per_second": fmean(run["tokens_per_second"] for run in runs),
            "seconds": fmean(run["seconds"] for run in runs),
            "against_float": paired_over_seeds(
                [run["after"] for run in base], [run["after"] for run in runs]
            ),
            "within_seed": [each["overall"] for each in within] if name != first else [],
        }
    return found


# The study


def plan(setting: Setting) -> tuple[tuple[Member, ...], int, int]:
    """Family, problems a cell, seeds of the runs."""
    if setting.reduced:
        return TINY, 3, setting.seeds or 1
    return FAMILY, 200, setting.seeds or 5


def estimate(setting: Setting) -> str:
    """One sentence before the work begins."""
    family, _, seeds = plan(setting)
    missing = [m for m in family if not member_folder(m, setting.cache).exists()]
    minutes, cpu = pretraining_minutes(missing)
    return (
        f"{len(missing)} of {len(family)} models of the family must be trained: about "
        f"{minutes:.0f} min at the speed of the bundled model's ({cpu}); then {len(ARMS) * seeds} "
        f"GRPO runs{expected(len(ARMS) * seeds, run_config(False).per_cell)}, and the evaluations"
    )


def run(setting: Setting) -> StudyResult:
    """Train missing models, evaluate every model in every format, and judge the predictors."""
    family, per_cell, seeds = plan(setting)
    setting.say(estimate(setting))
    decides = decided_by(setting, per_cell=per_cell, family=[asdict(member) for member in family])
    pieces = Pieces(setting.work, "quantization", decides)
    arms = train_arms(setting, seeds, pieces.folder / "runs")
    sources: dict[str, str] = {
        "bundled": "bundled",
        "bundled after GRPO": str(pieces.folder / "runs" / f"{slug(TRAINED)}-0" / "model"),
    }
    for member in family:
        setting.say(f"model of {member.name}")
        folder = make_member(member, member_folder(member, setting.cache), setting.say)
        sources[member.name] = str(folder)
    sources |= {name: name for name in setting.models}
    measured = {}
    for name, source in sources.items():
        measured[name] = evaluate_formats(name, source, per_cell, pieces, setting)
    results = summarize(measured)
    results["rollouts"] = compare_arms(arms)
    record = new_record(
        "study-quantization",
        {
            "reduced": setting.reduced,
            "per_cell": per_cell,
            "seeds": seeds,
            "family": [asdict(member) for member in family],
            "formats": {f.name: {"simulated": f.simulated, "bits": f.bits} for f in FORMATS},
            "int4_group": GROUP,
            "run": asdict(run_config(setting.reduced)),
        },
        results,
    )
    answers = {
        f"{model} | {form}": each["evaluation"]
        for model, forms in measured.items()
        for form, each in forms.items()
    }
    trained = {
        f"{arm} | seed {each['seed']}": each["evaluation"]
        for arm, each_arm in arms.items()
        for each in each_arm
    }
    return StudyResult(record, {"formats": item_table(answers), "rollouts": item_table(trained)})


def evaluate_formats(
    name: str, source: str, per_cell: int, pieces: Pieces, setting: Setting
) -> dict[str, dict[str, Any]]:
    """``{format: {"evaluation", "bytes", "output_error", "weight_error"}}`` of one model."""
    problems = held_out_problems(per_cell)
    limit = 48 if setting.reduced else RunConfig().max_completion
    worked = [
        problem
        for domain in DOMAINS
        for difficulty in DIFFICULTIES
        for problem in make_problems(domain, difficulty, "train", 2, seed=0)
    ]
    loaded: list[Any] = []

    def policy() -> Any:
        if not loaded:
            loaded.append(load_policy(source))
        return loaded[0]

    def measure(chosen: Format) -> dict[str, Any]:
        changed = chosen.make(policy().model)
        served = replace(policy(), model=changed)
        judged = with_answer_format(problems, default_answer_format(served.model.config))
        evaluate(served, judged[:8], "warm-up", Sampling(8, temperature=0.0))
        found = evaluate(served, judged, f"{name}, {chosen.name}", Sampling(limit, temperature=0.0))
        return {
            "evaluation": packed_evaluation(found),
            "bytes": stored_bytes(policy().model, chosen, changed),
            **layer_errors(policy(), changed, worked),
        }

    return in_each_format(name, FORMATS, measure, pieces, setting.say)


def in_each_format(
    model: str,
    formats: Sequence[Format],
    measure: Callable[[Format], Any],
    pieces: Pieces,
    say: Say,
) -> dict[str, Any]:
    """``{format: measure(format)}`` of a model, each measured once."""
    found = {}
    for chosen in formats:
        say(f"{model}, {chosen.name}")
        place = f"{slug(model)}-{slug(chosen.name)}"
        found[chosen.name] = pieces.once(place, partial(measure, chosen))
    return found


def summarize(measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Accuracy, loss against float32, bytes and speed of every model and format."""
    simulated = {chosen.name: chosen.simulated for chosen in FORMATS}
    rows, losses = [], []
    for model, forms in measured.items():
        reference = unpacked_evaluation(forms["fp32"]["evaluation"])
        for name, each in forms.items():
            evaluation = unpacked_evaluation(each["evaluation"])
            table = accuracy_table(evaluation)
            row = {
                "model": model,
                "format": name,
                "simulated": simulated[name],
                "accuracy": table["overall"],
                "bytes": each["bytes"],
                "tokens_per_second": (
                    None if simulated[name] else sum(evaluation.tokens) / evaluation.seconds
                ),
                **{key: each[key] for key in PREDICTORS},
            }
            if name != "fp32":
                paired = compare(reference, evaluation)
                row["against_fp32"] = {
                    key: paired[key] for key in ("overall", "by_domain", "by_difficulty")
                }
                loss = -paired["overall"]["difference"]
                losses.append(
                    {
                        "model": model,
                        "format": name,
                        "loss": loss,
                        **{key: each[key] for key in PREDICTORS},
                    }
                )
            rows.append(row)
    compared = [row["against_fp32"]["overall"] for row in rows if "against_fp32" in row]
    for overall, corrected in zip(compared, holm([row["p_value"] for row in compared])):
        overall["p_holm"] = corrected
    problems = len(next(iter(measured.values()))["fp32"]["evaluation"]["item_ids"])
    return {"problems": problems, "rows": rows, "predictor": judge_predictors(losses)}


# Tables, findings and plot


def tables(record: RunRecord) -> list[Table]:
    results = record.results
    accuracy = []
    for row in results["rows"]:
        change = row.get("against_fp32", {}).get("overall")
        speed = row["tokens_per_second"]
        accuracy.append(
            [
                row["model"],
                row["format"] + (" (simulated)" if row["simulated"] else ""),
                f"{100 * row['accuracy']['accuracy']:.1f} %",
                "–" if change is None else signed(change),
                "–" if change is None else f"{change['gained']}/{change['lost']}",
                "–" if change is None else f"{change['p_holm']:.3f}",
                f"{row['bytes'] / 1e6:.2f}",
                "–" if speed is None else f"{speed:.0f}",
            ]
        )
    errors = results["predictor"]["mean_absolute_error"]
    arms = [
        [
            name,
            f"{100 * arm['after']:.1f} %",
            "–" if not arm["within_seed"] else signed(arm["against_float"]),
            f"{arm['tokens_per_second']:.0f}",
            f"{arm['seconds']:.0f}",
        ]
        for name, arm in ((name, results["rollouts"][name]) for name in ARMS)
    ]
    return [
        (
            f"Accuracy on the same {results['problems']} held-out problems; difference to fp32 in "
            "points with its 95 % interval, problems gained and lost, McNemar's p after Holm",
            ["Model", "Format", "Accuracy", "Difference", "+/-", "p", "MB", "tokens/s"],
            accuracy,
        ),
        (
            "Accuracy loss of a model predicted from the others: mean absolute error in points",
            ["Predictor", "Error"],
            [[name.replace("_", " "), f"{100 * errors[name]:.2f}"] for name in JUDGED],
        ),
        (
            "GRPO with each kind of rollouts: accuracy after training, mean over seeds",
            ["Rollouts", "Accuracy", "Against float32", "tokens/s", "s a run"],
            arms,
        ),
    ]


def findings(record: RunRecord) -> list[str]:
    """What the record says, in sentences."""
    results = record.results
    rows = [row for row in results["rows"] if "against_fp32" in row]
    said = []
    for name in dict.fromkeys(row["format"] for row in rows):
        found = [row["against_fp32"]["overall"] for row in rows if row["format"] == name]
        clear = [row for row in found if row["p_holm"] < 0.05]
        said.append(
            f"{name}: mean difference to fp32 {100 * fmean(r['difference'] for r in found):+.1f} "
            f"points over {len(found)} models; {len(clear)} of them differ after correction for "
            f"{len(rows)} comparisons."
        )
    errors = results["predictor"]["mean_absolute_error"]
    best = min(JUDGED, key=lambda name: errors[name])
    said.append(
        f"Predicting the loss of a left-out model, {best.replace('_', ' ')} erred least "
        f"({100 * errors[best]:.2f} points; saying that nothing is lost errs by "
        f"{100 * errors['no loss']:.2f})."
    )
    for name in ARMS:
        arm = results["rollouts"][name]
        if arm["within_seed"]:
            seeds = arm["against_float"]["n"]
            said.append(
                f"GRPO with {name} rollouts against float32 ones, {seeds} seed"
                f"{'s' if seeds > 1 else ''}: {signed(arm['against_float'])} points."
            )
    return said


def plot(record: RunRecord) -> Plot:
    """The difference to fp32 of every model and format, with intervals."""
    rows = [row for row in record.results["rows"] if "against_fp32" in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    names = list(dict.fromkeys(row["format"] for row in rows))
    figure = new_figure(7.4, 1.4 + 0.55 * len(models))
    axes = figure.add_subplot()
    worst: dict[str, float] = {}
    for k, name in enumerate(names):
        of_model = {
            row["model"]: row["against_fp32"]["overall"] for row in rows if row["format"] == name
        }
        chosen = [of_model[model] for model in models]
        worst[name] = 100 * min(row["difference"] for row in chosen)
        draw_differences(
            axes,
            chosen,
            [i + 0.14 * (k - (len(names) - 1) / 2) for i in range(len(models))],
            marker="os^Dv"[k % 5],
            color=(BLUE, ORANGE, GREEN, VERMILLION, GREY)[k % 5],
            capsize=2,
            ms=4,
            label=name,
        )
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    tidy(axes, x="accuracy against fp32, points (bars: 95 % intervals)", grid="both")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    facts = "; ".join(f"{name} {value:+.1f} points" for name, value in worst.items())
    return Plot(
        figure,
        f"Dot chart of the change of accuracy against fp32 for {len(models)} models in "
        f"{len(names)} formats; the largest loss of each format: {facts}.",
    )
