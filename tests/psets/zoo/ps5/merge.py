# %% right: by name, in a loop
def merge(previous, latest, decay):
    params, stiff = latest
    out = {}
    for n, f in stiff.items():
        out[n] = f.clone()
        if previous is not None:
            out[n] += decay * previous[1][n]
    return dict(params), out
# %% right: zero as the earlier Fisher
def merge(previous, latest, decay):
    old = previous[1] if previous else {n: torch.zeros_like(f) for n, f in latest[1].items()}
    return latest[0], {n: torch.add(f, old[n], alpha=decay) for n, f in latest[1].items()}
# %% wrong: the earlier parameters are kept -> merge-hidden
def merge(previous, latest, decay):
    if previous is None:
        return latest
    return previous[0], {n: decay * previous[1][n] + f for n, f in latest[1].items()}
# %% wrong: parameters averaged -> merge-hidden
def merge(previous, latest, decay):
    if previous is None:
        return latest
    mean = {n: (previous[0][n] + latest[0][n]) / 2 for n in latest[0]}
    return mean, {n: decay * previous[1][n] + f for n, f in latest[1].items()}
# %% wrong: decay on the latest Fisher -> merge-hidden
def merge(previous, latest, decay):
    if previous is None:
        return latest
    return latest[0], {n: previous[1][n] + decay * f for n, f in latest[1].items()}
# %% wrong: a moving average -> merge-visible, merge-hidden
def merge(previous, latest, decay):
    if previous is None:
        return latest
    return latest[0], {n: decay * previous[1][n] + (1 - decay) * f for n, f in latest[1].items()}
# %% wrong: mean of the Fishers -> merge-visible, merge-hidden
def merge(previous, latest, decay):
    if previous is None:
        return latest
    return latest[0], {n: (decay * previous[1][n] + f) / 2 for n, f in latest[1].items()}
# %% wrong: decay on both -> merge-hidden
def merge(previous, latest, decay):
    if previous is None:
        return latest
    return latest[0], {n: decay * (previous[1][n] + f) for n, f in latest[1].items()}
# %% wrong: only the latest Fisher -> merge-visible, merge-hidden
def merge(previous, latest, decay):
    return latest
# %% wrong: no first stage -> merge-visible, merge-hidden
def merge(previous, latest, decay):
    return latest[0], {n: decay * previous[1][n] + f for n, f in latest[1].items()}
