"""Pretraining: the saved folder is what was trained, and the corpus is as described."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from conftest import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpugrpo_edu.data import DIFFICULTIES, Problem
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.models.pretrain import (
    PretrainConfig,
    batches,
    learning_rate_at,
    make_model,
    new_model,
    pretrain,
    problem_stream,
    target_text,
    train_tokenizer,
)
from cpugrpo_edu.tasks import DOMAINS

SHORT = dataclasses.replace(TINY, steps=30, batch_size=8, warmup_steps=5, learning_rate=1e-2)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TINY.vocabulary, samples=200)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """One short run of the whole command: folder, summary, losses."""
    folder = tmp_path_factory.mktemp("made") / "model"
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpugrpo_edu.models.pretrain.train_tokenizer", lambda *a, **k: tokenizer)
        summary = make_model(
            SHORT, folder, per_cell=1, on_step=lambda step, m: losses.append((step, m["loss"]))
        )
    return folder, summary, losses


def test_a_few_steps_reduce_the_loss(made):
    _, summary, losses = made
    assert [step for step, _ in losses] == list(range(1, 31))
    assert losses[0][1] > 4  # near log(320) = 5.8 nats, or above it
    assert losses[-1][1] < 0.8 * losses[0][1]
    assert summary["loss"] == losses[-1][1]
    assert summary["examples"] == 30 * 8


def test_the_saved_folder_loads_with_plain_transformers_to_the_same_tokens(made, tokenizer):
    plain = AutoTokenizer.from_pretrained(made[0])
    texts = [
        *(
            f"{p.question}\n{p.solution}"
            for p in itertools.islice(problem_stream(9, (1, 1, 1)), 40)
        ),
        "Compute 123+4567.\n#### 12\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "  two  spaces\n\n\tand tabs, don't, WON'T",
        "naïve café 日本語 🙂 ٣٤ e\u0301",
        "",
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert plain(text)["input_ids"] == ids, text
        assert plain.tokenize(text) == tokenizer.tokenize(text)
    message = [{"role": "user", "content": "Compute 1+2."}]
    assert plain.apply_chat_template(
        message, add_generation_prompt=True, tokenize=False
    ) == tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert (plain.eos_token, plain.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert plain.padding_side == "left"
    assert len(plain) == TINY.vocabulary


def test_saved_weights_give_the_trained_models_logits(tmp_path, tokenizer):
    model = new_model(TINY, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("Compute 7+5*3-4.", return_tensors="pt")
    assert ids["input_ids"].tolist() == tokenizer(["Compute 7+5*3-4."])["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(plain(**ids).logits, model.eval()(**ids).logits)
    assert plain.config.cpugrpo_format is True
    assert plain.generation_config.eos_token_id == tokenizer.eos_token_id


def test_any_text_can_be_written_and_digits_stand_alone(tokenizer):
    for text in ("12*345=4140\n#### 4140", "naïve 日本語 🙂\x00\n\t", "x" * 300):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    for text in ("12*345=4140", "Tom has $1234 and 56%", "x7x88"):
        pieces = tokenizer.tokenize(text)
        assert all(len(p) == 1 for p in pieces if any(c.isdigit() for c in p)), pieces
    ids = tokenizer("<|im_start|>user<|im_end|>")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)


def test_an_existing_model_is_never_overwritten(made):
    folder = made[0]
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"already holds a model.*--output"):
        pretrain(SHORT, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_make_model_writes_its_card_and_how_it_was_made(made):
    folder, summary, _ = made
    stored = json.loads((folder / "pretraining.json").read_text())
    assert stored["config"]["steps"] == 30 and stored["config"]["hidden"] == 32
    assert stored["parameters"] == summary["parameters"]
    assert stored["parameters"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()
    )
    assert {"machine", "versions", "seconds", "loss"} <= set(stored)
    card = (folder / "README.md").read_text()
    names = [name.replace("_", r"\_") for name in DOMAINS]  # as Markdown writes them
    for part in (f"{stored['parameters']:,} parameters", "240 examples", "Greedy", *names):
        assert part in card
    assert "on 12 problems" in card  # one a cell
    assert not [line for line in card.splitlines() if "{" in line or "nan" in line.split()]


def decoded(tokenizer, config, count):
    for input_ids, labels in itertools.islice(batches(config, tokenizer), count):
        yield from zip(input_ids, labels, strict=True)


def test_only_the_answers_are_learnt(tokenizer):
    config = dataclasses.replace(SHORT, bare_early=0.5, bare_late=0.5)
    for row, label in decoded(tokenizer, config, 8):
        learnt = label != -100
        assert torch.equal(row[learnt], label[learnt])
        target = tokenizer.decode(label[learnt])
        assert target.endswith("<|im_end|>") and target.count("<|im_end|>") == 1
        assert "#### " in target and "<|im_start|>" not in target
        start = int(learnt.nonzero()[0])
        prompt = tokenizer.decode(row[:start])
        assert prompt.startswith("<|im_start|>user\n")
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert not learnt[:start].any()
        end = start + int(learnt.sum())
        assert learnt[start:end].all()
        assert (row[end:] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize(("early", "late"), [(0.0, 1.0), (1.0, 0.0)])
def test_bare_answers_come_in_the_part_of_the_corpus_they_are_meant_for(tokenizer, early, late):
    config = dataclasses.replace(
        SHORT, steps=32, bare_early=early, bare_late=late, late_part=0.25, batch_size=4
    )
    bare = [
        "\n" not in tokenizer.decode(label[label != -100])
        for _, label in decoded(tokenizer, config, 32)
    ]
    assert bare == [bool(early)] * 24 * 4 + [bool(late)] * 8 * 4


def test_bare_share_in_between(tokenizer):
    config = dataclasses.replace(SHORT, steps=100, bare_early=0.3, batch_size=16)
    bare = [
        "\n" not in tokenizer.decode(label[label != -100])
        for _, label in decoded(tokenizer, config, 16)
    ]
    assert sum(bare) / len(bare) == pytest.approx(0.3, abs=0.12)


def test_the_stream_weights_its_difficulties_and_mixes_all_domains():
    drawn = list(itertools.islice(problem_stream(0, (3.0, 1.0, 0.0)), 600))
    shares = [sum(p.difficulty == d for p in drawn) / 600 for d in DIFFICULTIES]
    assert shares == pytest.approx([0.75, 0.25, 0], abs=0.07)
    assert {p.domain for p in drawn} == set(DOMAINS)
    again = list(itertools.islice(problem_stream(0, (3.0, 1.0, 0.0)), 20))
    assert drawn[:20] == again
    assert again != list(itertools.islice(problem_stream(1, (3.0, 1.0, 0.0)), 20))


def test_targets():
    problem = Problem("", "arithmetic", "basic", "Compute 1+2.", "3", "1+2=3\n#### 3")
    assert target_text(problem, bare=False) == "1+2=3\n#### 3"
    assert target_text(problem, bare=True) == "#### 3"


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    config = PretrainConfig(steps=1000, warmup_steps=100, learning_rate=1.0)
    rates = [learning_rate_at(step, config) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99] == rates[100] == 1
    assert rates[:100] == sorted(rates[:100])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[550] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
