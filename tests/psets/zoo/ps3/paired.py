# %% right: counts of gained and lost
def paired_difference(before, after):
    n = len(before)
    up = sum(b < a for b, a in zip(before, after))
    down = sum(b > a for b, a in zip(before, after))
    mean = (up - down) / n
    return mean, math.sqrt(max(0, up + down - n * mean**2) / (n - 1) / n)
# %% right: statistics module
def paired_difference(before, after):
    import statistics
    d = [float(a - b) for b, a in zip(before, after)]
    return statistics.mean(d), statistics.stdev(d) / len(d) ** 0.5
# %% wrong: ddof 0 -> paired-hidden
def paired_difference(before, after):
    d = np.array(after) - np.array(before)
    return d.mean(), d.std() / math.sqrt(len(d))
# %% wrong: unpaired standard error -> paired-hidden
def paired_difference(before, after):
    b, a = np.array(before), np.array(after)
    return a.mean() - b.mean(), math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))
# %% wrong: before minus after -> paired-visible, paired-hidden
def paired_difference(before, after):
    d = np.array(before) - np.array(after)
    return d.mean(), d.std(ddof=1) / math.sqrt(len(d))
# %% wrong: standard deviation instead of standard error -> paired-hidden
def paired_difference(before, after):
    d = np.array(after) - np.array(before)
    return d.mean(), d.std(ddof=1)
# %% wrong: divided by n instead of its root -> paired-hidden
def paired_difference(before, after):
    d = np.array(after) - np.array(before)
    return d.mean(), d.std(ddof=1) / len(d)
# %% wrong: only problems that changed -> paired-visible, paired-hidden
def paired_difference(before, after):
    d = np.array(after) - np.array(before)
    d = d[d != 0]
    return (d.mean(), d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else (float(d.sum()), 0.0)
