"""Stated answers: what counts as one, what counts as the same, and what must not pay."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpugrpo_edu.tasks import answers
from cpugrpo_edu.tasks.answers import (
    MAX_ANSWER_CHARS,
    MAX_NUMBER_CHARS,
    answers_match,
    extract_answer,
    normalize_answer,
    parse_number,
    stated_answers,
)


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


def test_stated_answers_keeps_order_and_bare_marks():
    assert stated_answers("a #### 1 #### 2\n####\n#### 3") == ["1", "2", "", "3"]


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
        "1 1/2",
        "18 or 19",
        "18 19",
        "18/19/20",
        "18-19",
        "about 18",
        "x = 18",
        "18 thousand",
        "18k",
        "1.5 million",
        "18 square metres",
        "1²",  # NFKC would make it 12
        "1½",  # NFKC would make it 11/2
        "½",
        "①",
        "1\u03368",  # struck through
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
    ],
)
def test_does_not_match(stated, reference):
    assert not answers_match(stated, reference)


SHORT_FRACTIONS = st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6)


@given(SHORT_FRACTIONS)
def test_every_fraction_is_read_back_exactly(value):
    assert parse_number(str(value)) == value


@given(st.integers(-(10**15), 10**15), st.sampled_from(["{:,}", "${:,}.", "{} km", "{}.00", "{}%"]))
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
    real = answers._fold_character
    monkeypatch.setattr(answers, "_fold_character", lambda c: seen.append(c) or real(c))
    extract_answer(text)
    normalize_answer(text)
    assert len(seen) <= 2 * answers.MAX_STATEMENTS * MAX_ANSWER_CHARS
