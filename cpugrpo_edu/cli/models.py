"""``cpugrpo models | fetch | push | pretrain``: which models fit; to get, publish or make one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from cpugrpo_edu.cli.command import Call, PerCell, app, command, table, within
from cpugrpo_edu.engine import hardware
from cpugrpo_edu.record.machine import GIB, available_memory


@command(app)
def models(
    call: Call,
    memory_gib: Annotated[
        float | None,
        Option(help="Instead of this machine's available memory.", callback=within(0.01, 2**20)),
    ] = None,
) -> None:
    """Show which well-known small models fit into memory, and for what.

    Example: `cpugrpo models --memory-gib 8`
    """
    from cpugrpo_edu.engine.sizes import models_that_fit
    from cpugrpo_edu.lab.estimate import catalogue_steps

    available = available_memory() if memory_gib is None else int(memory_gib * GIB)
    found = models_that_fit(available)
    steps, about = catalogue_steps()
    headings = ["Model", "Parameters", "Evaluate", "LoRA", "Full", "Most that fits"]
    if steps:
        headings.append("LoRA on INT8")
    rows = []
    for model in found:
        model |= steps.get(model["name"], {})
        sizes = [f"{model[f'{kind}_bytes'] / GIB:.2f}" for kind in ("evaluate", "lora", "full")]
        rows.append([model["name"], f"{model['parameters']:,}", *sizes, model["verdict"]])
        if steps:
            memory = model["int8_peak_bytes"] / GIB
            rows[-1].append(f"{model['int8_step_seconds']:.1f} s, {memory:.1f} GiB")
    title = f"With {available / GIB:.1f} GiB of memory (estimates in GiB, float32)"
    call.give(found, table(title, headings, rows), about)


@command(app)
def fetch(
    call: Call,
    name: Annotated[str, Argument(help="smollm2: SmolLM2-135M-Instruct, a chat model.")],
) -> None:
    """Fetch a real chat model once; afterwards it works without a network.

    Example: `cpugrpo fetch smollm2`, then `cpugrpo generate "What is 12 + 7?" --model smollm2`
    """
    hardware.configure_threads()
    from cpugrpo_edu.models.fetch import fetch as fetch_model

    folder = fetch_model(name, call.say)
    call.give({"model": name, "folder": str(folder)}, str(folder))


@command(app)
def push(
    call: Call,
    model: Annotated[Path, Argument(help="A saved model, such as runs/first/model.")],
    target: Annotated[str, Argument(help="Its hub id: owner/name.")],
    private: Annotated[bool, Option("--private", help="A new one is for you alone.")] = False,
) -> None:
    """Publish a saved model and its model card on the Hugging Face hub, under your account.

    Log in first: `hf auth login`. Prompts and records of the run are not uploaded.

    Example: `cpugrpo push runs/first/model me/first`
    """
    from cpugrpo_edu.models.push import push as publish

    call.say(f"uploading {model} to {target}")
    url = publish(model, target, private=private)
    call.give({"model": str(model), "url": url}, url)


@command(app)
def pretrain(
    call: Call,
    output: Annotated[Path, Option(help="Folder for the new model.")] = Path("runs/pretrained"),
    steps: Annotated[int | None, Option(help="Supervised steps.", callback=within(1))] = None,
    seed: Annotated[int, Option(help="Of the weights and the corpus.", callback=within(0))] = 0,
    hidden: Annotated[int | None, Option(help="Hidden size.", callback=within(1))] = None,
    layers: Annotated[int | None, Option(help="Number of layers.", callback=within(1))] = None,
    per_cell: PerCell = 300,
) -> None:
    """Make the bundled model again: tokenizer, supervised training, model card.

    Example: `cpugrpo pretrain --output runs/my-base`
    """
    hardware.configure_threads()
    from cpugrpo_edu.models.pretrain import PretrainConfig, make_model
    from cpugrpo_edu.show.progress import ProgressDisplay

    sizes: dict[str, Any] = {"steps": steps, "hidden": hidden, "layers": layers}
    config = PretrainConfig(seed=seed, **{k: v for k, v in sizes.items() if v is not None})
    with ProgressDisplay(quiet=call.quiet) as display:
        display.start_stage("pretrain", config.steps)
        summary = make_model(
            config, output, per_cell, lambda step, metrics: display.update(step, **metrics)
        )
    call.give(summary, f"Saved a model of {summary['parameters']:,} parameters in {output}")
