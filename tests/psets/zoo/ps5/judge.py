# %% right: covariance of the ranks
def judge(estimate, truth):
    keep = torch.minimum(estimate, truth) > 0
    table = torch.stack([torch.tensor(rankdata(x[keep].numpy())) for x in (estimate, truth)])
    c = torch.cov(table)
    return float(c[0, 1] / (c[0, 0] * c[1, 1]).sqrt()), float(estimate.sum() / truth.sum())
# %% right: ranks by counting
def judge(estimate, truth):
    pairs = [(float(a), float(b)) for a, b in zip(estimate, truth) if a > 0 and b > 0]
    def rank(v):
        r = [sum(w < x for w in v) + (sum(w == x for w in v) + 1) / 2 for x in v]
        return [x - sum(r) / len(r) for x in r]
    x, y = rank([p[0] for p in pairs]), rank([p[1] for p in pairs])
    dot = lambda a, b: sum(i * j for i, j in zip(a, b))
    return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y)), float(estimate.mean()) / float(truth.mean())
# %% wrong: Pearson of the values -> judge-visible, judge-hidden
def judge(estimate, truth):
    k = (estimate > 0) & (truth > 0)
    return float(torch.corrcoef(torch.stack([estimate[k], truth[k]]))[0, 1]), float(estimate.mean() / truth.mean())
# %% wrong: ties ranked by their place -> judge-hidden
def judge(estimate, truth):
    k = (estimate > 0) & (truth > 0)
    r = [x[k].argsort(stable=True).argsort(stable=True).double() for x in (estimate, truth)]
    return float(torch.corrcoef(torch.stack(r))[0, 1]), float(estimate.mean() / truth.mean())
# %% wrong: one argsort, an order and no ranks -> judge-hidden
def judge(estimate, truth):
    k = (estimate > 0) & (truth > 0)
    r = [x[k].argsort().double() for x in (estimate, truth)]
    return float(torch.corrcoef(torch.stack(r))[0, 1]), float(estimate.mean() / truth.mean())
# %% wrong: zeros kept -> judge-hidden
def judge(estimate, truth):
    r = [torch.tensor(rankdata(x.numpy())) for x in (estimate, truth)]
    return float(torch.corrcoef(torch.stack(r))[0, 1]), float(estimate.mean() / truth.mean())
# %% wrong: scale inverted -> judge-visible, judge-hidden
def judge(estimate, truth):
    k = (estimate > 0) & (truth > 0)
    r = [torch.tensor(rankdata(x[k].numpy())) for x in (estimate, truth)]
    return float(torch.corrcoef(torch.stack(r))[0, 1]), float(truth.mean() / estimate.mean())
# %% wrong: mean of the ratios -> judge-hidden
def judge(estimate, truth):
    k = (estimate > 0) & (truth > 0)
    r = [torch.tensor(rankdata(x[k].numpy())) for x in (estimate, truth)]
    return float(torch.corrcoef(torch.stack(r))[0, 1]), float((estimate[k] / truth[k]).mean())
# %% wrong: cosine of ranks that are not centred -> judge-visible, judge-hidden
def judge(estimate, truth):
    k = (estimate > 0) & (truth > 0)
    x, y = (torch.tensor(rankdata(v[k].numpy())) for v in (estimate, truth))
    return float(x @ y / (x.norm() * y.norm())), float(estimate.mean() / truth.mean())
