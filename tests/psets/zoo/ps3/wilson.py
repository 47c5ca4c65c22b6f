# %% right: roots of the quadratic
def wilson(k, n, z=1.959964):
    a, b, c = 1 + z * z / n, -2 * k / n - z * z / n, (k / n) ** 2
    low, high = sorted(np.roots([a, b, c]).real)
    return max(0.0, low), min(1.0, high)
# %% right: in counts
def wilson(k, n, z=1.959964):
    root = z * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, (k + z * z / 2 - root) / (n + z * z)), min(1.0, (k + z * z / 2 + root) / (n + z * z))
# %% wrong: the Wald interval -> wilson-hidden
def wilson(k, n, z=1.959964):
    half = z * math.sqrt(k / n * (1 - k / n) / n)
    return max(0.0, k / n - half), min(1.0, k / n + half)
# %% wrong: Agresti-Coull -> wilson-hidden
def wilson(k, n, z=1.959964):
    m = n + z * z
    p = (k + z * z / 2) / m
    half = z * math.sqrt(p * (1 - p) / m)
    return max(0.0, p - half), min(1.0, p + half)
# %% wrong: 90 % z -> wilson-hidden
def wilson(k, n, z=1.959964):
    z, p = 1.644854, k / n
    c, h = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (c - h) / (1 + z * z / n)), min(1.0, (c + h) / (1 + z * z / n))
# %% wrong: root forgotten -> wilson-hidden
def wilson(k, n, z=1.959964):
    p = k / n
    c, h = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (c - h) / (1 + z * z / n)), min(1.0, (c + h) / (1 + z * z / n))
# %% wrong: centred on k/n -> wilson-hidden
def wilson(k, n, z=1.959964):
    p = k / n
    h = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, p - h), min(1.0, p + h)
# %% wrong: not divided by 1 + z^2/n -> wilson-hidden
def wilson(k, n, z=1.959964):
    p = k / n
    c, h = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, c - h), min(1.0, c + h)
