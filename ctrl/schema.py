"""A configuration against a JSON schema: the first mistake in one line, with the nearest known key and what is allowed."""

import difflib
import json
import math
import operator
import re

import jsonschema

from ctrl.errors import UserError


def check(config: dict, schema: dict, where: str = "config") -> None:
    """Raises UserError for the first mistake: the dotted key, its value, the nearest known name of an unknown key, what is allowed.

    Beyond JSON schema: `ascending: true` (each number above the one before), `nondescending: true` (not below it), `sum` (what the
    values of a mapping add up to).
    """
    errors = sorted(_Validator(schema).iter_errors(config), key=lambda error: (error.validator != "additionalProperties", len(error.path)))
    if errors:
        raise UserError(f"{where}: {_describe(errors[0], schema)}")


def nearest(key: str, siblings: list[str], dotted: list[str], parent: str = "") -> str:
    """The known name that is spelled most like `key`: beside it under `parent` if one is close, otherwise anywhere, as a dotted key."""
    leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(dotted)}
    close = difflib.get_close_matches(key, siblings, 1)
    if key in leaves:
        return leaves[key]
    if not close and (elsewhere := difflib.get_close_matches(key, leaves, 1)):
        return leaves[elsewhere[0]]
    close = close or difflib.get_close_matches(key, siblings, 1, cutoff=0.0)
    return ".".join([parent, close[0]]) if parent else close[0]


def _describe(error: jsonschema.ValidationError, schema: dict) -> str:
    """One line for one error of jsonschema."""
    key = ".".join(map(str, error.absolute_path))
    if error.validator == "additionalProperties":
        siblings = list(error.schema.get("properties", {}))
        unknown = next(str(name) for name in error.instance if name not in siblings)
        close = nearest(unknown, siblings, _dotted(schema), key)
        return f"unknown key {'.'.join(filter(None, [key, unknown]))}; did you mean {close}? Allowed here: {', '.join(siblings)}"
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        return f"{'.'.join(filter(None, [key, missing]))} is missing"
    if error.validator in ("anyOf", "oneOf"):
        branches = error.validator_value
        deeper = [e for e in error.context if e.validator not in ("type", "const") or len(e.path) > 0]
        if deeper:
            return _describe(deeper[0], schema)
        return f"{key} is {_show(error.instance)}; it must be {' or '.join(_allowed(branch) for branch in branches)}"
    return f"{key} is {_show(error.instance)}; it must be {_allowed(error.schema)}{_hint(error)}"


def _allowed(schema: dict) -> str:
    """In words, what a schema allows; its own `description` where it has one."""
    if "description" in schema:
        return schema["description"]
    if "const" in schema:
        return _show(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(_show, schema["enum"]))
    types = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    names = {"object": "a mapping", "array": "a list", "string": "a text", "integer": "a whole number", "number": "a finite number"}
    words = [names.get(name, {"boolean": "true or false"}.get(name, name)) for name in types]
    limits = [
        text.format(schema[name])
        for name, text in {
            "exclusiveMinimum": "above {}",
            "minimum": "at least {}",
            "exclusiveMaximum": "below {}",
            "maximum": "at most {}",
            "pattern": "matching {}",
            "minLength": "of {} or more characters",
            "minItems": "of {} or more entries",
            "maxItems": "of {} or fewer entries",
            "sum": "whose values add up to {}",
        }.items()
        if name in schema
    ]
    limits += ["in ascending order"] if schema.get("ascending") or schema.get("nondescending") else []
    limits += ["without repetitions"] if schema.get("uniqueItems") else []
    limits += [f"each {_allowed(schema['items'])}"] if "items" in schema else []
    limits += ["with the keys " + ", ".join(schema["properties"])] if "properties" in schema else []
    return " ".join([" or ".join(words), ", ".join(limits)]).strip()


def _hint(error: jsonschema.ValidationError) -> str:
    """YAML reads 1e-3 as a text: say how to write it."""
    if error.validator == "type" and "number" in str(error.schema["type"]) and "e" in str(error.instance):
        try:
            value = float(error.instance)
        except ValueError:
            return ""
        if math.isfinite(value):
            better = error.instance if "." in error.instance else error.instance.replace("e", ".0e", 1)
            return f": YAML takes {error.instance} for a text, write {better}"
    return ""


def _show(value: object) -> str:
    """The value as a user wrote it; a text that looks like a number or like nothing in quotes."""
    plain = isinstance(value, str) and not re.fullmatch(r"|[-+.\de]+|true|false|null", value)
    try:
        text = value if plain else json.dumps(value, ensure_ascii=False, default=str)
    except TypeError:  # a key that is a date
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _dotted(schema: dict, parent: str = "") -> list[str]:
    """Every key of a schema, dotted, outer ones first."""
    names = []
    for name, inner in schema.get("properties", {}).items():
        key = f"{parent}.{name}" if parent else name
        names += [key, *_dotted(inner, key)]
    return sorted(names, key=lambda key: key.count("."))


def _check_order(in_order):
    def check_order(validator, wanted, values, schema):
        numbers = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
        if wanted and numbers and not all(map(in_order, values, values[1:])):
            yield jsonschema.ValidationError(f"{values} is out of order")

    return check_order


def _check_sum(validator, total, values, schema):
    numbers = isinstance(values, dict) and all(isinstance(v, int | float) for v in values.values())
    if numbers and not math.isclose(sum(values.values()), total, abs_tol=1e-9):
        yield jsonschema.ValidationError(f"{values} does not add up to {total}")


def _is_number(checker, value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {"ascending": _check_order(operator.lt), "nondescending": _check_order(operator.le), "sum": _check_sum},
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("number", _is_number),
)
