"""Make the bundled model: a small Qwen2, supervised on worked solutions, stopped early.

The corpus mixes two styles, as text from the web does: some answers come with their working, some
come bare. A model trained on it often blurts out a bare answer, and is often wrong. It has learned
to work step by step as well, but seldom does. That habit, and the early stop, is what GRPO can
improve.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from cpugrpo_edu.data import ANSWER_MARK, DIFFICULTIES, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.evaluate import evaluate
from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.models.quiet import without_bars
from cpugrpo_edu.policy import Policy
from cpugrpo_edu.record.files import check_output_folder
from cpugrpo_edu.record.machine import describe_machine, versions
from cpugrpo_edu.record.markdown import markdown_table
from cpugrpo_edu.record.stats import accuracy_table, working_share
from cpugrpo_edu.sample import Sampling
from cpugrpo_edu.tasks import DOMAINS, TASKS, held_out_problems, split_of

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides what the bundled model is."""

    seed: int = 0
    steps: int = 7000
    batch_size: int = 24
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    bare_early: float = 0.1
    bare_late: float = 0.5
    """Share of examples whose target is the answer without its working, in the first part
    of the corpus and in the last ``late_part`` of it."""
    late_part: float = 0.08
    difficulty_weights: tuple[float, float, float] = (1.5, 1.0, 0.75)
    vocabulary: int = 448
    hidden: int = 160
    layers: int = 4
    heads: int = 5
    kv_heads: int = 5
    ffn: int = 448
    initializer_range: float = 0.08


