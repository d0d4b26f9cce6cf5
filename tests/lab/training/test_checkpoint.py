import errno
import os
import random
import resource
import shutil
import signal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from stress.kill_saves import kills

from bn_jax.errors import UserError
from bn_jax.lab.training import checkpoint
from bn_jax.lab.training.checkpoint import Checkpoints
from bn_jax.lab.training.signals import on_sigterm

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool", "float8_e4m3fn", "int4")
NUMPY_ONLY = ("float64", "int64", "complex128")


class Pair(NamedTuple):
    first: object
    second: object


@pytest.fixture
def open_checkpoints(tmp_path):
    """`open_checkpoints()`: those in one folder."""
    opened = []

    def make():
        opened.append(Checkpoints(tmp_path / "steps"))
        return opened[-1]

    yield make
    for checkpoints in opened:
        checkpoints.close()


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if isinstance(b, jax.Array):
            assert (a.committed, a.sharding) == (b.committed, b.sharding)
        assert as_bytes(a) == as_bytes(b)


def as_bytes(array):
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array).tobytes()


@st.composite
def leaves(draw):
    """Arrays of any bits: NaNs of any payload, zeros of both signs."""
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    if draw(st.integers(0, 5)) == 0:
        impl = draw(st.sampled_from(("threefry2x32", "rbg")))
        return jax.random.split(jax.random.key(draw(st.integers(0, 99)), impl=impl), shape)
    on_device = draw(st.booleans())
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES if on_device else DTYPES + NUMPY_ONLY)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    if dtype in ("bool", "int4"):
        array = rng.integers(0, 2, shape).astype(dtype)
    else:
        count = int(np.prod(shape)) * dtype.itemsize
        array = np.frombuffer(rng.bytes(count), dtype).reshape(shape).copy()
    return jnp.asarray(array) if on_device else array


names = st.sampled_from(["a", "b", "a.b", "a/b", "", "%2E", "~", "é 'x'"])
states = st.recursive(
    leaves(),
    lambda s: st.one_of(
        st.dictionaries(names, s, max_size=3),
        st.lists(s, max_size=2),
        st.builds(Pair, s, st.none() | s),
        st.tuples(s),
    ),
    max_leaves=6,
)


NUMBERS = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.none()


@settings(max_examples=30, deadline=None)
@given(state=states, extra=st.dictionaries(st.text(), NUMBERS))
def test_a_state_comes_back_bit_by_bit(tmp_path_factory, state, extra):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("any"))
    state = {"one": np.arange(1), "rest": state}
    checkpoints.save(3, state, extra)
    step, restored, beside = checkpoints.restore(state)
    checkpoints.close()
    assert (step, beside) == (3, extra)
    assert_same(restored, state)


def training_state(step=0):
    params = {"Dense_0": {"kernel": jnp.full((3, 4), 1.5 + step), "bias": jnp.zeros(4)}}
    optimizer = optax.chain(
        optax.clip(1.0), optax.adam(0.1), optax.masked(optax.sgd(0.1), False)
    )
    return Pair(
        {
            "params": params,
            "empty": {},
            "a.b": step + jnp.ones(1),
            "key": jax.random.key(step),
        },
        optimizer.init(params),
    )


def test_a_training_state_comes_back_from_its_shapes(open_checkpoints):
    checkpoints, state = open_checkpoints(), training_state()
    checkpoints.save(0, state, {})
    assert_same(checkpoints.restore(jax.eval_shape(training_state)).state, state)


def test_arrays_come_back_on_the_devices_that_are_asked_for(open_checkpoints, make_mesh):
    mesh = make_mesh(batch=4)
    split, whole = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
    state = {"x": jnp.arange(8.0), "keys": jax.random.split(jax.random.key(0), 4)}
    state = jax.device_put(state, {"x": split, "keys": split}) | {"one": np.arange(3)}
    checkpoints = open_checkpoints()
    checkpoints.save(1, state, {})
    assert_same(checkpoints.restore(state).state, state)
    like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=whole) for k, v in state.items()}
    restored = checkpoints.restore(like).state
    assert all(v.sharding.is_equivalent_to(whole, v.ndim) for v in restored.values())
    assert as_bytes(restored["keys"]) == as_bytes(state["keys"])


