# %% right: try more and more micro-batches
def plan(budget, fixed, each, sequences):
    if fixed + each > budget:
        raise ValueError("nothing fits")
    for count in range(1, sequences + 1):
        sizes = [len(range(i, sequences, count)) for i in range(count)]
        if fixed + max(sizes) * each <= budget:
            return sizes
# %% right: hands out the sequences in turn
def plan(budget, fixed, each, sequences):
    most = math.floor((budget - fixed) / each)
    if most < 1:
        raise ValueError(f"one sequence needs {fixed + each} bytes of {budget}")
    sizes = [0] * math.ceil(sequences / most)
    for i in range(sequences):
        sizes[i % len(sizes)] += 1
    return sizes[::-1]
# %% wrong: greedy, the last one small -> plan-visible, plan-hidden
def plan(budget, fixed, each, sequences):
    most = (budget - fixed) // each
    if most < 1:
        raise ValueError
    return [min(most, sequences - i) for i in range(0, sequences, most)]
# %% wrong: the fixed part forgotten -> plan-hidden, plan-edges
def plan(budget, fixed, each, sequences):
    most = budget // each
    if most < 1:
        raise ValueError
    n = -(-sequences // most)
    return [sequences // n + (i < sequences % n) for i in range(n)]
# %% wrong: leftover sequences dropped -> plan-hidden
def plan(budget, fixed, each, sequences):
    most = (budget - fixed) // each
    if most < 1:
        raise ValueError
    n = -(-sequences // most)
    return [sequences // n] * n
# %% wrong: number of micro-batches rounded down -> plan-visible, plan-hidden
def plan(budget, fixed, each, sequences):
    most = (budget - fixed) // each
    if most < 1:
        raise ValueError
    n = max(1, sequences // most)
    return [sequences // n + (i < sequences % n) for i in range(n)]
# %% wrong: strictly below the budget -> plan-hidden
def plan(budget, fixed, each, sequences):
    most = (budget - fixed - 1) // each
    if most < 1:
        raise ValueError
    n = -(-sequences // most)
    return [sequences // n + (i < sequences % n) for i in range(n)]
# %% wrong: one at a time -> plan-visible, plan-hidden
def plan(budget, fixed, each, sequences):
    if fixed + each > budget:
        raise ValueError
    return [1] * sequences
# %% wrong: divisors of the number only -> plan-hidden
def plan(budget, fixed, each, sequences):
    most = (budget - fixed) // each
    if most < 1:
        raise ValueError
    m = next(m for m in range(min(most, sequences), 0, -1) if sequences % m == 0)
    return [m] * (sequences // m)
# %% wrong: at least one, fit or not -> plan-edges
def plan(budget, fixed, each, sequences):
    n = -(-sequences // max(1, (budget - fixed) // each))
    return [sequences // n + (i < sequences % n) for i in range(n)]
