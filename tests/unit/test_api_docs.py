"""docs/api.md and /openapi.json say what the code does."""

import re
from pathlib import Path

import jsonschema
import msgspec

from helixd.api.fields import CHAT_FIELDS, COMPLETION_FIELDS, DETOKENIZE_FIELDS, TOKENIZE_FIELDS, Field
from helixd.api.openapi import description
from helixd.api.options import ApiOptions

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()


def section(title: str) -> str:
    return DOCS.split(f"{title}\n")[1].split("\n#")[0]


def documented(title: str) -> dict[str, str]:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", section(title), re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a field is listed twice"
    return dict(rows)


def treatments(table: tuple[Field, ...]) -> dict[str, str]:
    return {field.name: field.treatment for field in table}


def test_the_tables_of_fields_are_the_parsers() -> None:
    both = documented("### Both endpoints")
    assert both | documented("### Chat only") == treatments(CHAT_FIELDS)
    assert both | documented("### Completions only") == treatments(COMPLETION_FIELDS)
    assert documented("### `/tokenize`") == treatments(TOKENIZE_FIELDS)
    assert documented("### `/detokenize`") == treatments(DETOKENIZE_FIELDS)


def test_the_values_said_to_be_taken_are() -> None:
    for field in (*CHAT_FIELDS, *COMPLETION_FIELDS, *TOKENIZE_FIELDS):
        if field.treatment != "refused":
            continue
        [note] = set(re.findall(rf"^\| `{field.name}` \| refused \| ?(.*?) ?\|$", DOCS, re.MULTILINE))
        taken = re.match(r'Taken: ((?:"\w*"|\[.*?\]|\w+)(?:, "\w+")*)', note)
        listed = msgspec.json.decode(f"[{taken[1]}]") if taken else []
        assert [v for v in field.neutral if not isinstance(v, float)] == listed, field.name


def test_every_template_scalar_is_listed() -> None:
    row, *_ = re.findall(r"^\| `chat_template_kwargs` .*$", DOCS, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)[1:]) == ApiOptions().template_scalars


def test_every_route_is_listed() -> None:
    listed = set(re.findall(r"`((?:GET|POST) /[\w/.{}]*)`", DOCS.split("## Fields")[0]))
    paths = description()["paths"]
    assert isinstance(paths, dict)
    assert listed == {
        f"{method.upper()} {path}" for path, item in paths.items() for method in item if method != "parameters"
    }


def test_the_openapi_schemas_are_schemas_and_refer_to_each_other() -> None:
    document = description()
    components = document["components"]
    assert isinstance(components, dict)
    for schema in components["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for name in re.findall(r"#/components/schemas/(\w+)", str(document)):
        assert name in components["schemas"]
    request = {"$ref": "#/components/schemas/ChatRequest", "components": components}
    validator = jsonschema.Draft202012Validator(request)
    assert validator.is_valid({"model": "m", "messages": [{"role": "user", "content": "x"}], "top_p": None})
    assert not validator.is_valid({"model": "m", "messages": [], "top_p": 0.5})
    assert not validator.is_valid({"messages": [{}]})
