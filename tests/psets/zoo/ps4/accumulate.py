# %% right: real tokens picked out
def accumulate(model, micro_batches):
    for p in model.parameters():
        p.grad = None
    n = sum(int(m.bool().sum()) for *_, m in micro_batches)
    for x, y, m in micro_batches:
        k = m.bool()
        (F.cross_entropy(model(x)[k], y[k], reduction="sum") / n).backward()
# %% right: gradients of sums, divided at the end
def accumulate(model, micro_batches):
    model.zero_grad(set_to_none=True)
    for x, y, m in micro_batches:
        log_p = model(x).log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)
        (-(log_p * m).sum()).backward()
    for p in model.parameters():
        p.grad /= sum(m.sum() for _, _, m in micro_batches)
# %% wrong: mean of the micro-batches' means -> accumulate-hidden
def accumulate(model, micro_batches):
    model.zero_grad()
    for x, y, m in micro_batches:
        e = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
        ((e * m.flatten()).sum() / m.sum().clamp(min=1) / len(micro_batches)).backward()
# %% wrong: mean of the micro-batches' means, an empty one divides by 0 -> accumulate-hidden
def accumulate(model, micro_batches):
    model.zero_grad()
    for x, y, m in micro_batches:
        e = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
        ((e * m.flatten()).sum() / m.sum() / len(micro_batches)).backward()
# %% wrong: means added up -> accumulate-visible, accumulate-hidden
def accumulate(model, micro_batches):
    model.zero_grad()
    for x, y, m in micro_batches:
        e = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
        ((e * m.flatten()).sum() / m.sum().clamp(min=1)).backward()
# %% wrong: padding counted -> accumulate-hidden
def accumulate(model, micro_batches):
    model.zero_grad()
    n = sum(m.numel() for _, _, m in micro_batches)
    for x, y, m in micro_batches:
        e = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
        ((e * m.flatten()).sum() / n).backward()
# %% wrong: mask forgotten -> accumulate-hidden
def accumulate(model, micro_batches):
    model.zero_grad()
    n = sum(y.numel() for _, y, _ in micro_batches)
    for x, y, m in micro_batches:
        (F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / n).backward()
# %% wrong: old gradients kept -> accumulate-visible
def accumulate(model, micro_batches):
    n = sum(m.sum() for _, _, m in micro_batches)
    for x, y, m in micro_batches:
        e = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
        ((e * m.flatten()).sum() / n).backward()
# %% wrong: zero_grad within the loop -> accumulate-visible, accumulate-hidden
def accumulate(model, micro_batches):
    n = sum(m.sum() for _, _, m in micro_batches)
    for x, y, m in micro_batches:
        model.zero_grad()
        e = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
        ((e * m.flatten()).sum() / n).backward()
# %% wrong: one big batch -> accumulate-memory
def accumulate(model, micro_batches):
    x, y, m = (torch.cat(z) for z in zip(*micro_batches))
    model.zero_grad()
    F.cross_entropy(model(x)[m.bool()], y[m.bool()]).backward()
# %% wrong: losses added up, one backward at the end -> accumulate-memory
def accumulate(model, micro_batches):
    model.zero_grad()
    n = sum(m.sum() for _, _, m in micro_batches)
    loss = 0
    for x, y, m in micro_batches:
        e = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
        loss = loss + (e * m.flatten()).sum() / n
    loss.backward()
# %% wrong: real tokens of all in one pass -> accumulate-memory
def accumulate(model, micro_batches):
    model.zero_grad()
    x, y = (torch.cat([b[i][b[2].bool()] for b in micro_batches]) for i in (0, 1))
    F.cross_entropy(model(x), y).backward()
