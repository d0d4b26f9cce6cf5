"""A model by its name, with the variables of a checkpoint: what the tools for models share."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from bn_jax.errors import UserError
from bn_jax.lab.fields import Flags, flag

NO_ARRAY = "is not an array that numpy.save wrote"


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """The flags of every tool."""

    model: str = flag(
        "", "package.module:name of a Linen or NNX model, or of a function that returns one"
    )
    checkpoint: str = flag("", "folder of an Orbax checkpoint with params and batch_stats")
    inputs: str = flag("", "file.npy of model inputs, as training has them: [n, ...]")
    train: str = flag("train=True", "what the call says in training, such as a=1,b=False")
    evaluate: str = flag("train=False", "what the call says at inference")

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        super().check()
        for name in ("model", "checkpoint", "inputs"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing: see --help")
        for name in ("train", "evaluate"):
            keywords(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class WritingConfig(Config):
    """Of a tool that leaves a checkpoint."""

    out: str = flag("", "folder for the new checkpoint; it must not be there yet")

    def check(self) -> None:
        """Raises a UserError for a flag that makes no sense."""
        super().check()
        folder = Path(self.out).expanduser().absolute()
        if not self.out or os.path.lexists(folder):
            raise UserError(f"--out={self.out}: name a folder that is not there yet")
        above = next(p for p in folder.parents if os.path.lexists(p))
        try:
            tempfile.TemporaryFile(dir=above).close()
        except OSError as e:
            raise UserError(f"--out={self.out}: {above} cannot be written: {e}") from e


def keywords(name: str, text: str) -> dict[str, Any]:
    """ "train=True,temperature=.5" as keywords of a call."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("not keywords")
        given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        if None in given:
            raise ValueError("not keywords")
        return {name: value for name, value in given.items() if name}
    except (SyntaxError, ValueError, AttributeError) as e:
        raise UserError(f"--{name}={text}: write keywords, as in train=True") from e


def load(config: Config) -> tuple[Any, Any, Any]:
    """Model, variables (as `bn_jax.surgery` takes them) and inputs.

    Raises:
      UserError: one of them is not there, or does not fit.
    """
    from flax import nnx

    model, restored = _model(config.model), _restore(config.checkpoint)
    if not isinstance(model, nnx.Module):
        return model, _linen_variables(restored, config.checkpoint), _inputs(config.inputs)
    graphdef, state = nnx.split(model)
    try:
        nnx.replace_by_pure_dict(state, nnx.restore_int_paths(restored))
    except (KeyError, ValueError) as e:
        raise UserError(
            f"--checkpoint={config.checkpoint} is not of {config.model}: {e}"
        ) from e
    return graphdef, state, _inputs(config.inputs)


def save(path: str, variables: Any) -> None:
    """The variables as an Orbax checkpoint."""
    from flax import nnx
    from orbax.checkpoint import StandardCheckpointer

    if isinstance(variables, nnx.State):
        variables = nnx.to_pure_dict(variables)
    folder = Path(path).expanduser().absolute()
    if folder.exists():  # since this program began
        raise UserError(f"--out={path}: another program has made it, name another folder")
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, variables)


def _model(spec):
    import flax.linen as nn
    from flax import nnx

    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"--model={spec}: {e}") from e
    kinds = nn.Module | nnx.Module
    try:
        found = found if isinstance(found, kinds) else found()
    except TypeError as e:
        raise UserError(f"--model={spec} is called without arguments: {e}") from e
    if not isinstance(found, kinds):
        raise UserError(f"--model={spec} is a {type(found).__name__}, not a Linen or NNX model")
    return found


def _restore(path):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from orbax.checkpoint import PyTreeCheckpointer, RestoreArgs

    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"--checkpoint={path}: there is no such folder")
    try:
        with PyTreeCheckpointer() as checkpointer:
            # As NumPy arrays: it may have been sharded over devices that are not here.
            tree = checkpointer.metadata(folder).item_metadata.tree
            plain = jax.tree.map(lambda _: RestoreArgs(restore_type=np.ndarray), tree)
            restored = checkpointer.restore(folder, restore_args=plain)
    except (AttributeError, OSError, ValueError) as e:
        raise UserError(f"--checkpoint={path}: no Orbax checkpoint of a tree") from e
    return jax.tree.map(jnp.asarray, restored)


def _linen_variables(restored, path):
    if "params" not in restored:
        names = ", ".join(restored)
        raise UserError(f"--checkpoint={path} has no params at its top: there are {names}")
    return {name: restored[name] for name in ("params", "batch_stats") if name in restored}


def _inputs(path):
    import jax.numpy as jnp
    import numpy as np

    try:
        found = np.load(Path(path).expanduser(), allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as e:
        reason = "is not there" if isinstance(e, FileNotFoundError) else NO_ARRAY
        raise UserError(f"--inputs={path} {reason}") from e
    if not isinstance(found, np.ndarray):
        names = ", ".join(found.files)
        found.close()
        raise UserError(f"--inputs={path} has several arrays ({names}): save one as .npy")
    if found.dtype.kind not in "biuf":
        raise UserError(f"--inputs={path} is of {found.dtype}: save numbers, as float32")
    if not found.ndim or not found.size:
        raise UserError(
            f"--inputs={path} has shape {found.shape}: [n, ...] is needed, with n of at least 1"
        )
    return jnp.asarray(found)
