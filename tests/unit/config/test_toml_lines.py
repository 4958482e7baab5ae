"""Lines of keys in TOML documents."""

import tomllib

import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from titan_fp8.config.toml_lines import key_lines

TRICKY = '''\
# comment with = and [brackets]
top = 1
[a.b]   # a table
c = """
d = "not a key"
"""
e = ["x # no comment", 'y', # a comment
  { f = 1, "g.h" = [ ] },
]
"quoted \\u0041" = '\\'
i.j . k = 2020-01-01T00:00:00
l = """quotes at the end"""""
m = 'it"s'
[[n]]
o = {p.q = true, r = "}"}
[a]
s = -1.5e3
'''


def test_every_form_of_a_key_has_its_line():
    assert tomllib.loads(TRICKY)
    expected = {
        ("top",): 2,
        ("a", "b"): 3,
        ("a", "b", "c"): 4,
        ("a", "b", "e"): 7,
        ("a", "b", "e", "f"): 8,
        ("a", "b", "e", "g.h"): 8,
        ("a", "b", "quoted A"): 10,
        ("a", "b", "i", "j", "k"): 11,
        ("a", "b", "l"): 12,
        ("a", "b", "m"): 13,
        ("n",): 14,
        ("n", "o"): 15,
        ("n", "o", "p", "q"): 15,
        ("n", "o", "r"): 15,
        ("a", "s"): 17,
    }
    lines = key_lines(TRICKY)
    assert {path: lines[path] for path in expected} == expected
    assert ("a", "b", "d") not in lines


def test_windows_line_ends_do_not_shift_lines():
    assert key_lines("[a]\r\nb = 1\r\n\r\nc = 2\r\n") == {("a",): 1, ("a", "b"): 2, ("a", "c"): 4}


names = st.text(st.characters(codec="utf-8", exclude_characters="\x7f", exclude_categories=["Cs"]), max_size=5)
values = st.recursive(
    st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False) | names,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
tables = st.recursive(
    st.dictionaries(names, values, max_size=4), lambda inner: st.dictionaries(names, inner | values, max_size=4)
)


@given(tables)
def test_each_key_of_any_document_is_found_on_the_line_that_holds_it(table):
    text = tomli_w.dumps(table, multiline_strings=True)
    lines = key_lines(text)
    written = text.split("\n")

    def check(inner, prefix):
        for name, value in inner.items():
            line = written[lines[(*prefix, name)] - 1]
            assert line.lstrip().startswith("[") or "=" in line
            if isinstance(value, dict):
                check(value, (*prefix, name))
            else:
                key = line.partition("=")[0] if name.isalnum() else line
                assert not name.isalnum() or not name.isascii() or key.strip() == name

    check(table, ())
