"""Settings that must precede JAX's start, and fixtures that several tests share."""

import os

_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Not in the folder of whoever runs the tests.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import AxisType  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

# (C,) against (N, C) is refused: of two axes of one size the wrong one would broadcast.
jax.config.update("jax_numpy_rank_promotion", "raise")


# Most of the time of these is compilation, of which a third goes into making fast what runs
# once. The formulas, layers and transformations are tested as they are compiled for users.
HASTY = {
    "benchmarks", "data", "experiments", "lab", "models", "statistics", "surgery", "sweeps",
    "training",
    "test_recipes",
}  # fmt: skip


# Many cases of what changes seldom, half an hour in all. `pytest -m long` runs these alone,
# `pytest -m ""` all; .ci/run a fifth of them, another one every day.
LONG = {
    "test_airbench", "test_cifar", "test_convolution", "test_dense", "test_eager",
    "test_early_stopping", "test_inception", "test_lstm", "test_masks", "test_resnet",
    "test_accumulate", "test_convert_beside", "test_convert_keras",
    "test_diagnose_lifted", "test_overflow",
    "test_convert_layers", "test_convert_torch", "test_diagnose_models",
    "test_diagnose_statistics", "test_diagnose_training", "test_flow", "test_fold",
    "test_foreign", "test_notebooks", "test_transformations",
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--part", help="i/n: every n-th of the tests, from the i-th on")


def pytest_configure(config):
    if not config.option.markexpr.startswith("not"):
        os.environ["ALL_EXAMPLES"] = ""  # of properties: see `strategies.holds`


def pytest_collection_modifyitems(config, items):
    for item in items:
        every = "ALL_EXAMPLES" in os.environ and hasattr(item.function, "tried")
        if item.path.stem in LONG or every:
            item.add_marker("long")
    if config.option.part:
        first, of = map(int, config.option.part.split("/"))
        chosen = [i for i in items if i.get_closest_marker("long")][first::of]
        dropped = [i for i in items if i not in set(chosen)]
        config.hook.pytest_deselected(items=dropped)
        items[:] = chosen


@pytest.fixture(autouse=True, scope="module")
def compilation(request):
    hasty = bool(HASTY & {request.path.parent.name, request.path.stem})
    jax.config.update("jax_disable_most_optimizations", hasty)


@pytest.fixture(autouse=True, scope="session")
def one_device_unless_told():
    """The fake devices share two cores: what is not about them uses one."""
    from bn_jax.lab.sweeps import layouts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "automatic", lambda *sizes: "single")
        yield


@pytest.fixture(autouse=True, scope="session")
def arrays_of_digits(tmp_path_factory):
    """Kept for the session, and not in the cache of whoever runs the tests."""
    from bn_jax.lab.data import dataset

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "default_cache_dir", lambda: folder)
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def make_mesh():
    """`make_mesh(batch=4)`: a mesh of fake devices with axes of these sizes, for shard_map."""

    def make(**sizes):
        shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
        return jax.make_mesh(shape, tuple(sizes), axis_types=types)

    return make


@pytest.fixture(params=["pmap", "vmap", "shard_map", "shard_map check_vma=False"])
def replicate(request, make_mesh):
    """`replicate(f)(*arrays)` maps f over each array's first axis, "batch", in four ways."""
    if request.param in ("pmap", "vmap"):
        mapped = getattr(jax, request.param)
        return lambda f: mapped(f, axis_name="batch")

    def over_shards(f):
        def one(*shards):
            outputs = f(*(shard[0] for shard in shards))
            return jax.tree.map(lambda v: v[None], outputs)

        def run(*arrays):
            return jax.shard_map(
                one,
                mesh=make_mesh(batch=len(arrays[0])),
                in_specs=P("batch"),
                out_specs=P("batch"),
                check_vma=request.param == "shard_map",
            )(*arrays)

        return jax.jit(run)

    return over_shards


def pytest_runtest_teardown(item):
    """Reports how many examples a property was tried on (`strategies.holds`)."""
    tried = getattr(getattr(item, "function", None), "tried", {})
    if tried:
        item.user_properties.append(("examples", tried.pop("examples")))


def pytest_terminal_summary(terminalreporter):
    """The sum over the tests, of all workers."""
    reports = (r for r in terminalreporter.getreports("") if r.when == "teardown")
    tried = [n for r in reports for name, n in r.user_properties if name == "examples"]
    if tried:
        terminalreporter.write_line(f"{len(tried)} properties tried on {sum(tried):,} examples")
