# %% right: columns of a tensor
def forgetting(accuracy, taught):
    table, out = torch.tensor(accuracy, dtype=torch.float64), []
    for j, s in enumerate(taught):
        column = table[s:-1, j]
        out.append(float(column.max() - table[-1, j]) if len(column) else None)
    return out
# %% right: the largest drop to the end
def forgetting(accuracy, taught):
    *before, end = accuracy
    drops = [[row[j] - end[j] for row in before[s:]] for j, s in enumerate(taught)]
    return [max(d, default=None) for d in drops]
# %% wrong: the best of all stages, before the task was taught too -> forgetting-hidden
def forgetting(accuracy, taught):
    n = len(accuracy) - 1
    return [None if s == n else max(r[j] for r in accuracy[:-1]) - accuracy[-1][j] for j, s in enumerate(taught)]
# %% wrong: just after its stage, not the best -> forgetting-hidden
def forgetting(accuracy, taught):
    n = len(accuracy) - 1
    return [None if s == n else accuracy[s][j] - accuracy[n][j] for j, s in enumerate(taught)]
# %% wrong: last stage among the best, never negative -> forgetting-hidden
def forgetting(accuracy, taught):
    n = len(accuracy) - 1
    return [None if s == n else max(r[j] for r in accuracy[s:]) - accuracy[-1][j] for j, s in enumerate(taught)]
# %% wrong: sign turned -> forgetting-visible, forgetting-hidden
def forgetting(accuracy, taught):
    n = len(accuracy) - 1
    return [None if s == n else accuracy[-1][j] - max(r[j] for r in accuracy[s:-1]) for j, s in enumerate(taught)]
# %% wrong: relative to the best -> forgetting-visible, forgetting-hidden
def forgetting(accuracy, taught):
    n, out = len(accuracy) - 1, []
    for j, s in enumerate(taught):
        best = max((r[j] for r in accuracy[s:-1]), default=None)
        out.append(None if s == n else (best - accuracy[-1][j]) / best)
    return out
# %% wrong: 0 for the last task -> forgetting-visible, forgetting-hidden
def forgetting(accuracy, taught):
    return [max([r[j] for r in accuracy[s:-1]], default=accuracy[-1][j]) - accuracy[-1][j] for j, s in enumerate(taught)]
# %% wrong: off by one stage -> forgetting-hidden
def forgetting(accuracy, taught):
    n = len(accuracy) - 1
    return [None if s == n else max(r[j] for r in accuracy[s - 1:n]) - accuracy[n][j] for j, s in enumerate(taught)]
