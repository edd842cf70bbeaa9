"""Anything that a YAML file can hold either runs or is refused in sentences that name keys."""

import copy
import datetime
import itertools
import math
import reprlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from conftest import ROOT, copy_project, make_request, snakemake
from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.config.cell import LearningRate
from mup_moe.config.document import ConfigError, read_document
from mup_moe.config.jobs import jobs
from mup_moe.config.like import overlay
from mup_moe.config.load import read_preset, validate
from mup_moe.config.settings import Config
from mup_moe.model.dispatch import capacity
from mup_moe.model.inventory import model_size
from mup_moe.model.scaling import attention_logit_scale, factors
from mup_moe.parametrization import ROLES, VARIABLES
from mup_moe.sweep import Sweep
from mup_moe.training.optimizer import schedule
from mup_moe.training.request import TrainingRequest
from mup_moe.training.trainer import Trainer

DOCUMENT = read_document(ROOT / "config.yaml")
VOCABULARY = 300
# More blocks only cost time here, since a model is built block by block.
MANY_BLOCKS = 8


def cases(count: int) -> Any:
    large = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=count, suppress_health_check=large)


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys down to every section and every leaf of a document."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(below, (*path, key))


PATHS = sorted(paths(DOCUMENT), key=repr)
KEYS = sorted({key for path in PATHS for key in path if isinstance(key, str)})
VALUES = sorted({value for path in PATHS if isinstance(value := at(DOCUMENT, path), str)})
# Spellings of learning rates and factors.
SPELLED = [
    "2^-7",
    "1e-3",
    "2^-6.25",
    "2^900",
    "1",
    "width^2",
    "total_experts/fan_in",
    "fan_in^-99",
    "1/sqrt(head_size)",
]


# Most models of most configs were already built for the previous config.
BUILT: set[tuple[Any, ...]] = set()


def use(config: Config) -> None:
    """Does with a config everything that comes before the training of its cells."""
    sweep = Sweep(config)
    jobs({name: figure.cells() for name, figure in config.figures.items()}, config.execution.lockstep)
    for name in config.figures:
        FigureSpec.of(config, name)
    for result in [*config.figures.values(), *config.probes.values()]:
        cells = result.cells()
        for cell in {cells[0], cells[-1]}:
            request = sweep.request(cell)
            assert TrainingRequest.from_json(request.to_json()) == request
            if request.digest not in BUILT:
                build(request)
            BUILT.add(request.digest)


def build(request: TrainingRequest) -> None:
    """Builds what training builds for a request, except for the storage of its model."""
    model, training = request.model, request.training
    assert all(0 <= schedule(step, training) <= 1 for step in (0, training.steps - 1))
    shape, base = request.shape(VOCABULARY), request.base(VOCABULARY)
    tokens = training.batch_size * model.sequence
    assert 1 <= capacity(tokens, shape, model.capacity_factor) <= tokens
    assert attention_logit_scale(request.parametrization, shape, base) >= 0
    # transformers has errors of its own, which are not tested here.
    if model.blocks <= MANY_BLOCKS and shape.hub is None:
        assert model_size(shape, model).parameters > 0
        made = factors(request.parametrization, shape, base, model).values()
        assert all(factor.init_std >= 0 for factor in made)


def refusal(document: Any) -> str | None:
    """Uses a config; returns the error if it is refused, which must be sentences that name keys."""
    try:
        config = validate(document)
    except ConfigError as error:
        return sentences(error)
    use(config)
    return None


def sentences(error: ConfigError) -> str:
    """Returns the text of an error, which must be a few sentences that each name a key or a file."""
    lines = str(error).split("\n")
    assert len(lines) <= 21
    for line in lines:
        assert line.isprintable()
        assert len(line) < 500
        assert "`" in line or line.startswith(("and ", "the config ")) or ".yaml" in line, line
    return str(error)


# ---------------------------------------------------------------- values that no one expects


def laughs(levels: int = 9, inner: Any = "ha") -> Any:
    """Returns a value that is small in memory and enormous when written out."""
    for _ in range(levels):
        inner = [inner] * 9
    return inner


