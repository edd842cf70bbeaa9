"""The digest of sources: the same under every Python, in every layout, and never for another meaning."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from mup_moe.provenance import source_digest
from mup_moe.training.code import SOURCES, code_digest

# What Pythons from 3.11 on parse into different trees, or might, a paragraph each. Left out is what some of them run
# as another program: `{a != b=}`, `{x:{y=}}`, and backslashes in the format specification of a raw f-string.
HARD = r'''
# nested quotes
x = f'{a["b"]} {c!r}' f"{d['e']} it's \"{g}\"" f"""{h["i"]} "j" {k}"""
y = f"""{f"{f'{a}' + 'b'}" + f'{c!r:>3}'}"""

# concatenation
x = "a" f"b{c}" "d" f"" f"{e}" ""
y = f"a" "b" f"c", "" f"", f"" "", u"a" "b", f"{a}" u"b"
z = (
    f"{a} "
    "b {c} "  # no field
    rf"\d{e}"
)

# format specifications
x = f"{a:>{w}}" f"{a:{w}.{p}}" f"{a:{w}}" f"{a:}" f"{a!r:^{w}}" f"{a:{f}{w}.{p}f}" f"{a:%Y-%m}" f"{a:{w:}}"
y = f"{a:{'>'}{10}}" f"{a:{b['c']}}" f"{a:{w!s}x}" f"{a:\n}" f"{a:µ}"

# expressions that are shown
x = f"{a=}" f"{a = }" f"{ a.b[0]=!s:>{w}}" f"{a + 1=:.3f}" f"{'a'=}" f"{f(b=1)=}" f"{a == b}" f"{a != b}"

# braces
x = f"{{}}" f"{{{a}}}" f"a{{b}}c{{" "{}" "{{}}"
y = f"{ {1: 2}[a] }" f"{(lambda: 1)()}" f"{a,}" f"{*a, b}" f"{(a := 1)}" f"{a if b else c}"

# escapes
x = f"\n{a}\x7b\N{DIGIT ONE}\u00b5\\" rf"\n{a}\{b}" "\N{BULLET}"

# lines
x = f"""
{
    a
}  {b:>3}
"""
y = 'a\
b'

# literals
x = u"a", b"a", rb"\a", Rb"b", b"c" b"d", r"\n", "\0", "\ud800"
y = 1, 1.0, True, 1j, 0x1F, 0b1, 1_000, 1e400, -1, +1, ~1, 1e-07, 0.1 + 2j, ..., None, 10**100

# comments on types
x = []  # type: list[int]
def f(a):
    # type: (int) -> int
    return a  # type: ignore[b]

# annotations
x: int
(y): int = 1
z.a: 'str'
def f(a: int = 1, *b: str, **c: bool) -> None: ...
def g(*a: *b): return *c, 1

# match
match a, b:
    case [1, 2.0, -3j, *_] | (None, True) if c: pass
    case {'k': v, **rest} | A(x=1, y=B.C) as d: pass
    case str() | 'a' 'b' | [*rest] | {}: pass
    case _: pass

# arguments
def f(a, b=1, /, c=2, *d, e, g=3, **h): pass
def g(*, a): pass
f(*a, b, *c, d=1, **e)
x = lambda a, /, b=1, *c, d=lambda: (yield), **e: (a, b)
y = lambda: ...

# decorators
@a
@b.c(1)[0]
@(d := e)
class F(G, metaclass=H):
    @property
    async def f(self): pass

# assignments
if (x := f(y := 1)) and [z := 1, z]: pass
w = x[y:=1, 2]
a, *b = *c, d
x[*a, 1:2, ::3, ...] = y
for z in *a, b: pass
w = {**a, 'b': 1, **c}, [*a], {*a}
p = q = r if s else t
u += v @ w

# asynchronous
async def f():
    async with a as b, c: await d
    async for e in f: yield e
    return [x async for x in y if await z]

# exceptions
try: pass
except* (A, B) as e: raise
except* C: raise D from None
try: pass
except: pass
else: pass
finally: pass

# other statements
with (a as b, c as (d, e),): pass
with (a, b): pass
from . import c
from ..d import (e as f, g,)
import h.i as j
def k():
    global a, b
    del k, (l, m)
    assert n, o
x < y <= z is not None not in a

# docstrings
class A:
    """Doc."""
    def f(self): "doc"
    async def g(self): b"no doc"
    def h(self): f"no doc"
"no doc"
'''
# In Unicode since 15.0, 15.1 and 16.0, which 3.12, 3.13 and 3.14 brought, and what no Python shows as it is.
HARD += '\n# unicode\nx = "µ \U0001f600 \U0001f6dc \u2ffc \U0001fae9 \u200b \xa0"\nλ = f"{ﬁ}é"\n'
DIGESTS = """
import json, sys
from pathlib import Path
from mup_moe.provenance import source_digest
from mup_moe.training.code import code_digest

