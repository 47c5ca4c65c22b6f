# %% right: sums by group
def advantages(rewards, group_ids):
    _, index = group_ids.unique(return_inverse=True)
    n = torch.zeros(index.max() + 1, dtype=rewards.dtype).index_add(0, index, torch.ones_like(rewards))
    mean = torch.zeros_like(n).index_add(0, index, rewards) / n
    centred = rewards - mean[index]
    var = torch.zeros_like(n).index_add(0, index, centred**2) / (n - 1).clamp(min=1)
    flat = var.sqrt()[index] < 1e-7
    return torch.where(flat, torch.zeros_like(centred), centred / (var.sqrt()[index] + 1e-4))
# %% right: plain Python
def advantages(rewards, group_ids):
    import statistics
    out = []
    for r, g in zip(rewards.tolist(), group_ids.tolist()):
        mates = [x for x, h in zip(rewards.tolist(), group_ids.tolist()) if h == g]
        if len(set(mates)) == 1:
            out.append(0.0)
        else:
            out.append((r - statistics.mean(mates)) / (statistics.stdev(mates) + 1e-4))
    return torch.tensor(out)
# %% wrong: ddof 0 -> advantages-hidden
def advantages(rewards, group_ids):
    out = torch.zeros_like(rewards)
    for g in group_ids.unique():
        m = group_ids == g
        r = rewards[m]
        out[m] = (r - r.mean()) / (r.std(correction=0) + 1e-4)
    return out
# %% wrong: one mean of the whole batch -> advantages-visible, advantages-hidden
def advantages(rewards, group_ids):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)
# %% wrong: one standard deviation of the whole batch -> advantages-hidden
def advantages(rewards, group_ids):
    out = torch.zeros_like(rewards)
    for g in group_ids.unique():
        m = group_ids == g
        out[m] = (rewards[m] - rewards[m].mean()) / (rewards.std() + 1e-4)
    return out
# %% wrong: divides by zero variance -> advantages-edges
def advantages(rewards, group_ids):
    out = torch.zeros_like(rewards)
    for g in group_ids.unique():
        m = group_ids == g
        out[m] = (rewards[m] - rewards[m].mean()) / rewards[m].std()
    return out
# %% wrong: variance instead of standard deviation -> advantages-hidden
def advantages(rewards, group_ids):
    out = torch.zeros_like(rewards)
    for g in group_ids.unique():
        m = group_ids == g
        r = rewards[m]
        if len(r) > 1:
            out[m] = (r - r.mean()) / (r.var() + 1e-4)
    return out
# %% wrong: a group of one is not a number -> advantages-edges
def advantages(rewards, group_ids):
    out = torch.zeros_like(rewards)
    for g in group_ids.unique():
        m = group_ids == g
        out[m] = (rewards[m] - rewards[m].mean()) / (rewards[m].std(correction=1) + 1e-4)
    return out
# %% wrong: groups taken to be next to each other and equally large -> advantages-hidden
def advantages(rewards, group_ids):
    size = len(rewards) // len(group_ids.unique())
    r = rewards[: size * len(group_ids.unique())].view(-1, size)
    a = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    return torch.cat([a.flatten(), torch.zeros(len(rewards) - a.numel())])
# %% wrong: not divided at all -> advantages-hidden
def advantages(rewards, group_ids):
    out = torch.zeros_like(rewards)
    for g in group_ids.unique():
        m = group_ids == g
        out[m] = rewards[m] - rewards[m].mean()
    return out