def test_the_state_may_be_donated_and_the_rest_changed_after_a_save(open_checkpoints):
    checkpoints = open_checkpoints()
    advance = jax.jit(lambda v: 2 * v + 1, donate_argnums=0)
    state, numbers, extra = jnp.arange(1_000_000), np.arange(1_000_000), {"records": [1]}
    wanted = [np.arange(1_000_000, dtype=np.int32), numbers.copy()]
    checkpoints.save(1, [state, numbers], extra)
    numbers[:] = 0
    extra["records"].append(2)
    for _ in range(3):
        state = advance(state)
    found = checkpoints.restore([state, numbers])
    np.testing.assert_array_equal(found.state, wanted)
    assert found.extra == {"records": [1]}


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"a": jnp.zeros(3)}, "no more"),
        ({"a": jnp.zeros(2), "b": jnp.zeros(3)}, r"\['a'\] float32\[3\] where .* float32\[2\]"),
        ({"a": jnp.zeros(3), "b": jnp.zeros(3, jnp.int32)}, r"\['b'\] int32"),
    ],
)
def test_another_state_is_refused(open_checkpoints, like, words):
    checkpoints = open_checkpoints()
    checkpoints.save(1, {"a": jnp.zeros(3), "b": jnp.zeros(3)}, {})
    with pytest.raises(UserError, match=words):
        checkpoints.restore(like)


def steps_in(folder):
    return sorted(int(p.name) for p in folder.iterdir())


def test_the_last_two_stay_even_after_a_restart(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    for step in range(5):
        if step == 3:
            checkpoints.close()
            checkpoints = open_checkpoints()
            assert checkpoints.restore().step == 2
        checkpoints.save(step, small(step), {})
    checkpoints.save(4, small(9), {})  # it is there
    assert_same(checkpoints.restore(small(0)).state, small(4))
    assert steps_in(tmp_path / "steps") == [3, 4]


def test_what_a_kill_left_unfinished_is_removed(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    checkpoints.save(1, {"x": jnp.zeros(2)}, {})
    checkpoints.close()
    left = tmp_path / "steps" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "steps" / "1", left)
    again = open_checkpoints()
    assert again.restore({"x": jnp.zeros(2)}).step == 1
    assert not left.exists()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, small(step), {"step": step})
    checkpoints.close()
    return folder


def small(step):
    rng = np.random.default_rng(step)
    return {"x": rng.normal(size=200), "key": jax.random.key(step)}


