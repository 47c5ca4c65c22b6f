# %% right: by character
def parse_answer(completion):
    head, mark, tail = completion.partition("A:")
    tail = tail.strip()
    if not mark or "A:" in tail or not re.match(r"^[-+]?[0-9]+([./][0-9]+)?$", tail):
        return None
    if "/" in tail:
        top, bottom = tail.split("/")
        return Fraction(int(top), int(bottom)) if int(bottom) else None
    return Fraction(tail)
# %% right: one pattern over the whole
def parse_answer(completion):
    found = re.fullmatch(r"((?!A:)[\s\S])*A:\s*([-+]?\d+(?:\.\d+|/\d*[1-9]\d*)?)\s*", completion)
    return Fraction(found.group(2)) if found else None
# %% wrong: takes the first number and ignores what follows -> parse-attacks
def parse_answer(completion):
    found = re.search(r"A:\s*(-?\d+(?:[./]\d+)?)", completion)
    try:
        return Fraction(found.group(1)) if found else None
    except ZeroDivisionError:
        return None
# %% wrong: takes the last of several answers -> parse-attacks
def parse_answer(completion):
    tail = completion.split("A:")[-1].strip() if "A:" in completion else ""
    try:
        return Fraction(tail) if re.fullmatch(r"[+-]?\d+([./]\d+)?", tail) else None
    except ZeroDivisionError:
        return None
# %% wrong: denominator 0 raises -> parse-attacks
def parse_answer(completion):
    if completion.count("A:") != 1:
        return None
    tail = completion.split("A:")[1].strip()
    return Fraction(tail) if re.fullmatch(r"[+-]?\d+([./]\d+)?", tail) else None
# %% wrong: integers only -> parse-hidden
def parse_answer(completion):
    found = re.fullmatch(r"((?!A:)[\s\S])*A:\s*(-?\d+)\s*", completion)
    return Fraction(found.group(2)) if found else None
# %% wrong: sign forgotten -> parse-hidden
def parse_answer(completion):
    found = re.fullmatch(r"((?!A:)[\s\S])*A:\s*(\d+(?:\.\d+|/\d*[1-9]\d*)?)\s*", completion)
    return Fraction(found.group(2)) if found else None
# %% wrong: eval of what the policy wrote -> parse-attacks
def parse_answer(completion):
    if completion.count("A:") != 1:
        return None
    try:
        return Fraction(eval(completion.split("A:")[1])).limit_denominator(1000)
    except Exception:
        return None
# %% wrong: any number of the text will do -> parse-visible, parse-attacks
def parse_answer(completion):
    found = re.findall(r"-?\d+(?:[./]\d+)?", completion)
    try:
        return Fraction(found[-1]) if found else None
    except ZeroDivisionError:
        return None
