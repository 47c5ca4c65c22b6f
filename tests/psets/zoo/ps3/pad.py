# %% right: row by row
def retire(ids, mask, finished):
    texts = [row[m == 1] for row, m, f in zip(ids, mask, finished) if not f]
    n = max(len(t) for t in texts)
    pad = ids[mask == 0][0] if (mask == 0).any() else 0
    out = torch.full((len(texts), n), int(pad))
    real = torch.zeros_like(out)
    pos = torch.zeros_like(out)
    for i, t in enumerate(texts):
        out[i, n - len(t):] = t
        real[i, n - len(t):] = 1
        pos[i, n - len(t):] = torch.arange(len(t))
    return out, real, pos
# %% right: the longest row's width, from the end
def retire(ids, mask, finished):
    going = (finished == 0).nonzero()[:, 0]
    n = int(mask[going].sum(1).max())
    ids, mask = ids[going, -n:], mask[going, -n:]
    pos = torch.arange(n)[None] - (n - mask.sum(1))[:, None]
    return ids, mask, pos.clamp(min=0)
# %% wrong: the columns stay -> pad-visible, pad-hidden
def retire(ids, mask, finished):
    ids, mask = ids[~finished], mask[~finished]
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
# %% wrong: columns cut before the rows are gone -> pad-visible, pad-hidden
def retire(ids, mask, finished):
    used = mask.any(0)
    ids, mask = ids[~finished][:, used], mask[~finished][:, used]
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
# %% wrong: keeps the finished rows -> pad-visible, pad-hidden
def retire(ids, mask, finished):
    ids, mask = ids[finished], mask[finished]
    used = mask.any(0)
    ids, mask = ids[:, used], mask[:, used]
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
# %% wrong: cut to the columns that are real in all rows -> pad-visible, pad-hidden
def retire(ids, mask, finished):
    ids, mask = ids[~finished], mask[~finished]
    used = mask.bool().all(0)
    ids, mask = ids[:, used], mask[:, used]
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
# %% wrong: columns cut on the right -> pad-visible, pad-hidden
def retire(ids, mask, finished):
    ids, mask = ids[~finished], mask[~finished]
    n = int(mask.sum(1).max())
    ids, mask = ids[:, :n], mask[:, :n]
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
# %% wrong: positions not corrected -> pad-hidden
def retire(ids, mask, finished):
    ids, mask = ids[~finished], mask[~finished]
    used = mask.any(0)
    ids, mask = ids[:, used], mask[:, used]
    return ids, mask, torch.arange(ids.shape[1]).expand(len(ids), -1)
# %% wrong: positions of the old batch -> pad-hidden
def retire(ids, mask, finished):
    pos = torch.arange(ids.shape[1]).expand(len(ids), -1)[~finished]
    ids, mask = ids[~finished], mask[~finished]
    used = mask.any(0)
    return ids[:, used], mask[:, used], pos[:, used] * mask[:, used]
# %% wrong: positions -1 on padding -> pad-hidden
def retire(ids, mask, finished):
    ids, mask = ids[~finished], mask[~finished]
    used = mask.any(0)
    ids, mask = ids[:, used], mask[:, used]
    return ids, mask, mask.cumsum(1) - 1
