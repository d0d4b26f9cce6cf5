"""Flags from a dataclass: every type of field, and errors that fit in one line."""

import dataclasses
import functools
import shlex

import pytest
from absl import flags as absl_flags

from bn_jax.errors import UserError
from bn_jax.lab import comparison, flags, workdir
from bn_jax.lab.fields import fixed, flag
from experiments import circles


@dataclasses.dataclass(frozen=True)
class Config:
    """One field of every type."""

    word: str = flag("digits", "a word")
    count: int = flag(3, "a count")
    share: float = flag(0.25, "a share")
    switch: bool = flag(False, "a switch")
    words: tuple[str, ...] = flag(("a", "b"), "some words")
    counts: tuple[int, ...] = flag((1, 2), "some counts")
    shares: tuple[float, ...] = flag((0.03, 1.0), "some shares")
    maybe_word: str | None = flag(None, "a word or none")
    maybe_count: int | None = flag(None, "a count or none")
    maybe_share: float | None = flag(None, "a share or none")
    maybe_counts: tuple[int, ...] | None = flag(None, "some counts or none")


def parse(*arguments, config=Config):
    values = absl_flags.FlagValues()
    flags.define(config, values)
    values(["program", *arguments])
    return flags.given(config, values)


def test_defaults_are_those_of_the_dataclass():
    assert parse() == Config()
    assert parse(config=comparison.Config) == comparison.Config()


@pytest.mark.parametrize(
    "argument",
    [
        "--count=x", "--count=1.5", "--count=", "--share=x", "--share=", "--switch=maybe",
        "--counts=1,x", "--counts=1.5", "--shares=0.1;1", "--maybe_count=None",
        "--maybe_share=x", "--maybe_counts=a",
    ],
)  # fmt: skip
def test_wrong_values_are_refused_with_flag_and_value(argument):
    with pytest.raises(absl_flags.IllegalFlagValueError, match="flag --") as error:
        parse(argument)
    name, value = argument.split("=")
    assert name in str(error.value)
    assert value.split(",")[-1] in str(error.value)


@pytest.mark.parametrize("argument", ["--unknown=1", "--unknown", "--nocount"])
def test_unknown_flags_are_refused(argument):
    with pytest.raises(absl_flags.UnrecognizedFlagError, match=r"unknown|nocount"):
        parse(argument)


CHANGED = Config(
    "it's a \"word\" with = and --", -1, 1e-300, True, ("x",), (0, -3), (1e22, 0.1, 1 / 3),
    "", 0, 0.0, (),
)  # fmt: skip


@pytest.mark.parametrize("config", [Config(), CHANGED], ids=["defaults", "changed"])
def test_round_trip_through_a_flagfile(config, tmp_path):
    values = absl_flags.FlagValues()
    flags.define(Config, values)
    values(["program"])
    for field in dataclasses.fields(Config):
        values[field.name].value = getattr(config, field.name)
    values.append_flags_into_file(str(tmp_path / "flagfile"))
    assert parse(f"--flagfile={tmp_path / 'flagfile'}") == config


@pytest.mark.parametrize("config", [Config(), CHANGED], ids=["defaults", "changed"])
def test_round_trip_through_the_command(config):
    python, option, module, *arguments = shlex.split(workdir.command(config, "compare"))
    assert (python, option, module) == ("python", "-m", "experiments.compare")
    assert parse(*arguments) == config


def test_the_command_names_only_what_was_changed():
    assert workdir.command(Config(), "compare") == "python -m experiments.compare"
    assert workdir.command(Config(count=4), "x") == "python -m experiments.x --count=4"
    config = comparison.Config(workdir="there", overwrite=True)
    assert workdir.command(config, "compare") == "python -m experiments.compare"


def test_the_command_leaves_out_what_follows_from_another_flag():
    config = circles.Config(quick=True, batch_size=16)
    command = workdir.command(config, "circles")
    assert set(command.split()[3:]) == {"--quick=True", "--batch_size=16"}
    assert parse(*command.split()[3:], config=circles.Config) == config


def test_one_value_is_a_list_of_one():
    config = comparison.Config(learning_rates=0.1, arms="bn", features=[8, 4])
    assert (config.learning_rates, config.arms, config.features) == ((0.1,), ("bn",), (8, 4))


@dataclasses.dataclass(frozen=True)
class Narrow(comparison.Config):
    """Another default, and a value that is fixed."""

    momentums: tuple[float, ...] = flag((0.5,))
    l2: float = fixed(0.1)


def test_a_subclass_keeps_what_is_allowed_and_arms_change_what_is_fixed():
    with pytest.raises(UserError, match=r"--momentums=1.0: it must be at least 0 and below 1"):
        Narrow(momentums=1.0)
    with pytest.raises(absl_flags.UnrecognizedFlagError, match="l2"):
        parse("--l2=1", config=Narrow)
    config = Narrow()
    changed = config.changed({"l2": 0.3, "steps": 40})
    assert (changed.l2, changed.steps, config.l2, config.steps) == (0.3, 40, 0.1, 1500)
    with pytest.raises(UserError, match="--eval_every=20 does not divide --steps=30"):
        config.changed({"steps": 30})


PROGRAM = """
import dataclasses
from absl import logging
from bn_jax.errors import UserError
from bn_jax.lab import flags
from bn_jax.lab.fields import Flags, flag

@dataclasses.dataclass(frozen=True)
class Config(Flags):
    do: str = flag("", "what to do")
    count: int = flag(1, "how often", at_least=1)

def run(config):
    exec(config.do)

flags.main(Config, run)
"""


@pytest.fixture
def program(server):
    """`program(*argv)` runs PROGRAM."""
    return functools.partial(server.run, code=PROGRAM)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--count=x", "flag --count=x: invalid literal"),
        ("--count=0", "--count=0: it must be at least 1"),
        ("--unknown=1", "Unknown command line flag 'unknown'"),
        ("--count", "Missing value for flag --count"),
        ("more", "unexpected argument 'more': options look like --name=value"),
        ("--flagfile=no/such/file", "no/such/file"),
    ],
)
def test_wrong_arguments_end_in_one_line(program, argument, words):
    finished = program(argument)
    assert words in finished.error()
    assert finished.out == ""


@pytest.mark.parametrize(
    ("do", "words"),
    [
        ("raise UserError('first\\n  second')", "first second"),
        ("open('no/such/file')", "no/such/file: No such file or directory"),
        ("raise OSError(28, 'No space left on device')", "No space left on device"),
        ("raise OSError('25600 requested and 16256 written')", "25600 requested"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_line(program, do, words):
    assert words in program(f"--do={do}").error()


def test_an_interruption_ends_in_one_line(program):
    assert "interrupted" in program("--do=raise KeyboardInterrupt").error(code=130)


def test_a_fault_of_the_program_has_a_traceback(program):
    finished = program("--do=raise ValueError('a fault')")
    assert finished.code == 1
    assert finished.err.startswith("Traceback")
    assert finished.err.endswith("ValueError: a fault\n")


def test_remarks_are_shown_when_asked_for(program):
    assert "a remark" in program("--do=logging.info('a remark')", "--verbosity=0").err
