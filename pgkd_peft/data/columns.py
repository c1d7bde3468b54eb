"""Column mapping: templates from a recipe turn a data set's own columns into `messages` and PI.

    columns:
      messages:
        - {role: user, content: "{{ question }}"}
        - {role: assistant, content: "{{ answer }}"}
      privileged_messages: "Worked solution:\\n{{ solution }}"
      chat_template_kwargs: {enable_thinking: false}

Templates are Jinja, run in a sandbox: a recipe from elsewhere can read a row's columns and nothing else. Two rules
beyond Jinja's: a template whose columns are all empty in a row gives "" (so no "Worked solution:" without one), and a
column's template that is nothing but ``{{ name }}`` hands the value over as it is, a message list for example. A
column whose name Jinja cannot take is ``{{ row["Question text"] }}``. One
filter beyond Jinja's: ``{{ answer | regex_replace("<<.*?>>", "") }}`` replaces what a regular expression finds (where
backslashes are doubled, as in any text of a template; ``[.]`` needs none).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ConfigError, DataError

_BARE_COLUMN = re.compile(r"""\{\{\s*(?:(\w+)|row\[(["'])(.+)\2\])\s*\}\}""")


class ColumnMap:
    """Compiled column templates.

    Args:
        columns: target column → template, or a list or dict of templates (nested as needed). Values that are no
            strings are taken as they are.
        available: names of the data set's columns.

    Attributes:
        sources: the data set's columns that the templates use.

    Raises:
        ConfigError: a template is not valid Jinja, or names a column that the data set does not have.
    """

    def __init__(self, columns: Mapping[str, Any], available: Iterable[str]):
        if not isinstance(columns, Mapping) or not columns:
            raise ConfigError(f"columns is {columns!r}; give target columns and their templates, e.g. messages: [...]")
        self._environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, finalize=lambda value: "" if value is None else value, keep_trailing_newline=True
        )
        self._environment.filters["regex_replace"] = lambda text, found, by="": re.sub(found, by, str(text))
        self._available = list(available)
        self.sources: set[str] = set()
        self._makers = {target: self._compile(spec, f"columns.{target}") for target, spec in columns.items()}

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The target columns of one row.

        Raises:
            DataError: a template cannot be rendered for this row.
        """
        return {target: make(row) for target, make in self._makers.items()}

    def _compile(self, spec: Any, where: str, nested: bool = False) -> Callable[[Mapping[str, Any]], Any]:
        if isinstance(spec, str):
            return self._compile_text(spec, where, nested)
        if isinstance(spec, Mapping):
            items = {key: self._compile(value, f"{where}.{key}", True) for key, value in spec.items()}
            return lambda row: {key: make(row) for key, make in items.items()}
        if isinstance(spec, (list, tuple)):
            parts = [self._compile(value, f"{where}[{i}]", True) for i, value in enumerate(spec)]
            return lambda row: [make(row) for make in parts]
        return lambda row: spec

    def _compile_text(self, text: str, where: str, nested: bool) -> Callable[[Mapping[str, Any]], Any]:
        try:
            template = self._environment.from_string(text)
            names = meta.find_undeclared_variables(self._environment.parse(text)) - set(self._environment.globals)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{where} is not a valid template: {error.message} (line {error.lineno})") from error
        bare = _BARE_COLUMN.fullmatch(text.strip())
        column = (bare[1] or re.sub(r"\\(.)", r"\1", bare[3])) if bare else None
        if column and bare and not bare[1]:
            names = {column}
        whole = "row" in names and "row" not in self._available
        if whole:  # any of them
            names -= {"row"}
            self.sources |= set(self._available)
        for name in sorted(names - set(self._available)):
            near = difflib.get_close_matches(name, self._available, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{where} uses the column {name!r}, which the data does not have{hint} "
                f"Its columns are: {', '.join(self._available)}"
            )
        self.sources |= names

        def make(row: Mapping[str, Any]) -> Any:
            values = {name: row.get(name) for name in names}
            if names and not whole and all(value is None or value == "" for value in values.values()):
                return ""
            if column and not nested and not isinstance(values[column], (int, float)):
                return values[column]
            try:
                return template.render(values if "row" in values else {**values, "row": row})
            except (
                TemplateError,
                re.error,
                TypeError,
                ValueError,
                ArithmeticError,
                LookupError,
                AttributeError,
            ) as error:
                raise DataError(f"{where} cannot be rendered: {error}") from error

        return make


# The columns that are read from a row, beside the PI column.
COLUMNS = ("messages", "tools", "chat_template_kwargs", "teacher_chat_template_kwargs")
LEGACY_COLUMNS = ("functions",)  # looked at, to be refused
