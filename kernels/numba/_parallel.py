"""Tasks on torch's own threads: compile a function of a task, run it for every task.

Numba's own pools are a second set of threads beside torch's, and the one that is always there costs
57 to 105 us a launch and aborts under concurrent callers; torch's OpenMP pool costs 1.1 to 2.1
(2-core AMD Zen 5, 2026-11). So the loop over tasks is outlined here, in LLVM IR, and handed to it.
"""

import ctypes
import itertools
import os
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from pathlib import Path
from threading import Lock

import llvmlite.binding
import numba
import torch
from filelock import FileLock
from llvmlite import ir
from numba import types
from numba._dynfunc import make_function
from numba.core import cgutils
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.extending import intrinsic

from tilewise.recorder import recorder

# Everything but nnan and ninf: rows with inf or NaN must come out as the formula says.
FAST = frozenset({"reassoc", "nsz", "arcp", "contract"})

# A parallel region costs microseconds: below this many elements one thread is faster.
SERIAL_BELOW = 1 << 14

INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


# --- Compiled code is kept, outside site-packages, in a folder named by all that went into it.


@lru_cache
def _cache_folder() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    stamp = sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = os.environ.get("TILEWISE_CACHE") or Path(home) / "tilewise"
    return str(Path(root) / "numba" / f"{numba.__version__}-{stamp}")


class _Place(CompileResultCacheImpl):
    """No other folder will do: beside the sources Numba would take old code for theirs."""

    _locator_classes = [
        locator
        for locator in CompileResultCacheImpl._locator_classes
        if locator.__name__.strip("_") == "UserProvidedCacheLocator"
    ]


class _Cache(FunctionCache):
    """Numba's own index misses in every process where a function closes over another one; here the
    folder's name already stands for every source."""

    _impl_class = _Place

    def _index_key(self, signature, codegen):
        return signature, codegen.magic_tuple()

    def save_overload(self, signature, data):
        """Two processes at once would otherwise number two signatures' code the same."""
        with FileLock(Path(self._cache_path) / f"{self._impl.filename_base}.lock"):
            super().save_overload(signature, data)


_FLAGS = {"fastmath": set(FAST), "error_model": "numpy", "nogil": True}


class _Part(JITCodeLibrary):
    """Code that is only linked into other code: optimised there, and no machine code by itself.

    With machine code of its own ten ops took 31 s to compile, not 19. And a call of it that is not
    inlined is then bound to that, in the process that compiles, while what is kept for others is
    bound to another version, which may round otherwise.
    """

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True


class _PartCompiler(Compiler):
    def __init__(self, typing_context, target_context, library, *rest):
        library = _Part(target_context.codegen(), f"part{next(_NUMBERS)}")
        library.enable_object_caching()
        context = target_context.subtarget(get_executable=_nothing_to_execute)
        super().__init__(typing_context, context, library, *rest)


def _nothing_to_execute(library, description, environment):
    """What Numba knows a function by, with no address."""
    library._ensure_finalized()
    module, name = description.lookup_module(), description.qualname.rpartition(".")[2]
    return make_function(module, name, "", 0, environment, (library,))


_NUMBERS = itertools.count()


def callee(function):
    """`compiled` for what only other compiled functions call: it lives on in its callers."""
    return numba.njit(
        function, no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=_PartCompiler,
        **_FLAGS,
    )  # fmt: skip


def compiled(function):
    """`numba.njit` with the house's flags, releasing the GIL, kept between processes."""
    dispatcher = numba.njit(function, no_cfunc_wrapper=True, **_FLAGS)
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = _cache_folder()
    try:
        dispatcher._cache = _Cache(function)
    except (RuntimeError, OSError):  # nowhere to write: compile anew in every process
        pass
    finally:
        numba.config.CACHE_DIR = before
    return dispatcher


# --- The pool.


def _find_pool():
    """torch's own `GOMP_parallel`, or None where its wheel carries another runtime."""
    if os.environ.get("TILEWISE_POOL", "torch") != "torch":
        return None
    for library in Path(torch.__file__).parent.joinpath("lib").glob("libgomp*.so*"):
        parallel = getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
        if parallel is not None:
            return ctypes.cast(parallel, ctypes.c_void_p).value
    return None


@intrinsic
def _call(typing_context, function, data):
    """function(data), both addresses."""

    def emit(context, builder, signature, args):
        data = builder.inttoptr(args[1], INT8.as_pointer())
        builder.call(builder.inttoptr(args[0], WORK.as_pointer()), [data])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), emit


@lru_cache
def _numba_pool():
    """Numba's own threads behind the signature of `GOMP_parallel`; compiling it starts them."""

    @numba.njit(parallel=True, nogil=True)
    def spread(work, data, threads):
        for _ in numba.prange(threads):
            _call(work, data)

    @numba.cfunc(types.void(types.intp, types.intp, types.int32, types.int32))
    def parallel(work, data, threads, flags):
        spread(work, data, threads)

    return parallel


# Compiled code loads the pool's function from here, by name, so that it can be kept.
WORK = ir.FunctionType(ir.VoidType(), [INT8.as_pointer()])
PARALLEL = ir.FunctionType(ir.VoidType(), [WORK.as_pointer(), INT8.as_pointer(), INT32, INT32])
_POOL = ctypes.c_void_p(_find_pool())
_POOL_IS_TORCH = bool(_POOL)
llvmlite.binding.add_symbol("tilewise_pool", ctypes.addressof(_POOL))

