"""Make the bundled model: a small Qwen2, supervised on worked solutions, stopped early.

The corpus mixes two styles, as text from the web does: some answers come with
their working, some come bare. A model trained on it often blurts out a bare
answer and is often wrong; working step by step is in it, but has to be found.
That, and the early stop, is what GRPO can improve.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from cpugrpo_edu.tasks import DOMAINS, TASKS, split_of
from cpugrpo_edu.types import ANSWER_MARK, DIFFICULTIES, Problem, UserError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PIECES = r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+ ?|\s+"
"""Each digit alone, words with their leading space, signs with the spaces around them."""


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides what the bundled model is."""

    seed: int = 0
    steps: int = 3000
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    bare_share: float = 0.5
    """Share of examples whose target is the answer without its working."""
    difficulty_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    vocabulary: int = 512
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 512


def problem_stream(seed: int, weights: tuple[float, ...]) -> Iterator[Problem]:
    """Endless problems of the pretraining split, all domains and difficulties mixed."""
    rng = random.Random(f"pretrain/{seed}")
    tasks = [TASKS[name] for name in DOMAINS]
    while True:
        difficulty = rng.choices(DIFFICULTIES, weights)[0]
        problem = rng.choice(tasks).generate(difficulty, rng)
        if split_of(problem.question) == "pretrain":
            yield problem


def train_tokenizer(vocabulary: int, seed: int = 0, samples: int = 6000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be written, ours is written shortly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    stream = problem_stream(seed, (1.0, 1.0, 1.0))
    texts = (f"{p.question}\n{p.solution}" for p, _ in zip(stream, range(samples)))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (text + "\nuser\nassistant\n" for text in texts), trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
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
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def target_text(problem: Problem, bare: bool) -> str:
    """The completion to imitate: the worked solution, or only its last line."""
    return f"{ANSWER_MARK} {problem.answer}" if bare else problem.solution


def batches(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless ``(input_ids (B, T), labels (B, T))``, right-padded, prompts not learnt.

    Eight batches are drawn together and cut by length, so that little is padding.
    """
    rng = random.Random(f"batches/{config.seed}")
    stream = problem_stream(config.seed, config.difficulty_weights)
    while True:
        examples = []
        for _ in range(8 * config.batch_size):
            problem = next(stream)
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": problem.question}],
                add_generation_prompt=True,
                tokenize=False,
            )
            target = target_text(problem, bare=rng.random() < config.bare_share)
            examples.append((prompt, target + "<|im_end|>"))
        prompts = tokenizer([prompt for prompt, _ in examples])["input_ids"]
        targets = tokenizer([target for _, target in examples])["input_ids"]
        pairs = sorted(zip(prompts, targets, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
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
    """Linear warm-up, then a cosine to a tenth."""
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

    Returns a summary for the model card: examples seen, final loss (nats per
    target token), seconds. Raises UserError if the folder already holds a model.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        raise UserError(
            f"{folder} already holds a model; give another --output or remove that folder first"
        )
    start = time.perf_counter()
    tokenizer = train_tokenizer(config.vocabulary, config.seed)
    model = new_model(config, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=0.01, betas=(0.9, 0.95), fused=True
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