def check_settings(config: PretrainConfig) -> None:
    """Raise ``UserError`` now for what would fail only after the tokenizer has been trained."""
    for name in ("steps", "hidden", "layers"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; give at least 1")
    if config.hidden % (2 * config.heads):
        raise UserError(
            f"hidden is {config.hidden}; give a multiple of {2 * config.heads}, "
            f"for {config.heads} heads of an even size"
        )
    if config.seed < 0:
        raise UserError(f"seed is {config.seed}; give 0 or more")


def problem_stream(seed: int, weights: tuple[float, ...]) -> Iterator[Problem]:
    """Endless problems of the pretraining split, all domains and difficulties mixed."""
    rng = random.Random(f"pretrain/{seed}")
    tasks = [TASKS[name] for name in DOMAINS]
    while True:
        difficulty = rng.choices(DIFFICULTIES, weights)[0]
        problem = rng.choice(tasks).generate(difficulty, rng)
        if split_of(problem.question) == "pretrain":
            yield problem


def train_tokenizer(vocabulary: int, seed: int = 0, samples: int = 6000) -> Qwen2Tokenizer:
    """Qwen2's tokenizer with a vocabulary of our own: byte-level BPE, every digit alone.

    Any text can be written in it; the words of our problems are single tokens.
    """
    tokenizer = Qwen2Tokenizer(padding_side="left", model_max_length=1024)
    backend = tokenizer.backend_tokenizer
    stream = problem_stream(seed, (1.0, 1.0, 1.0))
    texts = (f"{p.question}\n{p.solution}" for p, _ in zip(stream, range(samples)))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text + "\nuser\nassistant\n" for text in texts), trainer)
    with tempfile.TemporaryDirectory() as folder:  # Qwen2Tokenizer takes vocabulary and merges
        vocabulary_file, merges_file = backend.model.save(folder)
        vocab = json.loads(Path(vocabulary_file).read_text())
        merges: Any = [tuple(x.split(" ")) for x in Path(merges_file).read_text().splitlines()[1:]]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=1024,
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(config: PretrainConfig, tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights, small enough for seconds on two cores."""
    torch.manual_seed(config.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocabulary,
            hidden_size=config.hidden,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            initializer_range=config.initializer_range,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            cpugrpo_format=True,  # type: ignore[call-arg]  # it knows the answer format without a system prompt
        )
    )


def target_text(problem: Problem, bare: bool) -> str:
    """The completion to imitate: the worked solution, or only its last line."""
    return f"{ANSWER_MARK} {problem.answer}" if bare else problem.solution


def batches(
    config: PretrainConfig, tokenizer: Qwen2Tokenizer
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless ``(input_ids, labels)``, (B, T) each, padded on the right.

    Labels are -100 on prompts and padding, which so count for nothing. Eight batches are drawn
    together and cut by length, so that little is padding.
    """
    rng = random.Random(f"batches/{config.seed}")
    stream = problem_stream(config.seed, config.difficulty_weights)
    for drawn in itertools.count(step=8):
        late = drawn >= (1 - config.late_part) * config.steps
        bare_share = config.bare_late if late else config.bare_early
        examples = []
        for _ in range(8 * config.batch_size):
            problem = next(stream)
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": problem.question}],
                add_generation_prompt=True,
                tokenize=False,
            )
            target = target_text(problem, bare=rng.random() < bare_share)
            examples.append((prompt, target + "<|im_end|>"))
        prompts = tokenizer([prompt for prompt, _ in examples])["input_ids"]
        targets = tokenizer([target for _, target in examples])["input_ids"]
        pairs = sorted(
            zip(prompts, targets, strict=True), key=lambda pair: len(pair[0]) + len(pair[1])
        )
        chunks = [pairs[i : i + config.batch_size] for i in range(0, len(pairs), config.batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(prompt) + len(target) for prompt, target in chunk)
            input_ids = torch.full((len(chunk), width), tokenizer.pad_token_id)
            labels = torch.full((len(chunk), width), -100)
            for row, (prompt, target) in enumerate(chunk):
                end = len(prompt) + len(target)
                input_ids[row, :end] = torch.tensor(prompt + target)
                labels[row, len(prompt) : end] = torch.tensor(target)
            yield input_ids, labels


def learning_rate_at(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(
    config: PretrainConfig,
    folder: str | Path,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> dict[str, Any]:
    """Train the tokenizer and the model and save both as a standard HF folder.

    Returns a summary for the model card: examples seen, final loss (nats a target token), seconds.
    ``on_step`` gets the number of steps done and the loss, averaged over up to 50 steps. Raises
    ``UserError`` if the folder already holds a model.
    """
    folder = check_output_folder(folder)
    if (folder / "config.json").exists() or (folder / "model.safetensors").exists():
        raise UserError(
            f"{folder} already holds a model; give another --output or remove that folder first"
        )
    start = time.perf_counter()
    tokenizer = train_tokenizer(config.vocabulary, config.seed)
    model = new_model(config, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=0.01,
        betas=(0.9, 0.95),
        fused=True,
    )
    loss_average = 0.0
    for step, (input_ids, labels) in zip(range(config.steps), batches(config, tokenizer)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_average += (loss.item() - loss_average) / min(step + 1, 50)
        on_step(step + 1, {"loss": loss_average})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "config": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "examples": config.steps * config.batch_size,
        "loss": loss_average,
        "seconds": time.perf_counter() - start,
    }


@without_bars()
def make_model(
    config: PretrainConfig,
    folder: str | Path,
    per_cell: int = 300,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> dict[str, Any]:
    """Pretrain, score the result on held-out problems, and write its model card.

    ``per_cell`` is the number of problems a domain and difficulty. Returns the summary. Raises
    ``UserError`` for settings that cannot work and for a folder that already holds a model.
    """
    check_settings(config)
    if per_cell < 1:
        raise UserError(f"per_cell is {per_cell}; give at least 1")
    summary = pretrain(config, folder, on_step)
    summary["machine"] = describe_machine().to_json()
    summary["versions"] = versions()
    (Path(folder) / "pretraining.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_model_card(load_policy(folder, system=""), summary, folder, per_cell)
    return summary


def write_model_card(
    policy: Policy, summary: dict[str, Any], folder: str | Path, per_cell: int
) -> None:
    """README.md: what the model is, what it was trained on, how it scores, what it is not for."""
    config = summary["config"]
    problems = held_out_problems(per_cell)
    sections = []
    for temperature, name in ((0.0, "Greedy"), (1.0, "Sampled at temperature 1")):
        evaluation = evaluate(policy, problems, name, Sampling(128, temperature))
        table = accuracy_table(evaluation)
        rows = [
            [domain, *(interval_text(cells[level]) for level in DIFFICULTIES)]
            for domain, cells in table["cells"].items()
        ]
        rows.append(["all", *(interval_text(table["by_difficulty"][x]) for x in DIFFICULTIES)])
        habit = working_share(evaluation)
        sections.append(
            f"### {name}\n\n{markdown_table(['Domain', *DIFFICULTIES], rows)}\n\n"
            f"Overall {interval_text(table['overall'])} % on {table['overall']['n']:,} problems. "
            f"{100 * (habit['share_with_working'] or 0):.0f} % of the completions show working.\n"
        )
    text = MODEL_CARD.format(
        parameters=summary["parameters"],
        examples=summary["examples"],
        minutes=summary["seconds"] / 60,
        cpu=summary["machine"].get("cpu", "unknown CPU"),
        early=100 * config["bare_early"],
        late=100 * config["bare_late"],
        part=100 * config["late_part"],
        loss=summary["loss"],
        per_cell=per_cell,
        scores="\n".join(sections),
        **{k: config[k] for k in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocabulary")},
        **{k: config[k] for k in ("steps", "batch_size", "seed")},
    )
    (Path(folder) / "README.md").write_text(text)


def interval_text(row: dict[str, Any]) -> str:
    """An accuracy and its interval in %."""
    return f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


MODEL_CARD = """\
# The bundled model

A small language model for learning GRPO: a `Qwen2ForCausalLM` with {parameters:,} parameters
({layers} layers, hidden size {hidden}, {heads} query and {kv_heads} key/value heads, FFN {ffn},
vocabulary {vocabulary}, tied embeddings), a byte-level BPE tokenizer that makes each digit a
separate token, and a chat template. It knows nothing but the four domains below.

## How it was made

`cpugrpo pretrain` makes the model again. Supervised training took {steps} steps with
{batch_size} generated problems each ({examples:,} examples, seed {seed}) and was stopped early
on purpose. It took {minutes:.0f} minutes on {cpu} while the machine was also
doing other work. The final loss was {loss:.2f} nats per target token.

The problems are multi-step arithmetic, word problems (money, time, percentages), linear
equations, and list manipulation, each in three difficulties. All are generated, and all come
from the pretraining split. The hash of a question decides its split, so the model was not
trained on any evaluation question.

The targets are worked solutions with one step per line, and bare answers without working:
{early:.0f} % bare answers at first, {late:.0f} % in the last {part:.0f} % of the corpus. This is
deliberate: **the model is able to work step by step, but rarely does so**. Much of what GRPO
gains in the first steps is this habit. A run's record counts how often completions show working;
before training this is so rare that skill alone can hardly be compared.

## How it scores

Exact match in % with 95 % Wilson intervals, on {per_cell} held-out problems per cell.

{scores}
## What it is not for

The model is not useful for anything else. It has seen no natural text except the problem
templates, and answers every other question with nonsense.
"""
