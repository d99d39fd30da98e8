"""What code does, as values: functions with their bytecode, defaults, closures and the globals they read, classes likewise.

Own code is followed as far as it reaches. Code that an installer put there counts by name, version and the content of its
file: following it would end in all of torch.
"""

from __future__ import annotations

import builtins
import dis
import hashlib
import importlib.metadata
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from functools import cache, lru_cache
from types import CodeType, MethodType, ModuleType

_CHUNK = 1 << 22
# Read at run time by a name that no bytecode tells.
_OPAQUE = frozenset({"eval", "exec", "globals"})
_NOT_CODE = frozenset(
    {
        *(
            "__dict__",
            "__weakref__",
            "__doc__",
            "__module__",
            "__qualname__",
            "__firstlineno__",
            "__static_attributes__",
        ),
        *(
            "__annotations__",
            "__annotate__",
            "__annotate_func__",
            "__annotations_cache__",
            "__abstractmethods__",
            "_abc_impl",
        ),
        *("__parameters__", "__orig_bases__", "__slots__", "__signature__", "__match_args__", "__dataclass_fields__"),
        *("__dataclass_params__", "__hash__", "__classdictcell__", "__classcell__", "__type_params__"),
    }
)


class Word(str):
    """Text that names code: it is never a path."""

    __slots__ = ()


def parts_of_function(f, globals_of: bool = True) -> Iterator:
    """What tells a Python function from others."""
    yield Word(f.__qualname__)
    yield from (f.__code__, f.__defaults__, f.__kwdefaults__, Word(str(getattr(f, "__annotations__", None))))
    for cell in f.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            yield Word("empty")
    yield {k: v for k, v in vars(f).items() if k != "__signature__"}
    here = library(f.__module__)
    if here is not None:
        yield here
    elif globals_of:
        yield from _globals(f)


def parts_of_code(code: CodeType) -> Iterator:
    """What tells compiled code from other code, but for where it stands."""
    yield code.co_code
    yield getattr(code, "co_exceptiontable", b"")
    yield tuple(map(Word, (*code.co_names, *code.co_freevars, *code.co_cellvars)))
    yield code.co_flags
    yield code.co_consts


def parts_of_class(c: type) -> Iterator:
    """What tells a class from others: attributes, methods and bases of own ones, what was set on those of a library."""
    yield Word(f"{c.__module__}.{c.__qualname__}")
    here = library(c.__module__)
    yield here
    for name, value in sorted(vars(c).items()):
        if name in _NOT_CODE or _is_descriptor(value):
            continue
        if here is None or (_plain(value) and not name.startswith("__")) or _is_own(value):
            yield from (Word(name), _inside(value))
    yield c.__bases__ if c.__module__ != "builtins" else ()
    yield type(c) if type(c) is not type else Word("type")


def parts_of_module(module: ModuleType, names: frozenset[str] | None = None, seen: tuple = ()) -> Iterator:
    """What `names` are in a module of one's own, by default all; of one that was installed its name and version."""
    yield Word(module.__name__)
    here = library(module.__name__)
    yield here
    if here is not None or module in seen:
        return
    for name, value in sorted(vars(module).items()):
        if name.startswith("__") if names is None else name not in names:
            continue
        yield Word(name)
        if isinstance(value, ModuleType):
            yield from parts_of_module(value, names or frozenset(), (*seen, module))
        else:
            yield value


def library(name: str | None) -> tuple | None:
    """Version and file of the installed package that a module belongs to; `None` for code of one's own."""
    if name is None:
        return (Word("built in"),)
    top = name.partition(".")[0]
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return (Word("python"),) if top in sys.stdlib_module_names or top in sys.builtin_module_names else None
    if top != __name__.partition(".")[0] and not installed(os.path.abspath(file)):
        return None
    if top in sys.stdlib_module_names:
        return (Word("python"),)
    version = _version(top)
    return None if version is None else (Word(version), Word(file_digest(file)))


