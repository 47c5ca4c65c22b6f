# %% right: loops
def token_weights(mask, reduction, max_length):
    w = torch.zeros(mask.shape)
    for i, row in enumerate(mask):
        for t, m in enumerate(row):
            if m:
                w[i, t] = {"grpo": 1 / (float(row.sum()) * len(mask)), "bnpo": 1 / float(mask.sum()),
                           "dr_grpo": 1 / (len(mask) * max_length)}[reduction]
    return w
# %% right: normalise after the fact
def token_weights(mask, reduction, max_length):
    if reduction == "dr_grpo":
        return mask / mask.shape[0] / max_length
    w = mask / mask.sum(1, keepdim=True).clamp(min=1) if reduction == "grpo" else mask.clone()
    return w / w.sum()
# %% wrong: length bias kept, one formula for all -> weights-others
def token_weights(mask, reduction, max_length):
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
# %% wrong: token mean for all -> weights-grpo, weights-others
def token_weights(mask, reduction, max_length):
    return mask / mask.sum()
# %% wrong: mask forgotten -> weights-visible, weights-grpo
def token_weights(mask, reduction, max_length):
    n = {"grpo": mask.sum(1, keepdim=True).clamp(min=1) * len(mask), "bnpo": mask.sum(),
         "dr_grpo": torch.tensor(len(mask) * max_length)}[reduction]
    return torch.ones_like(mask) / n
# %% wrong: divided by the padded width -> weights-others
def token_weights(mask, reduction, max_length):
    if reduction == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    if reduction == "bnpo":
        return mask / mask.sum()
    return mask / mask.numel()
# %% wrong: batch size forgotten -> weights-visible, weights-grpo, weights-others
def token_weights(mask, reduction, max_length):
    if reduction == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1)
    if reduction == "bnpo":
        return mask / mask.sum()
    return mask / max_length
# %% wrong: means over sequences instead of over tokens -> weights-grpo
def token_weights(mask, reduction, max_length):
    if reduction == "grpo":
        return mask / mask.sum(0, keepdim=True).clamp(min=1) / mask.shape[1]
    if reduction == "bnpo":
        return mask / mask.sum()
    return mask / (len(mask) * max_length)
