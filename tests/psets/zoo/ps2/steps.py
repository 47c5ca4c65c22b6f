# %% right: with partition
def step_reward(completion):
    steps = [s.strip() for s in completion.split(";")]
    steps = [s for s in steps if s and not s.startswith("A:")]
    if not steps:
        return 0.0
    total = 0
    for i, s in enumerate(steps):
        m = re.fullmatch(r"(-?[0-9]+)([-+*])(-?[0-9]+)=(-?[0-9]+)", s)
        if m is None or s in steps[:i]:
            continue
        a, b, c = int(m[1]), int(m[3]), int(m[4])
        total += c == (a + b if m[2] == "+" else a - b if m[2] == "-" else a * b)
    return total / len(steps)
# %% right: unique steps first
def step_reward(completion):
    steps = [s.strip() for s in completion.split(";") if s.strip() and not s.strip().startswith("A:")]
    def good(s):
        if not re.fullmatch(r"-?\d+[+*-]-?\d+=-?\d+", s):
            return False
        left, right = s.split("=")
        return eval(left) == int(right)
    return sum(good(s) for s in set(steps)) / max(1, len(steps))
# %% wrong: repeated steps are paid -> steps-attacks
def step_reward(completion):
    steps = [s.strip() for s in completion.split(";") if s.strip() and not s.strip().startswith("A:")]
    good = lambda s: bool(re.fullmatch(r"-?\d+[+*-]-?\d+=-?\d+", s)) and eval(s.replace("=", "=="))
    return sum(map(good, steps)) / max(1, len(steps))
# %% wrong: no steps divide by zero -> steps-attacks
def step_reward(completion):
    steps = [s.strip() for s in completion.split(";") if s.strip() and not s.strip().startswith("A:")]
    good = lambda s: bool(re.fullmatch(r"-?\d+[+*-]-?\d+=-?\d+", s)) and eval(s.replace("=", "=="))
    return sum(map(good, set(steps))) / len(steps)
# %% wrong: unreadable steps are left out of the count -> steps-hidden
def step_reward(completion):
    steps = [s for s in completion.split(";") if re.fullmatch(r"-?\d+[+*-]-?\d+=-?\d+", s)]
    return sum(eval(s.replace("=", "==")) for s in set(steps)) / max(1, len(steps))
# %% wrong: negative numbers cannot be read -> steps-hidden
def step_reward(completion):
    steps = [s.strip() for s in completion.split(";") if s.strip() and not s.strip().startswith("A:")]
    good = lambda s: bool(re.fullmatch(r"\d+[+*-]\d+=\d+", s)) and eval(s.replace("=", "=="))
    return sum(map(good, set(steps))) / max(1, len(steps))
# %% wrong: a sum without limit -> steps-visible, steps-hidden
def step_reward(completion):
    steps = {s.strip() for s in completion.split(";")}
    good = lambda s: bool(re.fullmatch(r"-?\d+[+*-]-?\d+=-?\d+", s)) and eval(s.replace("=", "=="))
    return float(sum(map(good, steps)))
# %% wrong: pays for the form, not for the value -> steps-visible, steps-hidden
def step_reward(completion):
    steps = [s.strip() for s in completion.split(";") if s.strip() and not s.strip().startswith("A:")]
    return sum(bool(re.fullmatch(r"-?\d+[+*-]-?\d+=-?\d+", s)) for s in set(steps)) / max(1, len(steps))
# %% wrong: evaluates anything with an equals sign -> steps-attacks
def step_reward(completion):
    steps = [s.strip() for s in completion.split(";") if s.strip() and not s.strip().startswith("A:")]
    def good(s):
        try:
            return bool(eval(s.replace("=", "==")))
        except Exception:
            return False
    return sum(map(good, set(steps))) / max(1, len(steps))
# %% wrong: the answer counts as a step -> steps-visible, steps-hidden
def step_reward(completion):
    steps = [s.strip() for s in completion.split(";") if s.strip()]
    good = lambda s: bool(re.fullmatch(r"-?\d+[+*-]-?\d+=-?\d+", s)) and eval(s.replace("=", "=="))
    return sum(map(good, set(steps))) / max(1, len(steps))
