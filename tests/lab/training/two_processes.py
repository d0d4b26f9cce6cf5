"""Programs in several processes, forked from this one: importing JAX takes seconds.

Each line of standard input is a list of processes in JSON: of each the arguments of `main`,
its environment, and the file for its standard error. The answer is the list of their exit
codes. A fork ends as a program does, handlers of `atexit` included.
"""

import functools
import json
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bn_jax.errors import UserError
from bn_jax.lab.models import MLP
from bn_jax.lab.training import distributed
from bn_jax.lab.training.step import init_state, train_step
from bn_jax.linen import BatchNorm

LIMIT = 100  # seconds, for what hangs
HEARTBEAT = 5  # seconds
STEPS, BATCH, WIDTH, CLASSES = 5, 16, 6, 4
RNG = np.random.default_rng(0)
# Neighbours are not alike: the statistics of a part are not those of the batch.
INPUTS = RNG.normal(np.arange(BATCH)[:, None], size=(STEPS, BATCH, WIDTH)).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, (STEPS, BATCH))
SGD = optax.sgd(0.1)


def sgd_over(axis):
    """`SGD` on the mean gradient."""

    def update(gradients, *args):
        return SGD.update(lax.pmean(gradients, axis), *args)

    return optax.GradientTransformation(SGD.init, update)


def network(axis=None):
    return MLP((8,), CLASSES, norm=functools.partial(BatchNorm, axis_name=axis))


def steps(devices):
    """By its name each step of (state, inputs, labels) over all these devices, and the mesh."""
    mesh = jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)

    def per_device(*args):
        state, means = train_step(*args, network("batch"), sgd_over("batch"))
        return state, lax.pmean(means, "batch")

    def joined(*args):
        return train_step(*args, network(), SGD)

    mapped = jax.shard_map(
        per_device, mesh=mesh, in_specs=(P(), P("batch"), P("batch")), out_specs=P(),
        check_vma=False,
    )  # fmt: skip
    whole = NamedSharding(mesh, P())
    return mesh, {"shard_map": jax.jit(mapped), "jit": jax.jit(joined, out_shardings=whole)}


def train(devices):
    """Parameters, statistics and losses after some steps, by the name of the step."""
    mesh, by_name = steps(devices)
    share = BATCH // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)

    def over(spec, value):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_process_local_data(sharding, np.asarray(value))

    results = {}
    start = init_state(jax.random.key(0), network(), SGD, jnp.asarray(INPUTS[0]))
    for name, step in by_name.items():
        state, losses = jax.tree.map(functools.partial(over, P()), start), []
        for x, y in zip(INPUTS, LABELS, strict=True):
            state, means = step(state, over(P("batch"), x[mine]), over(P("batch"), y[mine]))
            losses.append(means.loss)
        results[name] = distributed.everyone([state.params, state.batch_stats, losses])
    parts = over(P("batch"), INPUTS[0][mine])
    return {**results, "inputs": distributed.everyone(parts)}


def flat(results):
    leaves = jax.tree_util.tree_leaves_with_path(results)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def train_and_save(file):
    np.savez(f"{file}.{jax.process_index()}.npz", **flat(train(jax.devices())))
    if not distributed.is_main():
        time.sleep(1)  # the others are to wait for it


def lose(what, process):
    """One process ends in the way of its word; the other computes, or waits for it."""
    distributed.barrier("all are there")
    match what.split(",")[process]:
        case "kill":
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        case "user":
            distributed.shutdown(2)
        case "fail":
            raise RuntimeError("a fault")
        case "wait":
            distributed.barrier("one is missing")
    while True:
        np.ones((200, 200)) @ np.ones((200, 200))


def main(what, file, coordinator=None, number=None, process=None):
    """Without coordinator, number of processes and process the environment says them."""
    if what == "late":
        jax.devices()
    try:
        distributed.initialize(coordinator, number, process, timeout=60, heartbeat=HEARTBEAT)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    if what == "train":
        train_and_save(file)
    else:
        lose(what, process)
    distributed.shutdown()


def forked(arguments, environment, errors):
    """The number of a new process."""
    if pid := os.fork():
        return pid
    signal.alarm(LIMIT)
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(2, 1)
    main(*arguments)
    return sys.exit()


if __name__ == "__main__":
    for line in sys.stdin:
        processes = [forked(*process) for process in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in processes]
        print(json.dumps(codes), flush=True)