print(json.dumps({"code": code_digest()} | {name: source_digest([Path(name)]) for name in sys.argv[1:]}))
"""
VERSION = "import sys; assert sys.version_info >= (3, 11); print(sys.version)"


def answer(python: Path | str, code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """What another Python prints, with the standard library and this package alone."""
    command = [python, "-S", "-W", "ignore", "-c", code, *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=env, check=False, capture_output=True, text=True)


def other_pythons() -> dict[str, Path | str]:
    """A Python for every other version that is here and can run, from 3.11 on."""
    named = (shutil.which(f"python3.{minor}") for minor in range(11, 16))
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found: dict[str, Path | str] = {}
    for python in [*filter(None, named), *sorted(pyenv.glob("versions/*/bin/python3"))]:
        with contextlib.suppress(OSError):
            told = answer(python, VERSION)
            if told.returncode == 0 and told.stdout.strip() != sys.version:
                found.setdefault(told.stdout.strip(), python)
    return found


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The digest of a text as a file."""
    path = tmp_path_factory.mktemp("digest") / "source.py"

    def of(text: str) -> str:
        path.write_text(text, encoding="utf-8")
        return source_digest([path])

    return of


# ---------------------------------------------------------------- from Python to Python


def test_every_other_python_takes_the_same_digests(tmp_path):
    pythons = other_pythons()
    if not pythons:
        pytest.skip("there is no other Python from 3.11 on, neither on PATH nor of pyenv")
    for number, paragraph in enumerate([*HARD.split("\n\n"), HARD]):
        (tmp_path / f"{number}.py").write_text(paragraph, encoding="utf-8")
    paths = sorted([*tmp_path.glob("*.py"), *ROOT.glob("src/**/*.py")])
    assert set(SOURCES) < set(paths)
    mine = {"code": code_digest()} | {str(path): source_digest([path]) for path in paths}
    for version, python in pythons.items():
        told = answer(python, DIGESTS, *paths)
        assert told.returncode == 0, told.stderr
        assert json.loads(told.stdout) == mine, version


def test_the_digest_of_hard_syntax_is_the_one_that_other_pythons_have_taken(digest):
    assert digest(HARD) == "2c7aca7429a25a14"


# ---------------------------------------------------------------- what it does not follow