def damages(content, rng):
    """What may have become of a file; None is that it has gone."""
    yield from (None, b"", content[: len(content) // 2], content[:-1])
    place = rng.randrange(len(content))
    flipped = content[place] ^ (1 << rng.randrange(8))
    yield content[:place] + bytes([flipped]) + content[place + 1 :]
    yield bytes(len(content))


def test_no_damage_to_any_file_restores_a_wrong_state(two_steps, tmp_path, capsys):
    files = [p.relative_to(two_steps) for p in (two_steps / "2").rglob("*") if p.is_file()]
    rng, went_back = random.Random(0), set()
    for file in files:
        content = (two_steps / file).read_bytes()
        for i, damaged in enumerate(damages(content, rng)):
            folder = tmp_path / f"{i}"
            shutil.copytree(two_steps, folder)
            (folder / file).unlink()
            if damaged is not None:
                (folder / file).write_bytes(damaged)
            checkpoints = Checkpoints(folder)
            step, state, extra = checkpoints.restore(small(0))
            assert_same(state, small(step))
            assert extra == {"step": step}
            if not damaged:
                checkpoints.save(3, state, extra)
                checkpoints.wait()
                assert steps_in(folder) == [step, 3]
            checkpoints.close()
            said = capsys.readouterr().err
            if step == 1:
                (line,) = said.splitlines()
                name = file.relative_to("2").as_posix()
                # Of damaged checksums another file may be named.
                assert line.startswith("checkpoint of step 2 is damaged, ")
                assert name in line or name == checkpoint.CHECKSUMS
                went_back.add(name)
            shutil.rmtree(folder)
    names = {file.relative_to("2").as_posix() for file in files}
    harmless = {name for name in names if name.endswith(checkpoint.UNCHECKED)}
    assert went_back == names - harmless


def test_where_no_checkpoint_is_whole_it_says_so_and_touches_none(two_steps, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(two_steps, folder)
    for step in ("1", "2"):
        (folder / step / checkpoint.EXTRA).write_bytes(b"")
    checkpoints = Checkpoints(folder)
    with pytest.raises(
        UserError, match=r"no checkpoint in .*copy is whole: put a copy back, or"
    ):
        checkpoints.restore(small(0))
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert steps_in(folder) == [1, 2]


@pytest.fixture
def no_file_above():
    """`no_file_above(bytes)`: writing more fails, as on a full disk; None takes that back."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        soft = before[0] if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

    yield limit
    limit(None)


def random_state(step):
    return {"x": np.random.default_rng(step).normal(size=100_000)}


def test_training_goes_on_when_the_disk_is_full(
    open_checkpoints, no_file_above, tmp_path, capsys
):
    checkpoints, reason = open_checkpoints(), os.strerror(errno.EFBIG)

    def said():
        return [
            line.replace(f" is not saved ({reason});", ":")
            for line in capsys.readouterr().err.splitlines()
        ]

    no_file_above(100_000)
    checkpoints.save(1, random_state(1), {})
    checkpoints.wait()
    assert said() == ["disk full: step 1: there is no checkpoint yet"]
    no_file_above(None)
    for step in (2, 3, 4):
        checkpoints.save(step, random_state(step), {"step": step})
    checkpoints.wait()
    no_file_above(100_000)
    checkpoints.save(5, random_state(5), {})
    checkpoints.save(6, random_state(6), {})
    checkpoints.wait()
    no_file_above(None)
    checkpoints.save(7, random_state(7), {"step": 7})
    checkpoints.wait()
    assert steps_in(tmp_path / "steps") == [4, 7]
    no_file_above(100_000)
    checkpoints.save(8, random_state(8), {})
    step, state, _ = checkpoints.restore(random_state(0))
    assert step == 7
    assert_same(state, random_state(7))
    assert said() == [
        f"disk full: step {step}: kept the checkpoint of step {kept}"
        for step, kept in ((5, 4), (6, 4), (8, 7))
    ]


def test_a_folder_that_cannot_be_made_on_a_full_disk_is_no_end_either(
    open_checkpoints, monkeypatch, capsys
):
    checkpoints = open_checkpoints()
    checkpoints.save(1, random_state(1), {})
    checkpoints.wait()

    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        checkpoints.save(2, random_state(2), {})
        checkpoints.wait()
    assert capsys.readouterr().err.startswith("disk full: step 2 is not saved")
    checkpoints.save(3, random_state(3), {})
    assert checkpoints.restore(random_state(0)).step == 3


def test_other_errors_end_the_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        Checkpoints(tmp_path / "file").save(1, {"x": jnp.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"two arrays of the state are named a\.b"):
        Checkpoints(tmp_path).save(1, {"a.b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, {})


def test_kills_leave_a_whole_checkpoint(tmp_path):
    outcomes = list(kills(tmp_path, 6, random.Random()))
    steps = [outcome.found for outcome in outcomes]
    assert steps == sorted(steps)


def test_the_first_sigterm_is_a_request_the_second_kills():
    before = signal.getsignal(signal.SIGTERM)
    with on_sigterm() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before
