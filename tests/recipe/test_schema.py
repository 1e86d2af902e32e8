"""The published schema: valid, complete, and of one mind with the reader."""

import json

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from surgery.cli.schema_ import command
from surgery.graph.forms import forms
from surgery.ops import registry

GOOD = """
models: {a: x, b: {source: y, revision: main}}
steps:
  d: {op: diff, of: [a, b]}
  t: {op: ties, of: [d, d], density: [0.2, [0.1, 0.3]], weight: {"*norm*": 0.0, "*": 1.0}}
  m: {op: add, of: [b, t], weight: 0.5}
  short: {op: layers, of: m, keep: ["0:4", 7]}
output: {from: short, dtype: bfloat16}
"""


@pytest.fixture(scope="module")
def schema():
    done = CliRunner().invoke(command, [], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


def test_it_is_a_schema_that_knows_every_step(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    assert set(schema["$defs"]["step"]["properties"]["op"]["enum"]) == {*registry, *forms}


def test_it_accepts_a_recipe(schema):
    jsonschema.validate(yaml.safe_load(GOOD), schema)


@pytest.mark.parametrize(
    "old,new",
    [
        ("op: ties", "op: tise"),
        ("dtype: bfloat16", "dtype: bf8"),
        ("density: [0.2, [0.1, 0.3]]", "density: much"),
        ("keep:", "keeps:"),
        ("weight: 0.5", "wieght: 0.5"),
        ("output:", "outputs:"),
    ],
)
def test_it_refuses_what_the_reader_refuses(schema, old, new):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(GOOD.replace(old, new)), schema)
