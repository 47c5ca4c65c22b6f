"""Stated answers: what counts as one, what counts as the same, and what must not pay."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpugrpo_edu.tasks import spelling
from cpugrpo_edu.tasks.answers import (
    MAX_ANSWER_CHARS,
    MAX_NUMBER_CHARS,
    answers_match,
    extract_answer,
    normalize_answer,
    parse_number,
)
from cpugrpo_edu.tasks.statements import MAX_STATEMENTS, statements


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("2 + 3 = 5\n#### 5", "5"),
        ("#### 5", "5"),
        ("####5", "5"),
        ("  ####\t5  \n\n", "5"),
        ("So it is #### 5", "5"),
        ("#### b d a", "b d a"),
        ("#### 5\nand some chatter", "5"),  # only the answer's own line counts
        ("#### 5\n#### 5.0", "5.0"),  # the same answer twice is one answer
        ("####\n#### 5", "5"),  # a bare mark states nothing
        ("work\r\n#### 5\r\n", "5"),
        ("#### 5\u2028or 6", "5"),  # a Unicode line end is a line end
    ],
)
def test_extracts(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "   \n",
        "the answer is 5",
        "####",
        "#### \n",
        "##### 5",  # a heading of level five
        "### 5",
        "##\u200b## 5",  # a mark broken by a zero-width space is none
        "#### .",
        "#### 5\n#### 6",
        "#### 5 #### 6",
        "#### 6\n2 + 3 = 5\n#### 5",  # changing its mind in public
        "#### answer\n#### 5",  # an echoed prompt, "end with #### answer"
        "#### " + "5" * (MAX_ANSWER_CHARS + 1),
        "#### 5\n#### " + "x" * (MAX_ANSWER_CHARS + 1),
        "\n".join(f"#### {i}" for i in range(100)),
        "\n".join(f"#### 5.{'0' * i}" for i in range(1, 20)),  # equal, but too many to read
    ],
)
def test_refuses_what_is_no_single_answer(completion):
    assert extract_answer(completion) is None


def test_statements_keep_order_place_and_bare_marks():
    text = "a #### 1 #### 2\n####\n#### 3"
    found = statements(text)
    assert [s.text for s in found] == ["1", "2", "", "3"]
    assert [text[s.start : s.end] for s in found] == ["#### 1 ", "#### 2\n", "####\n", "#### 3"]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (" 18 ", "18"),
        ("+5", "5"),
        ("-0", "0"),
        ("007", "7"),
        ("5.0", "5"),
        ("5.", "5"),
        (".5", "1/2"),
        ("1/2", "1/2"),
        ("2/4", "1/2"),
        ("0.5", "1/2"),
        ("-1/2", "-1/2"),
        ("1,000", "1000"),
        ("12,345,678.5", "24691357/2"),
        ("$18", "18"),
        ("$18.", "18"),
        ("$18.00.", "18"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("€ 7", "7"),
        ("£7", "7"),
        ("7€", "7"),
        ("$7$", "7"),
        ("%5", "5"),
        ("18%", "18"),
        ("18 %", "18"),
        ("18 dollars", "18"),
        ("18 Dollars.", "18"),
        ("18km", "18"),
        ("60 km/h", "60"),
        ("20 °C", "20"),
        ("１８", "18"),  # full width
        ("٤٢", "42"),  # Arabic-Indic
        ("\u22125", "-5"),  # a true minus sign
        ("1\u200b8", "18"),  # a zero-width space
        ("\u202e18\u202c", "18"),  # a right-to-left override shows 81 but spells 18
        ("18\u00a0km", "18"),
        ("18kg", "18"),
        ("18 m²", "18"),
        ("3 apples/day", "3"),
        # scale words are part of the number
        ("18 thousand", "18000"),
        ("18 thousands", "18000"),
        ("$18 thousand", "18000"),
        ("18 thousand dollars", "18000"),
        ("18k", "18000"),
        ("18K", "18000"),
        ("1.5 million", "1500000"),
        ("5M", "5000000"),
        ("$5M", "5000000"),
        ("5m", "5"),  # metres
        ("5 bn", "5000000000"),
        ("5B", "5000000000"),
        ("2 trillion", "2000000000000"),
        ("3 hundred", "300"),
        ("5 dozen", "60"),
        ("5 dozens", "60"),
        ("5 dozen eggs", "60"),
        ("3 quarters", "3/4"),
        ("2 thirds", "2/3"),
        ("3 halves", "3/2"),
        # as language models write
        ("**42**", "42"),
        ("**42** apples", "42"),
        ("`42`", "42"),
        ("\\boxed{42}", "42"),
        ("$\\boxed{42}$", "42"),
        ("\\boxed{\\text{42}}", "42"),
        ("\\$42", "42"),
        ("42\\%", "42"),
        ("\\(42\\)", "42"),
        ("\\[42\\]", "42"),
        ("$$42$$", "42"),
        ("42\\text{ km}", "42"),
        ("1{,}000", "1000"),
        ("1\\,000", "1000"),
        ("\\frac{1}{2}", "1/2"),
        ("-\\dfrac{3}{4}", "-3/4"),
        ("1\\frac{1}{2}", "3/2"),
        ("90^\\circ", "90"),
        ("Answer: 42", "42"),
        ("**Answer:** 42", "42"),
        ("The answer is 42.", "42"),
        ("So the final answer is: 42", "42"),
        ("<answer>42</answer>", "42"),
        ("x = 42", "42"),
        ("$x=42$", "42"),
        ("Total cost = $42", "42"),
        ("12 + 30 = 42", "42"),
        ("12 apples + 30 apples = 42 apples", "42"),
        ("1 1/2", "3/2"),
        ("-1 1/2 cups", "-3/2"),
        ("1½", "3/2"),
        ("½", "1/2"),
        ("1 000", "1000"),
        ("1\u202f000\u202f000", "1000000"),
        ("negative 5", "-5"),
        ("minus $5", "-5"),
        ("[b, d, a]", "b d a"),
        ("( B;D , a )", "b d a"),
        ("'b', \"d\"", "b d"),
        ("Yes.", "yes"),
    ],
)
def test_normalizes(text, canonical):
    assert normalize_answer(text) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "-",
        "$",
        "1,00",
        "1,0000",
        "10000,000",
        "0,500",
        ",500",
        "1.2.3",
        "1e3",
        "1e999",
        "nan",
        "inf",
        "-inf",
        "1_000",
        "0x10",
        "+-5",
        "-$-5",
        "1/0",
        "1/-2",
        "18 or 19",
        "18 19",
        "18/19/20",
        "18-19",
        "about 18",
        "18 square metres",
        "1²",  # NFKC would make it 12
        "①",
        "1\u03368",  # struck through
        # symbols and words that are no units
        "3x",
        "3 y",
        "3ab",
        "5x²",
        "5x^2",
        "3 pi",
        "3π",
        "4 am",
        "4 pm",
        "4 p.m.",
        "500 BC",
        "5th",
        "5b",
        "5T",
        "5 squared",
        "5 twenty",
        "5!",
        "2**3",
        "5 or so",
        # numbers that could be two things
        "1 2/1",
        "1 100/2",
        "1.5 1/2",
        "1 00",
        "1000 000",
        "1,000 000",
        "41 = 42",
        "x = 41, x = 42",
        "3 or x = -3",
        "x = 3 or -3",
        "$5 and $6",
        "9" * (MAX_NUMBER_CHARS + 1),
        "1/" + "9" * MAX_NUMBER_CHARS,
        "0" * 10**6,
    ],
)
def test_these_are_no_single_number(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("stated", "reference"),
    [
        ("1,000", "1000"),
        ("1000", "1,000"),
        ("$18.", "18"),
        ("18 eggs", "18"),
        ("0.50", "1/2"),
        ("3", "3 apples"),
        ("0.1", "1/10"),  # a float would not do
        ("b, d, a", "b d a"),
        ("[B D A]", "b d a"),
        ("1, 2", "[1,2]"),
        ("100,200", "100 200"),  # the reference decides that this is a list
        ("YES", "yes"),
        ("[18]", "18"),
        ("18000", "18 thousands"),
        ("60", "5 dozens"),
        ("3X", "3x"),
        ("4 PM", "4 pm"),
        ("\\boxed{b, d, a}", "b d a"),
        ("42", "The answer is 42."),
        ("18 kilometres", "18 km"),
        ("$18", "18 dollars"),
        ("5 m^2", "5 m²"),
        ("y", "Y."),
    ],
)
def test_matches(stated, reference):
    assert answers_match(stated, reference)


@pytest.mark.parametrize(
    ("stated", "reference"),
    [
        (None, "18"),
        ("", "18"),
        ("", ""),
        (".", ""),
        ("18 or 19", "18"),
        ("18 19", "18"),
        ("19", "18"),
        ("118", "18"),
        ("18.0000000000000001", "18"),
        ("0.3333333333333333", "1/3"),
        ("-18", "18"),
        ("1,00", "100"),
        ("bda", "b d a"),
        ("b a d", "b d a"),
        ("b d a c", "b d a"),
        ("b d a" + " " * 200, "b d a"),
        ("x" * 101, "x" * 101),
        ("12", "1 2"),
        # scale words
        ("18 thousands", "18"),
        ("18", "18 thousands"),
        ("5 dozens", "5"),
        ("3 quarters", "3"),
        ("5M", "5"),
        ("5M", "5m"),
        ("5 bn", "5"),
        # symbols
        ("3x", "3y"),
        ("3x", "3"),
        ("3", "3x"),
        ("4 am", "4 pm"),
        ("4 am", "4"),
        ("5x²", "5"),
        ("5x²", "5x"),
        ("x = 3", "y = 3"),
        # units that differ
        ("60 min", "60 h"),
        ("18 km", "18 m"),
        ("5 m", "5 m²"),
        ("$18", "18 euros"),
        ("60 km/h", "60 m/s"),
        ("100,200,300", "100 200"),
    ],
)
def test_does_not_match(stated, reference):
    assert not answers_match(stated, reference)


SHORT_FRACTIONS = st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6)


@given(SHORT_FRACTIONS)
def test_every_fraction_is_read_back_exactly(value):
    assert parse_number(str(value)) == value


SPELLINGS = ["{:,}", "${:,}.", "{} km", "{}.00", "{}%", "**{}**", r"\boxed{{{}}}", "x = {}"]
SPELLINGS += ["Answer: {}", "The answer is {}.", r"\({}\)", "{} eggs", "`{}`", "${:,}$"]


@given(st.integers(-(10**15), 10**15), st.sampled_from(SPELLINGS))
def test_spellings_of_an_integer_match(value, spelling):
    assert answers_match(spelling.format(value), str(value))


@given(SHORT_FRACTIONS, SHORT_FRACTIONS)
def test_numbers_match_only_if_equal(a, b):
    assert answers_match(str(a), str(b)) == (a == b)
    completion = f"#### {a}\n#### {b}"
    assert (extract_answer(completion) is not None) == (a == b)


LISTS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30)  # at most 100 characters


@given(LISTS, LISTS)
def test_lists_match_only_if_equal(a, b):
    assert answers_match(f"[{', '.join(a)}]", " ".join(b)) == (a == b)


@given(st.text())
def test_any_text_is_handled(text):
    stated = extract_answer(text)
    assert stated is None or answers_match(stated, stated)
    number = parse_number(text)
    assert number is None or isinstance(number, Fraction)
    assert isinstance(normalize_answer(text), str)


@given(st.lists(st.sampled_from(["#### ", "18", "19", "17", " or ", "\n", "\u200b", "#", "½"])))
def test_nothing_appended_mends_a_wrong_answer(pieces):
    assert not answers_match(extract_answer("#### 17\n" + "".join(pieces)), "18")


@pytest.mark.parametrize("text", ["5" * 10**6, "#" * 10**6, "#### 5\n" * 10**5, "$" * 10**6])
def test_work_is_bounded_for_a_million_characters(text, monkeypatch):
    """At most `MAX_STATEMENTS` answers, none longer than the limit, reach the parser."""
    seen = []
    real = spelling._fold_character
    monkeypatch.setattr(spelling, "_fold_character", lambda c: seen.append(c) or real(c))
    extract_answer(text)
    normalize_answer(text)
    assert len(seen) <= 2 * MAX_STATEMENTS * MAX_ANSWER_CHARS


SCALED = {"thousand": 10**3, "million": 10**6, "dozens": 12, "k": 10**3, "bn": 10**9}


@given(st.integers(1, 999), st.sampled_from(list(SCALED)), st.sampled_from(["", " eggs", " km"]))
def test_a_scale_word_multiplies(value, word, unit):
    stated = f"{value} {word}{unit}"
    assert parse_number(stated) == value * SCALED[word]
    assert not answers_match(stated, str(value))


@given(st.integers(0, 10**9), st.sampled_from("abcefijnopqruvwxyz"))
def test_a_symbol_is_no_unit(value, letter):
    other = "x" if letter != "x" else "y"
    assert answers_match(f"{value}{letter}", f"{value}{letter}")
    assert not answers_match(f"{value}{letter}", f"{value}{other}")
    assert not answers_match(f"{value}{letter}", str(value))


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_a_mixed_number_is_the_sum_of_its_parts(whole, top, bottom):
    expected = whole + Fraction(top, bottom) if top < bottom else None
    assert parse_number(f"{whole} {top}/{bottom}") == expected


@given(st.integers(1, 10**12))
def test_spaces_separate_thousands_as_commas_do(value):
    assert parse_number(f"{value:,}".replace(",", " ")) == value


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("Tom has 3 x 4 = 12 pens. So he has 17 pens.", "17"),
        ("So, Max has 22 more toy cars.", "22"),
        ("She has 4 boxes. She pays **$12.50**!", "$12.50"),
        ("He has 3 boxes. Then he finds", None),  # cut off
        ("So he has 12 pens", None),
        ("3 and 4 make 7 pens.", None),  # which one is it?
        ("It is 12 or so.", None),
    ],
)
def test_the_only_number_of_the_last_sentence(completion, answer):
    assert extract_answer(completion, "auto") == answer
    assert extract_answer(completion) is None
