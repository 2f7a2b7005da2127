"""The sandbox of chat templates: no access, limited time and size, traced strings.

A template comes with a model, from anyone. It reaches nothing but its arguments (Jinja's sandbox);
it has a bounded time and size, which Jinja's sandbox does not give; and the strings that it works
on stay traced (`traced_text.py`).
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from types import CodeType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hymba_jax.tokenizer.traced_text import Traced, concat, generated, merge_origins, traced

SECONDS = 5.0  # CPU seconds per rendering, which usually takes milliseconds
MAX_CHARACTERS = 10_000_000  # of a string, or items of a list: more than any model reads
MAX_MADE = 20 * MAX_CHARACTERS  # in total, intermediate results included
MAX_BITS = 1000  # of an integer

_WIDE = re.compile(r"%(\(\w*\))?[-+ #0]*[\d.]*\d{6}|{[^{}]*:[^{}]*\d{6}")  # a wide format field


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one rendering of one template.

    It has what the transformers library gives to templates: `raise_exception`, `strftime_now`,
    `tojson` without escapes, `{% generation %}`, `{% break %}` and `{% continue %}`.

    Attributes:
      num_generated: characters that `{% generation %}` blocks wrote.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self._end = time.thread_time() + SECONDS
        self._left = MAX_MADE
        self.num_generated = 0
        self.code_generator_class = _Checked
        self.concat = self._concat  # type: ignore[method-assign]
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.filters["tojson"] = _to_json
        self.filters["join"] = self._join
        self.filters = {name: self._bounded(function) for name, function in self.filters.items()}

    def generate(self, template: str, variables: Mapping[str, Any]) -> Iterator[str]:
        """What a template writes, piece by piece; it is compiled once for all renderings."""
        code, names = _compiled(template), self.make_globals(None)
        return self.template_class.from_code(self, code, names).generate(variables)

    def check(self) -> None:
        """Raises TemplateError where the rendering has taken too long."""
        if time.thread_time() > self._end:
            raise TemplateError(f"it takes more than {SECONDS:g} seconds")

    def made[T](self, value: T) -> T:
        """Counts a result; raises TemplateError if too much was produced."""
        self.check()
        if isinstance(value, str | list | tuple | dict):
            self._left -= len(value)
            self._refuse_size(len(value) if self._left >= 0 else MAX_MADE)
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._check_arguments(args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        itself = getattr(__obj, "__self__", None)  # of a method
        sources = (itself if isinstance(itself, str) else "", args, kwargs)
        return __self.made(merge_origins(result, sources))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return self._concat((left, right))
        if operator in ("*", "**"):
            numbers = [value for value in (left, right) if isinstance(value, int)]
            if sizes and numbers:
                self._refuse_size(sizes[0] * max(numbers))
                left, right = (traced(v) if isinstance(v, str) else v for v in (left, right))
            elif len(numbers) == 2:
                bits = [number.bit_length() for number in numbers]
                wanted = sum(bits) if operator == "*" else bits[0] * abs(right)
                if wanted > MAX_BITS:
                    raise TemplateError("it makes numbers that are too large")
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, tuple) else (right,), {})
        elif len(sizes) == 2:
            self._refuse_size(sum(sizes))
        return self.made(
            merge_origins(super().call_binop(context, operator, left, right), (left, right))
        )

    def getattr(self, obj: Any, attribute: str) -> Any:
        return super().getattr(traced(obj) if isinstance(obj, str) else obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapper = super().wrap_str_format(value)
        if wrapper is None or not isinstance(value.__self__, Traced):
            return wrapper
        text = value.__self__
        plain = super().wrap_str_format(getattr(str.__str__(text), value.__name__))
        assert plain is not None

        def formatted(*args: Any, **kwargs: Any) -> str:
            self._check_format(text, args, kwargs)
            return str(merge_origins(plain(*args, **kwargs), (text, args, kwargs)))

        return formatted

    def _concat(self, strings: Iterable[str]) -> Traced:
        return self.made(concat(strings))

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | None = None) -> Traced:
        if attribute is not None:
            value = self.call_filter("map", value, kwargs={"attribute": attribute})
        return self.made(traced(d).join(map(str, value)))

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Keeps the attributes by which Jinja passes arguments; the name and others take longer.
        @functools.wraps(function, assigned=())
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._check_arguments(args, kwargs)
            args = tuple(traced(value) if isinstance(value, str) else value for value in args)
            return self.made(merge_origins(function(*args, **kwargs), (args, kwargs)))

        return bounded

    def _check_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Limits every numeric argument, such as an indentation or a width."""
        self.check()
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                self._refuse_size(abs(value))

    def _check_format(self, form: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._check_arguments(args, kwargs)
        if _WIDE.search(form):
            raise TemplateError("it formats a field that is too wide")

    def _refuse_size(self, size: int) -> None:
        if size > MAX_CHARACTERS:
            raise TemplateError(f"it writes more than {MAX_CHARACTERS:,} characters")


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> CodeType:
    code = Sandbox().compile(template)
    assert isinstance(code, CodeType)
    return code


class _Checked(CodeGenerator):
    """Makes loops check the time, and `~` keep origins; macros are checked when called."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.body.insert(0, nodes.ExprStmt(nodes.Call(_CHECK, [], [], None, None)))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")


_CHECK = nodes.EnvironmentAttribute("check")


class _Generation(Extension):
    """`{% generation %}`, which marks what is trained on, writes what is in it."""

    tags = frozenset(["generation"])  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Macro) -> str:
        text = generated(caller())
        environment = self.environment
        assert isinstance(environment, Sandbox)
        environment.num_generated += len(text)
        return text


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, unlike Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_refuse,
    )


def _refuse(value: object) -> NoReturn:
    """Names the field that the messages lack, or the type that JSON does not have."""
    if isinstance(value, Undefined):
        value()  # raises UndefinedError, as any use of it does
    raise TemplateError(f"{type(value).__name__} cannot be written as JSON")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