def itself(kind: type) -> Any:
    value = kind()
    value.append(value) if kind is list else value.update(like=value)
    return value


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


HOSTILE_TEXTS = [
    "",
    " ",
    "$(touch pwned)",
    "; touch pwned",
    "`touch pwned`",
    "../../etc/passwd",
    "/",
    "a/b",
    "{input}",
    "{}",
    "{wildcards.figure!r}",
    "a\nb",
    "a\tb",
    "'\"",
    "-rf",
    "\0",
    "\ud800",
    "\u202e",
    "é",
    "x" * 101,
    "x" * 5000,
    "nan",
    "2^-9",
    "2^-" + "9" * 500,
    "1/fan_in",
    "fan_in^" + "9" * 500,
    "1" + " " * 4000 + "*",
    "*",
    "str",
    "none",
]
HUGE = {
    "a number too long to spell out": 16**5000,
    "a billion laughs": laughs(),
    "laughs": laughs(5),
    "a list in itself": itself(list),
    "a mapping in itself": itself(dict),
    "a few levels": deep(50),
    "many levels": deep(3000),
    "a long list": [0] * 10_000,
    "a list": list(range(1, 400)),
}
# Drawn by name, since Hypothesis prints what it draws.
huge = st.sampled_from(sorted(HUGE)).map(HUGE.__getitem__)
integers = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**k + d for k in (7, 10, 15, 20, 24, 31, 53, 63, 64) for d in (-1, 0, 1)]),
    st.sampled_from([10**18, -(10**18), 10**400, -1, 0]),
)
floats = st.floats() | st.sampled_from([0.0, -0.0, math.nan, math.inf, 1e308, 5e-324, 1e-40, 1e38, 1.0, 0.5])
texts = st.one_of(st.sampled_from([*HOSTILE_TEXTS, *VALUES]), st.text(max_size=12))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    integers,
    floats,
    texts,
    st.binary(max_size=3),
    st.sampled_from([datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1), {"a"}, frozenset(), (), (1, 2), 1j]),
)
keys = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(HOSTILE_TEXTS),
    st.sampled_from([0, 1, -1, None, True, 1.5, (), ("a", "b"), b"a", datetime.date(2020, 1, 1)]),
    st.text(max_size=6),
)
small_values = st.recursive(
    scalars, lambda below: st.lists(below, max_size=4) | st.dictionaries(keys, below, max_size=4), max_leaves=8
)
values = st.one_of(small_values, small_values, small_values, small_values, huge)


@dataclass(repr=False)
class Mutation:
    """The real config with a change, and the place of the change."""

    document: Any
    path: tuple[Any, ...]

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        try:
            return f"{self.path}: {reprlib.repr(at(self.document, (*self.path[:-2], self.path[-1])))}"
        except (LookupError, TypeError, ValueError):
            return f"{self.path}, which is gone"


@st.composite
def mutations(draw: st.DrawFn) -> Mutation:
    document = copy.deepcopy(DOCUMENT)
    path = draw(st.sampled_from(PATHS))
    section, key = at(document, path[:-1]), path[-1]
    match draw(st.sampled_from(["set", "set", "nudge", "nudge", "remove", "wrap", "take", "rename", "add"])):
        case "set":
            section[key] = draw(values)
        case "nudge" if isinstance(section[key], int | float):
            section[key] *= draw(st.sampled_from([-1, 0, 1, 2, 3, 8, 1000, 10**6, 10**12, 0.5, 1e-12, 1e30]))
        case "nudge" if isinstance(section[key], list):
            section[key] = draw(st.permutations(section[key]))[: draw(st.integers(0, 4))]
        case "nudge" if isinstance(section[key], str):
            section[key] = draw(st.sampled_from([*VALUES, *SPELLED]))
        case "remove":
            del section[key]
        case "wrap":
            section[key] = draw(st.sampled_from([[section[key]], {"like": section[key]}, [section[key]] * 2]))
        case "take":
            section[key] = copy.deepcopy(at(DOCUMENT, draw(st.sampled_from(PATHS))))
        case "rename" if isinstance(section, dict):
            key = draw(keys)
            section[key] = section.pop(path[-1])
        case _ if isinstance(section, dict):
            key = draw(keys)
            section[key] = draw(values)
        case _:
            section.append(draw(values))
    return Mutation(document, (*path, key))


