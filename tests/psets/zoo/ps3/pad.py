# %% right: fill from the end
def pad_prompts(prompts, pad_id):
    n = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), n), pad_id)
    mask = torch.zeros_like(ids)
    pos = torch.zeros_like(ids)
    for i, p in enumerate(prompts):
        ids[i, n - len(p):] = torch.tensor(p)
        mask[i, n - len(p):] = 1
        pos[i, n - len(p):] = torch.arange(len(p))
    return ids, mask, pos
# %% right: from lengths
def pad_prompts(prompts, pad_id):
    size = torch.tensor([len(p) for p in prompts])
    n = int(size.max())
    pos = torch.arange(n)[None] - (n - size)[:, None]
    ids = torch.tensor([[pad_id] * (n - len(p)) + list(p) for p in prompts])
    return ids, (pos >= 0).long(), pos.clamp(min=0)
# %% wrong: padded on the right -> pad-hidden
def pad_prompts(prompts, pad_id):
    n = max(map(len, prompts))
    ids = torch.tensor([p + [pad_id] * (n - len(p)) for p in prompts])
    mask = torch.tensor([[1] * len(p) + [0] * (n - len(p)) for p in prompts])
    return ids, mask, (mask.cumsum(1) - 1) * mask
# %% wrong: mask read off the pad id -> pad-hidden
def pad_prompts(prompts, pad_id):
    n = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (n - len(p)) + p for p in prompts])
    mask = (ids != pad_id).long()
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
# %% wrong: positions not corrected -> pad-hidden
def pad_prompts(prompts, pad_id):
    n = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (n - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (n - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask, torch.arange(n).expand(len(prompts), n)
# %% wrong: positions start at 1 -> pad-hidden
def pad_prompts(prompts, pad_id):
    n = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (n - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (n - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask, mask.cumsum(1)
# %% wrong: positions -1 on padding -> pad-hidden
def pad_prompts(prompts, pad_id):
    n = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (n - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (n - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask, mask.cumsum(1) - 1
# %% wrong: long prompts cut to the shortest -> pad-visible, pad-hidden
def pad_prompts(prompts, pad_id):
    n = min(map(len, prompts))
    ids = torch.tensor([p[-n:] for p in prompts])
    return ids, torch.ones_like(ids), torch.arange(n).expand(len(prompts), n)
