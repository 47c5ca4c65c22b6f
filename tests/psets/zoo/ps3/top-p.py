# %% right: a loop
def sampling_probabilities(logits, temperature, top_p):
    p = (logits / temperature).softmax(0)
    out, total = torch.zeros_like(p), 0.0
    for i in p.argsort(descending=True).tolist():
        if total >= top_p:
            break
        out[i] = p[i]
        total += float(p[i])
    return out / out.sum()
# %% right: masked logits
def sampling_probabilities(logits, temperature, top_p):
    x = logits / temperature
    s, order = x.sort(descending=True)
    p = s.softmax(0)
    drop = torch.zeros_like(p, dtype=torch.bool)
    drop[1:] = p.cumsum(0)[:-1] >= top_p
    return x.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), float("-inf")).softmax(0)
# %% wrong: the token that crosses top_p is dropped -> top-p-hidden
def sampling_probabilities(logits, temperature, top_p):
    p = (logits / temperature).softmax(0)
    s, order = p.sort(descending=True)
    keep = s.cumsum(0) <= top_p
    keep[0] = True
    out = torch.zeros_like(p)
    out[order] = s * keep
    return out / out.sum()
# %% wrong: multiplied by the temperature -> top-p-hidden
def sampling_probabilities(logits, temperature, top_p):
    p = (logits * temperature).softmax(0)
    s, order = p.sort(descending=True)
    out = torch.zeros_like(p)
    out[order] = s * (s.cumsum(0) - s < top_p)
    return out / out.sum()
# %% wrong: not renormalised -> top-p-visible, top-p-hidden
def sampling_probabilities(logits, temperature, top_p):
    p = (logits / temperature).softmax(0)
    s, order = p.sort(descending=True)
    out = torch.zeros_like(p)
    out[order] = s * (s.cumsum(0) - s < top_p)
    return out
# %% wrong: result left in sorted order -> top-p-hidden
def sampling_probabilities(logits, temperature, top_p):
    s = (logits / temperature).softmax(0).sort(descending=True).values
    out = s * (s.cumsum(0) - s < top_p)
    return out / out.sum()
# %% wrong: nucleus chosen before the temperature -> top-p-hidden
def sampling_probabilities(logits, temperature, top_p):
    s, order = logits.softmax(0).sort(descending=True)
    keep = torch.zeros_like(s)
    keep[order] = (s.cumsum(0) - s < top_p).to(s.dtype)
    out = (logits / temperature).softmax(0) * keep
    return out / out.sum()
# %% wrong: min-p instead of top-p -> top-p-hidden
def sampling_probabilities(logits, temperature, top_p):
    p = (logits / temperature).softmax(0)
    p = p * (p >= (1 - top_p) * p.max())
    return p / p.sum()
