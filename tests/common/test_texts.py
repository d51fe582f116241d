"""Invalid or ambiguous settings are refused in one line: JSON and YAML are read strictly."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from mgll_encoder.common.errors import LONGEST, BadDataError, NotFoundError, UserError
from mgll_encoder.common.texts import DEPTH, parse_json, parse_yaml, read_as, read_json


def test_what_is_meant_is_read() -> None:
    assert parse_json(
        '{"a": [1, 2.5, null, "é \\ud83d\\ude00"], "b": 1000000000000000019884624838656}', "x"
    ) == {
        "a": [1, 2.5, None, "é 😀"],
        "b": 10**30 + 19884624838656,
    }
    assert parse_yaml("a: 1e-3\nb: [x, 2]\nc: {d: true}\n", "x") == {
        "a": "1e-3",
        "b": ["x", 2],
        "c": {"d": True},
    }


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1, "a": 2}', "key 'a' appears 2 times"),
        ("[NaN]", "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("[1e999]", "1e999 is not a finite number"),
        ("9" * 5000, "a number of 5000 digits"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "nested too deeply"),
        ('{"\\ud800": 1}', "half of a surrogate pair"),
        ("{", "line 1 column 2"),
    ],
)
def test_json_that_cannot_be_meant(text: str, found: str) -> None:
    with pytest.raises(BadDataError, match=r"^x\.json") as refused:
        parse_json(text, "x.json")
    assert found in str(refused.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: 1\na: 2", "key 'a' appears 2 times (line 1"),
        ("a: .nan", "'.nan' is not a valid float: nan is not a finite number (line 1, column 4)"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("a: &b [*b]", "alias '*b'"),
        ("a: &b x\nc: *b", "alias '*b'"),
        ("\na: !!float x", "'x' is not a valid float"),
        ("a: !!timestamp x", "'x' is not a valid timestamp"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 2026-13-45", "'2026-13-45' is not a valid timestamp"),
        ("a: " + "[" * 2000, "nested too deeply"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("a: {? [1]: 2}", "unhashable key"),
        ("a: [", "(line 1"),
        ("a: \0", "special characters are not allowed"),
    ],
)
def test_yaml_that_cannot_be_meant(text: str, found: str) -> None:
    with pytest.raises(BadDataError, match=r"^x\.yaml") as refused:
        parse_yaml(text, "x.yaml")
    assert found in str(refused.value)


def test_nan_may_stand_for_what_is_missing() -> None:
    assert str(parse_json("[NaN]", "x", nan=True)) == "[nan]"


class _Form(BaseModel, extra="forbid"):
    a: int


def test_a_form_names_its_first_fault(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text, found in (
        (
            '{"a": "no"}',
            "field 'a': Input should be a valid integer, unable to parse string as an integer (found 'no')",
        ),
        ("{}", "field 'a': Field required"),
        ('{"a": 1, "b": 2}', "field 'b': Extra inputs are not permitted (found 2)"),
        ("[]", "Input should be a valid dictionary"),
    ):
        file.write_text(text)
        with pytest.raises(BadDataError) as refused:
            read_as(_Form, file, "form", "copy it again")
        assert found in str(refused.value)
        assert str(refused.value).startswith(f"form {file}: ")
        assert str(refused.value).endswith("copy it again")


def test_an_object_is_expected(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(BadDataError, match="contains a JSON list: expected an object"):
        read_json(tmp_path / "x.json")
    with pytest.raises(NotFoundError, match="does not exist"):
        read_json(tmp_path / "y.json")


def test_a_message_shows_no_more_than_a_terminal_should_see() -> None:
    message = str(UserError("field 'a' is \x1b[31m\ud800\n" + "x" * 10_000 + " expected a number"))
    assert message.startswith("field 'a' is \\x1b[31m\\ud800 xxx")
    assert message.endswith("xxx expected a number")
    assert len(message) < LONGEST + 10