# The threads of the pool do not survive a fork, and torch's runtime then waits for them for ever.
_FORKED = False


def _after_fork():
    global _FORKED
    _FORKED = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@intrinsic
def _for_each_task(typing_context, body, tasks, threads, args):
    """body(task, *args) for every task, by `threads` threads that take the next one when free."""
    signature = types.void(body, tasks, threads, args)
    compiled_body = body.dispatcher.get_compile_result(
        body.get_call_type(typing_context, (types.int64, *args.types), {})
    )

    def emit(context, builder, signature, arguments):
        _, tasks, threads, args = arguments
        context.add_linking_libs([compiled_body.library])
        # What every thread sees: the next task, how many there are, the arguments.
        state = ir.LiteralStructType([INT64, INT64, args.type])
        shared = cgutils.alloca_once(builder, state)
        for i, value in enumerate((ir.Constant(INT64, 0), tasks, args)):
            builder.store(value, cgutils.gep_inbounds(builder, shared, 0, i))

        work = ir.Function(builder.module, WORK, builder.module.get_unique_name("tilewise_work"))
        work.linkage = "internal"
        inner = ir.IRBuilder(work.append_basic_block("entry"))
        _emit_loop(context, inner, compiled_body, signature.args[3], state)

        data = builder.bitcast(shared, INT8.as_pointer())
        alone = builder.icmp_signed("<=", threads, ir.Constant(INT64, 1))
        with builder.if_else(alone) as (serial, parallel):
            with serial:
                builder.call(work, [data])
            with parallel:
                pool = ir.GlobalVariable(builder.module, PARALLEL.as_pointer(), "tilewise_pool")
                threads = builder.trunc(threads, INT32)
                builder.call(builder.load(pool), [work, data, threads, INT32(0)])
        return context.get_dummy_value()

    return signature, emit


def _emit_loop(context, builder, body, args_type, state):
    shared = builder.bitcast(builder.function.args[0], state.as_pointer())
    tasks = builder.load(cgutils.gep_inbounds(builder, shared, 0, 1))
    args = builder.load(cgutils.gep_inbounds(builder, shared, 0, 2))
    take = builder.append_basic_block("take")
    do = builder.append_basic_block("do")
    done = builder.append_basic_block("done")
    builder.branch(take)

    builder.position_at_end(take)
    counter = cgutils.gep_inbounds(builder, shared, 0, 0)
    task = builder.atomic_rmw("add", counter, ir.Constant(INT64, 1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", task, tasks), do, done)

    builder.position_at_end(do)
    function = context.declare_function(builder.module, body.fndesc)
    unpacked = cgutils.unpack_tuple(builder, args)
    context.call_conv.call_function(
        builder, function, body.fndesc.restype, body.fndesc.argtypes, [task, *unpacked]
    )  # the status is dropped: with error_model="numpy" and no allocation nothing raises
    builder.branch(take)

    builder.position_at_end(done)
    builder.ret_void()


@intrinsic
def take(typing_context, counter):
    """The next number of the int64 at the address `counter`: 0, 1, 2, ... shared by all threads.

    For a kernel whose scratch is one a thread: as many tasks as threads, each takes items.
    """

    def emit(context, builder, signature, args):
        counter = builder.inttoptr(args[0], INT64.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(INT64, 1), "monotonic")

    return types.int64(types.int64), emit


class Kernel:
    """A function of `(task, *args)`; calling it runs every task and returns when all are done."""

    on_stream = False
    _one_at_a_time = Lock()  # Numba's own pool aborts under concurrent callers

    def __init__(self, body):
        self.body = callee(body)

    @cached_property
    def _launch(self):
        body = self.body

        def launch(tasks, threads, *args):
            _for_each_task(body, tasks, threads, args)

        # The name of its file in the cache: without the module two ops' would be taken for one.
        name = f"{body.py_func.__module__}.{body.py_func.__qualname__}"
        launch.__qualname__ = name.rpartition("kernels.")[2]
        return compiled(launch)

    def __call__(self, tasks: int, elements: int, *args) -> None:
        """Run tasks 0 to `tasks` - 1, on one thread if they touch few `elements` in all."""
        if (noting := recorder()) is not None:
            noting.launches.append((self, tasks, elements, args))
            return
        threads = min(torch.get_num_threads(), tasks)
        if elements < SERIAL_BELOW or threads < 2 or _FORKED:
            self._launch(tasks, 1, *args)
        elif _POOL_IS_TORCH:
            self._launch(tasks, threads, *args)
        else:
            with self._one_at_a_time:
                _POOL.value = _numba_pool().address
                self._launch(tasks, threads, *args)

    def launcher(self, tasks: int, elements: int, args: tuple) -> tuple:
        """What to call for the same tasks and arguments of the same types every time, and with what
        before these: code that takes them in one tuple and does not look at their types, 0.5 us
        less, if one thread is enough."""
        if elements >= SERIAL_BELOW and tasks > 1:
            return (partial(self._unpacked, tasks, elements),)
        kinds = types.StarArgTuple.from_types(tuple(map(self._launch.typeof_pyval, args)))
        return self._launch.compile((types.int64, types.int64, kinds)), tasks, 1

    def _unpacked(self, tasks: int, elements: int, args: tuple) -> None:
        self(tasks, elements, *args)