@cases(1500)
@given(mutations())
def test_a_config_with_one_change_runs_or_is_refused_by_its_key(mutation):
    said = refusal(mutation.document)
    named = said is None or any(key in said for key in mutation.path if isinstance(key, str))
    assert named or "the config has the key" in said


# ---------------------------------------------------------------- rows of the table

factor_texts = st.one_of(
    st.sampled_from([*SPELLED, *HOSTILE_TEXTS, "1/2", "fan_in^1/3", "fan_in^-2.5", "fan_in*fan_in*fan_in^15"]),
    st.text("1/*^-.() sqrt_fanwidexpko0", max_size=20),
    st.lists(st.sampled_from([*VARIABLES, "1", "sqrt(width)", "width^-16"]), min_size=1, max_size=5).map("/".join),
)
rows = st.dictionaries(
    st.sampled_from([*ROLES, "attention_logits", "like"]),
    st.lists(factor_texts | scalars, min_size=3, max_size=5) | factor_texts | scalars,
    max_size=4,
)


@cases(400)
@given(rows, st.sampled_from(["simplep", "mup", "mine", "sp"]))
def test_a_parametrization_runs_or_is_refused_by_its_key(row, parent):
    document = overlay(DOCUMENT, {"parametrizations": {"mine": {"like": parent} | row}})
    document["figures"] = overlay(document["figures"], {"figure3": {"axes": {"parametrization": ["sp", "mine"]}}})
    document["claims"] = overlay(
        document["claims"], {"table": {"C6": {"drifts": [{"figure": "figure3", "panel": "mine", "expect": "keeps"}]}}}
    )
    said = refusal(document)
    assert said is None or "parametrizations.mine" in said


def test_thousands_of_entries_that_inherit_from_each_other_are_refused_in_a_sentence():
    for section, first in (("parametrizations", "sp"), ("figures", "figure1"), ("corpora", "python")):
        chain = {f"a{i}": {"like": f"a{i - 1}" if i else first} for i in range(5000)}
        said = refusal(overlay(DOCUMENT, {section: dict(reversed(chain.items()))}))
        assert said is not None
        assert section in said


# ---------------------------------------------------------------- the ends of ranges

ENDS: list[dict[str, Any]] = [
    {"learning_rate": LearningRate(1e30)},
    {"learning_rate": LearningRate(1e-30)},
    *({name: value} for name in ("adam_eps", "clip_norm", "capacity_factor") for value in (1e-37, 1e37)),
    *({name: value} for name in ("embedding_multiplier", "logit_multiplier", "init_scale") for value in (1e-37, 1e37)),
    *({name: value} for name in ("divergence_margin", "divergence_span") for value in (1e-37, 1e37)),
    *({name: 2.0**53} for name in ("weight_decay", "balance_loss", "z_loss")),
    {"adam_betas": (0.0, 0.0)},
    {"adam_betas": (1 - 2**-53, 1 - 2**-53)},
    {"seed": 2**63 - 1},
    {"precision": "bfloat16", "logit_multiplier": 1e37},
]


