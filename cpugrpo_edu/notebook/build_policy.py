"""What the reader builds in chapter 1: a padded batch, its log-probabilities, and a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cpugrpo_edu.notebook.babbler import END, LIMIT, PROMPT, babbler, enumerated
from cpugrpo_edu.notebook.checks import Build, Function, called, misshapen, report
from cpugrpo_edu.policy import completion_logits, gather_log_probs, token_log_probs
from cpugrpo_edu.sample import left_pad

# --- A padded batch, and its log-probabilities --------------------------------


def padded(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt ids (B, P), completion ids (B, C) and attention mask (B, P + C)."""
    prompt_ids, prompt_mask = left_pad(prompts, pad)
    written = [torch.tensor(list(o)) for o in completions]
    mask = pad_sequence([torch.ones_like(o) for o in written], batch_first=True)
    ids = pad_sequence(written, batch_first=True, padding_value=pad)
    return prompt_ids, ids, torch.cat([prompt_mask, mask], dim=1)


def _right_padded_prompts(prompts: Any, completions: Any, pad: int) -> tuple[Tensor, ...]:
    blank: list[list[int]] = [[] for _ in prompts]
    _, ids, mask = padded(blank, prompts, pad)
    _, written, real = padded(blank, completions, pad)
    return ids, written, torch.cat([mask, real], dim=1)


def _without_mask(prompts: Any, completions: Any, pad: int) -> tuple[Tensor, ...]:
    prompt_ids, ids, attention = padded(prompts, completions, pad)
    return prompt_ids, ids, torch.ones_like(attention)


def _end_is_padding(prompts: Any, completions: Any, pad: int) -> tuple[Tensor, ...]:
    prompt_ids, ids, attention = padded(prompts, completions, pad)
    return prompt_ids, ids, attention * (torch.cat([prompt_ids, ids], dim=1) != pad)


TEXTS = ([[1], [1, 2], [4, 1, 2]], [[3, END], [1, 4, 2], [END]])
"""Three prompts and their completions in the babbler's words."""

PAD = Build(
    padded,
    lambda: [(*TEXTS, END), ([[1, 2], [3]], [[2, 4], [4, END]], END)],
    [
        (
            (
                "your prompts are padded on the right, so that completions begin in different "
                "places; put the padding in front of them."
            ),
            _right_padded_prompts,
        ),
        ("your mask is 1 on padding as well; it must be 0 there.", _without_mask),
        (
            (
                "your mask is 0 wherever the token is END. But END is a real token where the "
                "completion has it; count lengths instead of comparing tokens."
            ),
            _end_is_padding,
        ),
    ],
    ("prompt ids", "completion ids", "attention mask"),
)


def _late(model: Any, prompts: Tensor, ids: Tensor, attention: Tensor, T: float = 1.0) -> Tensor:
    logits = model(torch.cat([prompts, ids], dim=1), attention_mask=attention).logits / T
    P = prompts.shape[1]
    return gather_log_probs(logits[:, P:], ids) * attention[:, P:]


def _inattentive(
    model: Any, prompts: Tensor, ids: Tensor, attention: Tensor, T: float = 1.0
) -> Tensor:
    found = token_log_probs(model, prompts, ids, torch.ones_like(attention), T)
    return found * attention[:, prompts.shape[1] :]


def _raw(model: Any, prompts: Tensor, ids: Tensor, attention: Tensor, T: float = 1.0) -> Tensor:
    logits = completion_logits(model, prompts, ids, attention, T)
    return logits.gather(-1, ids[..., None])[..., 0] * attention[:, prompts.shape[1] :]


LOG_PROBS = Build(
    token_log_probs,
    lambda: [
        (babbler().requires_grad_(False), *padded(*TEXTS, END)),
        (babbler().requires_grad_(False), *padded(*TEXTS, END), 2.0),
    ],
    [
        (
            "you read the logits one position too late: those at position i predict token i + 1, "
            "so the first one you need is at the prompt's last position.",
            _late,
        ),
        (
            "it is not 0 on padding; multiply by the completion's part of the mask.",
            lambda *case: gather_log_probs(completion_logits(*case), case[2]),
        ),
        (
            "the model attends to padding; pass it attention_mask=attention.",
            _inattentive,
        ),
        ("these are logits; the log-softmax over the vocabulary is missing.", _raw),
        (
            "these are probabilities; take their logarithm.",
            lambda *case: token_log_probs(*case).exp() * case[3][:, case[1].shape[1] :],
        ),
        (
            "the temperature is ignored; divide the logits by it.",
            lambda *case: token_log_probs(*case[:4]),
        ),
    ],
)


# --- The sampler --------------------------------------------------------------

DRAWS = 4000
UNLIKELY = 1e-6  # p-value below which a sampler draws from another distribution


def check_sampler(mine: Function) -> bool:
    """Check ``mine(model, prompt_ids, limit, temperature, generator)``: token ids and mask.

    Its completions of the babbler are counted and compared with all exact probabilities.
    """
    return report(mine, sampler_fault(mine))


def sampler_fault(mine: Function) -> str:
    model = babbler().requires_grad_(False)
    prompts = torch.tensor([PROMPT]).repeat(DRAWS, 1)

    def draw(temperature: float, seed: int = 0) -> tuple[tuple[Tensor, ...], str]:
        generator = torch.Generator().manual_seed(seed)
        return called(mine, (model, prompts, LIMIT, temperature, generator))

    values, wrong = draw(2.0)
    wrong = wrong or misshapen(values, [torch.zeros(DRAWS, LIMIT)] * 2, ("token ids", "mask"))
    if wrong or (wrong := bad_mask(*values)):
        return wrong
    if len(values[0].unique(dim=0)) == 1:
        return "it writes the same completion each time; draw a token, do not take the best."
    if not torch.equal(values[0], draw(2.0)[0][0]):
        return "the same generator gave other tokens; pass generator= to torch.multinomial."
    if fits(model, values[0], 2.0) < UNLIKELY:
        for temperature, said in ((1.0, "ignored"), (0.5, "multiplied instead of divided by")):
            if fits(model, values[0], temperature) > UNLIKELY:
                return f"the temperature is {said}; divide the logits by it before the softmax."
        return "its completions do not have the model's probabilities; what does it draw from?"
    return ""


def bad_mask(ids: Tensor, mask: Tensor) -> str:
    ended = (ids == END).cumsum(dim=1)
    after = (ended - (ids == END).long()) > 0  # positions behind the first END
    if (mask[after] != 0).any():
        return "its mask is 1 behind END; a completion is over there."
    if (ids[after] != END).any():
        return "it writes words behind END; put padding (END) there."
    if (mask[~after] != 1).any():
        return "its mask is 0 on a real token; the first END is one, it was drawn."
    return ""


def fits(model: Any, ids: Tensor, temperature: float) -> float:
    """p-value of the chi-squared test that completions have the model's probabilities."""
    from scipy.stats import chi2

    prompts, every, real = enumerated(LIMIT)
    attention = torch.cat([torch.ones_like(prompts), real], dim=1)
    exact = token_log_probs(model, prompts, every, attention, temperature).sum(dim=1).exp()
    same = (ids[:, None] == every[None]).all(dim=2)
    seen, expected = same.sum(dim=0).double(), exact.double() * len(ids)
    rare = expected < 5
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    return float(chi2.sf(statistic, len(seen) - 1))