@cache
def _version(top: str) -> str | None:
    version = getattr(sys.modules.get(top), "__version__", None)
    if isinstance(version, str):
        return version
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def installed(file: str) -> bool:
    """Whether a file is Python's own, or was put there by an installer."""
    paths = {sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")}
    parts = file.split(os.sep)
    return "site-packages" in parts or "dist-packages" in parts or any(file.startswith(p + os.sep) for p in paths if p)


def file_digest(path: str | os.PathLike) -> str:
    """The digest of a file's content. Within this process a file is read again only when its times, size or place changed."""
    stat = os.stat(path)
    # A file that was written a moment ago may be written again without its times telling.
    settled = time.time() - max(stat.st_ctime, stat.st_mtime) > 3
    about = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    path = os.path.abspath(path)
    return _digest(path, about) if settled else _digest.__wrapped__(path, about)


@lru_cache(maxsize=1 << 20)
def _digest(path: str, about: tuple) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _globals(f) -> Iterator:
    """The globals that a function and those inside it read, each with its name."""
    names, attributes, texts = _read_by(f.__code__)
    opaque = names & _OPAQUE - f.__globals__.keys()
    if opaque:
        raise TypeError(f"{f.__qualname__} reads what it finds at run time ({', '.join(sorted(opaque))})")
    for name in sorted(names):
        value = f.__globals__.get(name, _Missing)
        if value is _Missing:
            yield Word(name if hasattr(builtins, name) else f"{name} is missing")
        elif isinstance(value, ModuleType):
            yield Word(name)
            yield from parts_of_module(value, attributes)
        else:
            yield from (Word(name), value)
    for name in sorted(_imported(f.__code__)):
        package = f.__globals__.get("__package__") or ""
        module = sys.modules.get(f"{package}.{name}") or sys.modules.get(name)
        if module is not None:
            yield from parts_of_module(module, attributes)
    if attributes & {"environ", "getenv", "environb"} or names & {"environ", "getenv"}:
        yield {text: os.environ.get(text) for text in sorted(texts)}


class _Missing:
    pass


@lru_cache(maxsize=1 << 14)
def _read_by(code: CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The global names that code reads, all names in it, and all texts in it, those of functions inside it included."""
    read = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    names, texts = set(code.co_names), {c for c in code.co_consts if isinstance(c, str)}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for mine, more in zip((read, names, texts), _read_by(inner), strict=True):
                mine |= more
    return frozenset(read), frozenset(names), frozenset(texts)


def _imported(code: CodeType) -> set[str]:
    found = {i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"}
    return found.union(*(_imported(c) for c in code.co_consts if isinstance(c, CodeType)))


def _inside(value):
    """What a descriptor of Python's own makes of functions, or the value itself."""
    if isinstance(value, staticmethod | classmethod):
        return value.__func__
    if isinstance(value, property):
        return (value.fget, value.fset, value.fdel)
    return value


def _is_descriptor(value) -> bool:
    """Slots and the like: they hold nothing themselves."""
    return type(value).__name__ in ("member_descriptor", "getset_descriptor", "wrapper_descriptor", "_abc_data")


def _is_own(value) -> bool:
    value = _inside(value)
    return any(
        hasattr(f, "__code__") and library(getattr(f, "__module__", None)) is None
        for f in (value if isinstance(value, tuple) else (value,))
    )


def _plain(value, depth: int = 0) -> bool:
    if isinstance(value, bool | int | float | str | bytes | type(None)):
        return True
    if depth > 3:
        return False
    if isinstance(value, dict):
        return all(_plain(x, depth + 1) for pair in value.items() for x in pair)
    return isinstance(value, list | tuple) and all(_plain(x, depth + 1) for x in value)


def parts_of_bound(f: MethodType) -> tuple:
    """A method with the object it belongs to."""
    return f.__func__, f.__self__
