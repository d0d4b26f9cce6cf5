"""Command lines in the docstring of an experiment, as the flags that they give."""

import re
import shlex

from absl import flags as absl_flags

from experiments import flags

COMMAND = re.compile(r"^    (python -m (?:.*\\\n)*.*)$", re.M)


def commands(module):
    """A `Config` of the module for each of them, in order."""
    texts = (text.replace("\\\n", "") for text in COMMAND.findall(module.__doc__))
    return [_parsed(module.Config, shlex.split(text)) for text in texts]


def _parsed(config, words):
    values = absl_flags.FlagValues()
    flags.define(config, values)
    assert values(words[2:])[1:] == []  # nothing but flags
    return flags.given(config, values)