@pytest.mark.parametrize("change", ENDS, ids=str)
def test_at_the_ends_of_ranges_a_cell_finishes_or_diverges(change, tokens):
    trainer = Trainer([make_request(**change)], tokens, tokens, 97, torch.device("cpu"))
    trainer.run()
    assert trainer.outcomes()[0].status in ("finished", "diverged")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("setups: {small: {training: {adam_eps: 1.0e-50}}}", "`adam_eps` is 1e-50"),
        ("setups: {small: {training: {clip_norm: 1.0e+300}}}", r"`clip_norm` is 1e\+300"),
        ("setups: {small: {model: {blocks: 100000}}}", "`blocks` is 100000"),
        ("setups: {small: {model: {base_experts: 1, top_k: 2}}}", "`top_k` 2 is more than `base_experts` 1"),
        ("corpora: {python: {vocabulary: 4294967296}}", "`vocabulary` is 4294967296"),
        ("figures: {figure1: {axes: {width: [32, 1000000000]}}}", "width is 1000000000 but must be between 1 and 2"),
        (
            "setups: {small: {model: {base_width: 1048576, base_experts: 65536}}}",
            "`base_width` 1048576, `base_experts` 65536 and `ffn_ratio` 2 make a tensor",
        ),
        ("setups: {small: {model: {base_width: 7}}}", "`base_width` 7 is not divisible by `heads` 4"),
        ("figures: {figure1: {axes: {width: [32, 1000000], experts: [1000000]}}}", "make a tensor of more than"),
        ("figures: {figure1: {axes: {learning_rate: [1.7976931348623157e+308]}}}", "learning_rate is 1.79"),
        (
            f"figures: {{figure1: {{axes: {{seed: {list(range(2000))}}}}}}}",
            "`figures.attribution.axes` has the most of",
        ),
        ("parametrizations: {mup: {router: [1, fan_in^17, 1, 1]}}", "`parametrizations.mup.router` has a power"),
    ],
    ids=lambda value: value[:60],
)
def test_values_that_would_overflow_later_are_refused_at_once(change, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        validate(overlay(DOCUMENT, yaml.safe_load(change)))
    assert sentences(error.value).startswith("`")


# ---------------------------------------------------------------- files


known = st.dictionaries(st.sampled_from(KEYS), scalars | st.lists(scalars, max_size=3), max_size=3)
overlays = st.dictionaries(
    st.sampled_from(sorted(DOCUMENT)) | keys,
    st.one_of(small_values, st.dictionaries(st.sampled_from(KEYS), known | small_values, max_size=3)),
    max_size=3,
)
snippets = st.lists(
    st.sampled_from(
        ["figures", "setups", ": ", "\n", "\n  ", "- ", "{", "}", "[", "]", ", ", "&a ", "*a ", "<<: ", "? ", "! "]
    )
    | st.sampled_from(
        ["!!python/name:os.system ", "!!set ", "!!int ", "!!timestamp ", "!!binary ", "!!omap ", "--- ", "... "]
    )
    | st.sampled_from(
        ["%YAML 1.1", "| ", "> ", '"', "'", "#", "\t", "1", "2020-99-99", "0x", "1:99", ".nan", "~", "\ufeff", "a"]
    ),
    max_size=25,
).map("".join)


def refusal_of_file(text: bytes) -> str | None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(text)
        file.flush()
        try:
            document = read_document(Path(file.name))
        except ConfigError as error:
            return sentences(error)
        return refusal(overlay(DOCUMENT, document))


@cases(400)
@given(overlays)
def test_a_file_overlaid_on_the_config_runs_or_is_refused(document):
    try:
        text = yaml.dump(document, Dumper=yaml.Dumper, allow_unicode=False)
    except (ValueError, RecursionError, yaml.YAMLError, UnicodeError):
        assume(False)
    refusal_of_file(text.encode("utf-8", "surrogatepass"))


@cases(400)
@given(snippets.map(str.encode) | st.binary(max_size=20))
def test_any_text_is_a_config_or_refused(text):
    refusal_of_file(text)


LAUGHS = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in itertools.pairwise("abcdefghij")
)
FILES = {
    "empty": (b"", "must hold a mapping"),
    "a list": (b"[1, 2]", "must hold a mapping"),
    "text": (b"hello", "must hold a mapping"),
    "not UTF-8": (b"preset: d\xe9faut", "cannot be read as YAML: it is not UTF-8, so save it in that encoding"),
    "UTF-16": ("preset: default".encode("utf-16"), "it is not UTF-8, so save it in that encoding"),
    "two documents": (b"a: 1\n---\nb: 2\n", "cannot be read as YAML"),
    "a key twice": (b"setups: {}\nanalysis: {}\nsetups: {}\n", "the key 'setups' appears twice"),
    "a key twice, inside": (b"setups: {small: {corpus: a, corpus: b}}", "the key 'corpus' appears twice"),
    "a billion laughs": (LAUGHS.encode(), "more than 2,000,000 characters"),
    "a billion merges": (MERGES.encode(), "merges too many keys"),
    "itself": (b"setups: &s {small: *s}", "`setups`"),
    "deep": (b"a: " + b"[" * 5000, "cannot be read as YAML"),
    "levels": (b"a: " + b"[" * 50 + b"]" * 50, "`a` has more than 20 levels"),
    "a Python call": (b"preset: !!python/object/apply:os.system [touch pwned]", "cannot be read as YAML"),
    "a Python name": (b"preset: !!python/name:os.system", "cannot be read as YAML"),
    "a date": (b"preset: 2020-01-01", "`preset` is read as a date"),
    "no date": (b"preset: 2020-99-99", "cannot be read as YAML"),
    "bytes": (b"preset: !!binary aGVsbG8=", "`preset` is read as a bytes"),
    "a set": (b"corpora: {python: {files: !!set {a, b}}}", "`corpora.python.files` is read as a set"),
    "a number as key": (b"figures: {figure1: {1: 2}}", "`figures.figure1` has the key 1, which is read as a int"),
    "null as key": (b"figures: {~: {}}", "`figures` has the key None"),
    "a list as key": (b"figures: {? [a, b] : {}}", "cannot be read as YAML"),
    "yes as key": (b"yes: 1", "the config has the key True"),
    "a newline in a key": (b'figures: {"a\\nb": {}}', "which is longer than 100 characters or not printable"),
    "half a surrogate": (b'preset: "\\ud800"', "`preset` is"),
    "no integer": (b'preset: !!int ""', "cannot be read as YAML"),
    "a long integer": (b"analysis: {resamples: 0x" + b"f" * 5000 + b"}", "`analysis.resamples` is an integer"),
    "a merge": (b"execution: &e {threads: 2}\nsetups: {small: {training: {<<: *e, steps: 40}}}", "`threads`|`setups"),
    "NUL": (b"a: \x00", "cannot be read as YAML"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_a_config_is_refused_in_one_sentence(name, tmp_path, monkeypatch):
    text, expected = FILES[name]
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=expected) as error:
        validate(overlay(DOCUMENT, read_document(path)))
    assert "\n" not in sentences(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


def test_only_existing_presets_are_accepted():
    for name in [*HOSTILE_TEXTS, None, 3, ["gpu"], {"gpu": 1}, *HUGE.values()]:
        with pytest.raises(ConfigError, match=r"`preset` is .* but must be one of default, ") as error:
            read_preset(ROOT / "presets", name)
        assert sentences(error.value)


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("mine.yaml", b"", "Config file must be given as JSON or YAML with keys at top level."),
        ("mine.yaml", b"- a list", "Config file must be given as JSON or YAML with keys at top level."),
        (
            "mine.yaml",
            b"preset: !!python/object/apply:os.system [touch pwned]",
            "Config file is not valid JSON or YAML",
        ),
        ("mine.yaml", b"preset: !!python/name:os.system", "mine.yaml cannot be read as YAML: line 1"),
        ("mine.yaml", LAUGHS.encode(), "mine.yaml: `j` holds more than 2,000,000 characters"),
        (
            "mine.yaml",
            b"setups: {}\nsetups: {}",
            "mine.yaml cannot be read as YAML: line 2, column 1: the key 'setups'",
        ),
        ("config.yaml", b"preset: d\xe9faut", "config.yaml cannot be read as YAML: it is not UTF-8"),
        (
            "config.yaml",
            b"__use_yte__: true\nx: ?__import__('os').system('touch pwned')",
            "config.yaml has `__use_yte__`",
        ),
    ],
)
def test_snakemake_reports_a_bad_config_in_a_sentence_and_executes_nothing(name, text, expected, tmp_path):
    project = copy_project(tmp_path / "project")
    (project / name).write_bytes(text)
    options = () if name == "config.yaml" else ("--configfile", name)
    done = snakemake(project, "results/table1.csv", "--cores", "1", "--dry-run", *options)
    assert done.returncode == 1
    assert expected in done.stdout
    assert "Traceback" not in done.stdout
    assert not (project / "pwned").exists()
