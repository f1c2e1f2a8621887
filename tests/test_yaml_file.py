"""Plain YAML: what is read, and that any other text is refused in one line with its place, soon, in little memory."""

import tracemalloc
from time import perf_counter

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_distill.errors import MissingError
from lora_distill.settings import Settings, SettingsError, load_settings
from lora_distill.yaml_file import MAX_BYTES, YamlError, parse_yaml, read_yaml

PLAIN = """# a comment
a: 1
b: [1.5, -2, .5, 1.0e-4]
c:
  d: "x: y"
  e:
f: true
g: 1e-4
h: 'on'
i: [[1], {k: v}]
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_a_plain_text_is_what_pyyaml_reads_and_every_key_and_item_has_its_line():
    value, lines = parse_yaml(PLAIN, "x")
    assert value == yaml.safe_load(PLAIN)
    assert {
        ("a",): 2,
        ("b",): 3,
        ("b", 1): 3,
        ("c",): 4,
        ("c", "d"): 5,
        ("c", "e"): 6,
        ("g",): 8,
    }.items() <= lines.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: a is written twice, first in line 1; leave one of them"),
        ("a: {b: 1, b: 2}", "line 1: b is written twice, first in line 1"),
        ("a: 1\n'a': 1", "line 2: a is written twice"),
        ("a: 1\nb: 010", "line 2: 010: YAML reads it as 8; write that, or text in quotes"),
        ("a: 1:30", "line 1: 1:30: YAML reads it as 90; write that"),
        ("a: 1:30.5", "line 1: 1:30.5: YAML reads it as 90.5; write that"),
        ("a: 1_000", "line 1: 1_000: YAML reads it as 1000; write that"),
        ("a: 0x1F", "line 1: 0x1F: YAML reads it as 31; write that"),
        ("a: 0b11", "line 1: 0b11: YAML reads it as 3; write that"),
        ("a: 0b_", "line 1: 0b_: YAML reads it as a number; write that"),
        ("a: 1_0.5", "line 1: 1_0.5: YAML reads it as 10.5; write that"),
        ("a: [1, 2, 007]", "line 1: 007: YAML reads it as 7; write that"),
        ("a: 2024-01-31", "line 1: 2024-01-31: YAML reads it as a date; write it in quotes"),
        ("a: 2024-13-45", "line 1: 2024-13-45: YAML reads it as a date; write it in quotes"),
        ("a: " + "9" * 5000, "line 1: 9{57}...: a number of 5000 characters"),
        (BOMB, "line 1: &a: anchors are not read; write the value where it is needed"),
        ("a: *b", r"line 1: \*b: aliases are not read; write the value itself"),
        ("a: 1\n<<: {b: 1}", "line 2: <<: merged keys are not read; write them out"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: !!python/object.*: tags are not read"),
        ("a: !!int 3", "line 1: !!int: tags are not read; write the value alone"),
        ("a: !mine 3", "line 1: !mine: tags are not read"),
        ("[" * 30000, "line 1: nested more than 4 levels deep"),
        ("{a: " * 15000, "line 1: nested more than 4 levels deep"),
        ("- " * 30000, "line 1: nested more than 4 levels deep"),
        ("? " * 30000, "line 1: nested more than 4 levels deep"),
        ("a: 1\n---\nb: 2", "line 2: a second document begins"),
        ("a: 1\n\tb: 2", "line 2: not YAML: .*indent with spaces, not tabs"),
        ("a:\n\t- 2", "line 2: not YAML: .*indent with spaces, not tabs"),
        ("a: [", "line 1: not YAML: while parsing a flow node"),
        ("a: 1\nb: c: d", "line 2: not YAML: mapping values are not allowed here"),
        ("a: 1\nb: \x00", r"line 2: not YAML: character U\+0000"),
        ("a: 1\n\nb: \x1b[0m", r"line 3: not YAML: character U\+001B"),
        ('a: "\\U00110000"', "not YAML"),
        ("[a]: 1", "line 1: a key must be a word, not a list or a mapping"),
        ("a: 'x", "line 1: not YAML: while scanning a quoted scalar"),
        ("%YAML 3.0\n---\na: 1", "line 1: not YAML: found incompatible YAML document"),
    ],
)
def test_what_surprises_is_refused_with_its_line(text, message):
    with pytest.raises(YamlError, match=f"^x.yaml(, |: ){message}") as error:
        parse_yaml(text, "x.yaml")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_bomb_of_aliases_takes_no_time_and_no_memory():
    tracemalloc.start()
    started = perf_counter()
    with pytest.raises(YamlError):
        parse_yaml(BOMB, "x")
    assert perf_counter() - started < 1 and tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: caf\xe9", "expected a file of UTF-8 text"),
        ("a: 1".encode("utf-16"), "expected a file of UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n\x00", "expected a file of UTF-8 text"),
        (b"#" * (MAX_BYTES + 1), "expected at most 64 kB, this is something else"),
        (b"a: 1\x00", r"not YAML: character U\+0000"),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(YamlError if "kB" in message or "U" in message[-6:] else ValueError, match=message) as error:
        read_yaml(tmp_path / "x.yaml")
    assert str(tmp_path / "x.yaml") in str(error.value) and "\n" not in str(error.value)


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "x.yaml").open("wb") as file:
        file.truncate(10**12)  # sparse
    with pytest.raises(YamlError, match="at most 64 kB"):
        read_yaml(tmp_path / "x.yaml")


def test_a_mark_of_utf8_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "x.yaml").write_bytes("\ufeffa: 1\r\nb: Zoë\r\n".encode())
    assert read_yaml(tmp_path / "x.yaml") == ({"a": 1, "b": "Zoë"}, {("a",): 1, ("b",): 2})


@pytest.mark.parametrize("text", ["", "# nothing", "---", "~"])
def test_an_empty_file_is_nothing(text):
    assert parse_yaml(text, "x")[0] is None


def test_a_file_that_is_not_there_is_missing(tmp_path):
    with pytest.raises(MissingError, match=r"x\.yaml: not found"):
        read_yaml(tmp_path / "x.yaml")


KEYS = st.sampled_from([*Settings.model_fields, "x", "profile", "<<", ""])
ODD = ["010", "1:30", "!!python/name:os.system", "&a", "*a", "0b_", ".inf", "1e-4", "no", "~", "[", "{", "|", "---"]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates().map(str),
    st.sampled_from(ODD),
)  # fmt: skip
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(KEYS, SCALARS, max_size=3))
LINES = st.one_of(
    st.tuples(KEYS, VALUES).map(lambda pair: f"{pair[0]}: {pair[1]}"),
    st.dictionaries(KEYS, VALUES, min_size=1, max_size=2).map(lambda values: yaml.safe_dump(values).rstrip()),
    st.text(alphabet=":-[]{}&*!|>'\"%@`#,?~ \t\n0aé\x00\ud800\U0001f600", max_size=20),
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(content=st.one_of(st.lists(LINES, max_size=4).map("\n".join), st.binary(max_size=60)))
def test_settings_of_any_content_are_settings_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "cpu.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load_settings(path), Settings)
    except SettingsError as error:
        assert "\n" not in str(error) and len(str(error)) < 600


@settings(max_examples=100, derandomize=True, deadline=None)
@given(key=st.sampled_from(sorted(Settings.model_fields)), value=VALUES)
def test_any_value_of_any_key_is_taken_as_it_is_or_refused_with_its_key(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp("any") / "cpu.yaml"
    path.write_text(yaml.safe_dump({key: value}), encoding="utf-8")
    try:
        assert getattr(load_settings(path), key) == value
    except SettingsError as error:
        assert "/cpu.yaml, line " in str(error)