PLAIN = '''
class A(B):
    def f(self, x, *, y=1):
        """Doc."""
        return f"{x:>{y}}" if x > y else [x, "a"]
'''
SAME = {
    "comments": PLAIN.replace("(B):", "(B):  # why").replace("    def", "    # type: ignore\n    # more\n    def"),
    "another docstring": PLAIN.replace("Doc.", "Something else.\n\n        In full.\n        "),
    "no docstring": PLAIN.replace('        """Doc."""\n', ""),
    "more docstrings": '"""Doc."""\n' + PLAIN.replace("(B):", '(B):\n    "Doc."\n'),
    "blank lines": PLAIN.replace("\n", "\n\n\n"),
    "line breaks": PLAIN.replace("[x, ", "[\n  x,\n\n").replace("self, x, ", "\n  self,\n  x,\n  "),
    "indentation": PLAIN.replace("    ", "  "),
    "parentheses": PLAIN.replace("x > y", "((x) > (y))"),
    "quotes": PLAIN.replace('"a"', "'a'").replace('f"{x:>{y}}"', "f'''{x:>{y}}'''"),
    "how text is written": PLAIN.replace('"a"', r'"" "\x61"'),
    "the kind of a literal": PLAIN.replace('"a"', 'u"a"'),
    "pieces": PLAIN.replace('f"{x:>{y}}"', '"" f"{x:>{y}}" f""'),
    "spaces": PLAIN.replace("{x:", "{ x :").replace("y=1", "y = 1"),
    "trailing commas": PLAIN.replace("y=1)", "y=1,)").replace('"a"]', '"a",]'),
    "line ends": PLAIN.replace("\n", "\r\n"),
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_layout_and_comments_do_not_change_the_digest(digest, text):
    assert text != PLAIN
    assert digest(text) == digest(PLAIN)


def test_a_docstring_alone_is_as_good_as_nothing(digest):
    assert digest("") == digest("# nothing\n") == digest('"""Doc."""\n')
    assert digest("def f(): 'Doc.'") == digest("def f(): pass")


# ---------------------------------------------------------------- what it follows


OTHER = {
    "a constant": ("x + 1", "x + 2"),
    "an integer": ("x = 1", "x = 1.0"),
    "a truth": ("x = 1", "x = True"),
    "a complex number": ("x = 1.0", "x = 1j"),
    "bytes": ('x = "a"', 'x = b"a"'),
    "text of a number": ("x = 1", "x = '1'"),
    "none": ("x = None", "x = 'None'"),
    "ellipsis": ("x = ...", "x = 'Ellipsis'"),
    "a name for text": ("x = a", "x = 'a'"),
    "empty text": ('x = ""', "x = None"),
    "no text": ('x = f""', 'x = ""'),
    "escaped text": (r'x = "\n"', r'x = "\\n"'),
    "escapes": ('x = "µ"', r'x = "\\xb5"'),
    "an operator": ("x + y", "x - y"),
    "an order": ("x - y", "y - x"),
    "precedence": ("(x + y) * z", "x + y * z"),
    "a sign": ("x = 1", "x = -1"),
    "a name": ("x + y", "x + z"),
    "an attribute": ("x.y", "x.z"),
    "a keyword": ("f(x=1)", "f(y=1)"),
    "a position": ("def f(x, /): pass", "def f(x): pass"),
    "a keyword alone": ("def f(*, x): pass", "def f(x): pass"),
    "a default": ("def f(x=1): pass", "def f(x=2): pass"),
    "whose default": ("def f(*, x=1, y): pass", "def f(*, x, y=1): pass"),
    "a default of lambda": ("lambda x=1: x", "lambda x=2: x"),
    "a decorator": ("@a\ndef f(): pass", "def f(): pass"),
    "an asynchronous function": ("async def f(): pass", "def f(): pass"),
    "an annotation": ("x: int = 1", "x: float = 1"),
    "an annotation of what is no name": ("x: int", "(x): int"),
    "a conversion": ('f"{x!r}"', 'f"{x!s}"'),
    "no conversion": ('f"{x!s}"', 'f"{x}"'),
    "a format": ('f"{x:.2f}"', 'f"{x:.3f}"'),
    "no format": ('f"{x:.2f}"', 'f"{x}"'),
    "a nested format": ('f"{x:{y}}"', 'f"{x:{z}}"'),
    "a format's place": ('f"{x:{y}.3}"', 'f"{x:3.{y}}"'),
    "text around": ('f"a{x}"', 'f"{x}a"'),
    "a debugging f-string": ('f"{x=}"', 'f"{x = }"'),
    "a field for text": ('f"{x}"', 'f"{{x}}"'),
    "text for a field": ('f"{x}"', '"{x}"'),
    "a tuple": ("x = y", "x = y,"),
    "a slice": ("x[1:]", "x[:1]"),
    "a step": ("x[::2]", "x[:2]"),
    "a target": ("x = y = z", "y = x = z"),
    "an argument for another": ("f(x, None)", "f(x)"),
    "unpacking": ("f(*x)", "f(**x)"),
    "a key": ("{**x}", "{x}"),
    "a branch": ("if x: y\nelse: z", "if x: z\nelse: y"),
    "an else": ("for x in y: pass\nelse: z", "for x in y: pass\nz"),
    "a group of exceptions": ("try: x\nexcept A: y", "try: x\nexcept* A: y"),
    "a pattern": ("match x:\n    case None: y", "match x:\n    case _: y"),
    "a pattern's rest": ("match x:\n    case {**z}: y", "match x:\n    case {}: y"),
    "a module": ("from . import x", "from .. import x"),
    "another name": ("import x", "import x as y"),
    "text that documents nothing": ("x\n'a'", "x\n'b'"),
    "a bytes docstring": ("b'a'", "b'b'"),
    "an f-string docstring": ("f'a'", "f'b'"),
    "which statement is where": ("if x:\n    y\n    z", "if x:\n    y\nz"),
}


@pytest.mark.parametrize(("text", "other"), OTHER.values(), ids=OTHER)
def test_meaning_changes_the_digest(digest, text, other):
    assert digest(text) != digest(other)


constants = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary(), st.just(...)
)


@given(constants, constants)
def test_constants_have_one_digest_if_they_are_the_same(digest, one, other):
    assert (digest(f"x = {one!r}") == digest(f"x = {other!r}")) == (repr(one) == repr(other))
    assert digest(f"x = {one!a}") == digest(f"x = ({one!r})  # {one!a}")


def test_files_are_told_by_name_and_order(tmp_path):
    a, b, c = (tmp_path / name for name in ("a.py", "b.py", "c.py"))
    for path, text in {a: "x = 1", b: "x = 2", c: "x = 1"}.items():
        path.write_text(text)
    assert len({source_digest(paths) for paths in ([a], [b], [c], [a, b], [b, a], [])}) == 6
