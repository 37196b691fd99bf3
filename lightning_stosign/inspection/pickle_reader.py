"""A pickle as plain data: nothing in it is imported, called or built; objects stay descriptions of themselves."""

import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

_MOST_SECONDS = 60.0
_LONGEST_TEXT = 1 << 20  # bytes; longer texts and byte strings (arrays, mostly) are left unread

# What an entry is worth in bytes, roughly: the budget is there to end, not to measure.
_COST_OP, _COST_VALUE, _COST_CONTAINER, _COST_MEMO, _COST_ITEM = 8, 40, 120, 60, 60


class PickleError(ValueError):
    """Bytes that are no pickle, or one that costs more than its file can be worth."""


class Global:
    """A class or function that a pickle names."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Unread:
    """An object that is not built: its class or maker, and what the pickle would have given it.

    Attributes:
        name: the full name of the class or function.
        args: what it would have been called with.
        state: what would have become its attributes; None without.
        items: of a subclass of ``dict`` its keys and values in turn, of one of ``list`` its entries.
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: Any = ()) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []


# (full name, arguments) -> a value, or NotImplemented for what is to be left unread
Call = Callable[[str, Sequence[Any]], Any]


class PickleReader:
    """Reads one pickle after the other out of a buffer.

    The pickle machine of Python's documentation, with values of four kinds: numbers, texts and bytes; lists, tuples and
    dicts; what ``call`` and ``persistent`` return; and :class:`Unread`. Depth costs no recursion, and what the values
    take is counted against a budget, so that a small file cannot ask for a large memory.

    Args:
        data: the bytes.
        call: makes values of the calls that it knows, such as torch's of tensors.
        persistent: makes values of persistent ids: torch's storages.
        budget: bytes of memory, roughly.

    Attributes:
        position: where the next pickle begins.
        globals: the full names of all classes and functions that were named.
    """

    def __init__(self, data: bytes, call: Call, persistent: Callable[[Any], Any], budget: int) -> None:
        self.position = 0
        self.globals: set[str] = set()
        self._data = data
        self._call = call
        self._persistent = persistent
        self._budget = budget
        self._deadline = time.monotonic() + _MOST_SECONDS

    def load(self) -> Any:
        """Read the next pickle.

        Raises:
            PickleError: it is damaged, or exceeds the budget.
        """
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        data, operations = self._data, _OPERATIONS
        count = 0
        try:
            while True:
                code = data[self.position]
                self.position += 1
                if code == 0x2E:  # STOP
                    return self._stack.pop()
                self._budget -= _COST_OP
                operations[code](self)
                count += 1
                if not count & 0x3FF:
                    self._check_limits()
        except PickleError:
            raise
        except (IndexError, KeyError, ValueError, TypeError, struct.error, OverflowError) as error:
            raise PickleError("its pickle is damaged") from error

    def _check_limits(self) -> None:
        if self._budget < 0:
            raise PickleError("its pickle describes far more objects than the file can hold")
        if time.monotonic() > self._deadline:
            raise PickleError(f"its pickle takes more than {_MOST_SECONDS:.0f} s to read")

    def _spend(self, cost: int) -> None:
        self._budget -= cost
        if self._budget < 0:
            self._check_limits()

    # ---- bytes of the stream ----

    def _take(self, size: int) -> bytes:
        end = self.position + size
        part = self._data[self.position : end]
        if len(part) != size:
            raise PickleError("its pickle is truncated")
        self.position = end
        return part

    def _number(self, format: struct.Struct) -> Any:
        (value,) = format.unpack_from(self._data, self.position)
        self.position += format.size
        return value

    def _line(self) -> bytes:
        end = self._data.find(b"\n", self.position, self.position + _LONGEST_TEXT)
        if end < 0:
            raise PickleError("its pickle is truncated")
        line = self._data[self.position : end]
        self.position = end + 1
        return line

    def _push(self, value: Any, cost: int = _COST_VALUE) -> None:
        self._spend(cost)
        self._stack.append(value)

    def _push_text(self, size: int, encoding: str | None) -> None:
        if size > _LONGEST_TEXT:
            if self.position + size > len(self._data):
                raise PickleError("its pickle is truncated")
            self.position += size
            self._push(Unread(f"{'bytes' if encoding is None else 'str'} of {size:,} bytes"), _COST_CONTAINER)
            return
        part = self._take(size)
        self._push(part if encoding is None else part.decode(encoding, "surrogatepass"), 2 * _COST_VALUE + 2 * size)

    def _push_integer(self, data: bytes) -> None:
        if len(data) > 8:
            self._push(Unread(f"int of {8 * len(data)} bits"), _COST_CONTAINER)
        else:
            self._push(int.from_bytes(data, "little", signed=True))

    # ---- the stack ----

    def _pop_mark(self) -> list[Any]:
        start = self._marks.pop()
        if start > len(self._stack):
            raise PickleError("its pickle is damaged")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _top(self) -> Any:
        return self._stack[-1]

    def _set_items(self, target: Any, items: list[Any]) -> None:
        self._spend(_COST_ITEM * len(items))
        if isinstance(target, dict):
            for number, (key, value) in enumerate(zip(items[::2], items[1::2], strict=True), start=1):
                target[_as_key(key)] = value
                if not number & 0x3FF:  # keys made to collide take a time that no count of operations shows
                    self._check_limits()
        elif isinstance(target, Unread):
            target.items += items
        else:
            raise PickleError("its pickle is damaged")

    def _append(self, target: Any, items: list[Any]) -> None:
        self._spend(8 * len(items))
        if isinstance(target, list):
            target += items
        elif isinstance(target, Unread):
            target.items += items
        else:
            raise PickleError("its pickle is damaged")

    def _remember(self, key: int) -> None:
        self._spend(_COST_MEMO)
        self._memo[key] = self._stack[-1]

    def _push_global(self, module: str, name: str) -> None:
        full = f"{_MOVED_MODULES.get(module, module)}.{name}"
        if full not in self.globals:
            self._spend(2 * _COST_VALUE + 2 * len(full))
            self.globals.add(full)
        self._push(Global(full), _COST_CONTAINER)

    def _make(self, function: Any, args: Any) -> None:
        """Push what a call would return, or a description of the call."""
        self._spend(2 * _COST_CONTAINER)
        if not isinstance(function, Global):
            name = function.name if isinstance(function, Unread) else "object"
            self._stack.append(Unread(name, args))
            return
        made = self._call(function.name, args) if isinstance(args, tuple) else NotImplemented
        if made is NotImplemented:
            made = Unread(function.name, args)
            # These make an object of the class that is their first argument.
            if function.name in _MAKERS and args and isinstance(args[0], Global):
                made.name = args[0].name
        self._stack.append(made)


_MOVED_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_MAKERS = frozenset(
    ["copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__"]
    + [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
)


def _as_key(key: Any) -> Any:
    """Return a key that hashes in constant time; what is none stays an object of its own."""
    if isinstance(key, tuple):
        return tuple(map(_as_scalar, key)) if len(key) <= 8 else Unread("tuple")
    return _as_scalar(key)


def _as_scalar(key: Any) -> Any:
    return key if key is None or isinstance(key, (str, int, float, bytes, Unread, Global)) else Unread("object")


_Operation = Callable[[PickleReader], None]

_U1, _U2, _U4, _U8 = (struct.Struct(f"<{code}") for code in "BHIQ")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")


def _constant(value: Any) -> _Operation:
    return lambda reader: reader._stack.append(value)


def _integer(format: struct.Struct) -> _Operation:
    return lambda reader: reader._push(reader._number(format))


def _text(format: struct.Struct, encoding: str | None = None) -> _Operation:
    return lambda reader: reader._push_text(reader._number(format), encoding)


def _put(format: struct.Struct) -> _Operation:
    return lambda reader: reader._remember(reader._number(format))


def _get(format: struct.Struct) -> _Operation:
    return lambda reader: reader._stack.append(reader._memo[reader._number(format)])


def _long(format: struct.Struct) -> _Operation:
    def run(reader: PickleReader) -> None:
        size = reader._number(format)
        if size < 0:
            raise PickleError("its pickle is damaged")
        if size > _LONGEST_TEXT:
            reader._push_text(size, None)
        else:
            reader._push_integer(reader._take(size))

    return run


def _small_tuple(size: int) -> _Operation:
    def run(reader: PickleReader) -> None:
        stack = reader._stack
        if len(stack) < size:
            raise PickleError("its pickle is damaged")
        items = tuple(stack[-size:])
        del stack[-size:]
        reader._push(items, _COST_CONTAINER)

    return run


def _decimal(reader: PickleReader) -> None:
    line = reader._line().rstrip(b"L")
    if len(line) > 18:
        reader._push(Unread(f"int of {len(line)} digits"), _COST_CONTAINER)
    else:
        reader._push({b"00": False, b"01": True}.get(line) if line in (b"00", b"01") else int(line))


def _quoted(reader: PickleReader) -> None:
    line = reader._line()
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[:1] != line[-1:]:
        raise PickleError("its pickle is damaged")
    reader._push(line[1:-1].decode("unicode_escape"), _COST_VALUE + 2 * len(line))


def _frame(reader: PickleReader) -> None:
    reader._number(_U8)


def _set_item(reader: PickleReader) -> None:
    value, key = reader._stack.pop(), reader._stack.pop()
    reader._set_items(reader._top(), [key, value])


def _set_items(reader: PickleReader) -> None:
    items = reader._pop_mark()
    reader._set_items(reader._top(), items)


def _append(reader: PickleReader) -> None:
    value = reader._stack.pop()
    reader._append(reader._top(), [value])


def _appends(reader: PickleReader) -> None:
    items = reader._pop_mark()
    reader._append(reader._top(), items)


def _dict(reader: PickleReader) -> None:
    made: dict[Any, Any] = {}
    items = reader._pop_mark()
    reader._push(made, _COST_CONTAINER)
    reader._set_items(made, items)


def _sequence(kind: Callable[[list[Any]], Any]) -> _Operation:
    def run(reader: PickleReader) -> None:
        items = reader._pop_mark()
        reader._push(kind(items), _COST_CONTAINER + 8 * len(items))

    return run


def _global(reader: PickleReader) -> None:
    module, name = reader._line(), reader._line()
    reader._push_global(module.decode("utf-8", "replace"), name.decode("utf-8", "replace"))


def _stack_global(reader: PickleReader) -> None:
    name, module = reader._stack.pop(), reader._stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleError("its pickle is damaged")
    reader._push_global(module, name)


def _reduce(reader: PickleReader) -> None:
    args, function = reader._stack.pop(), reader._stack.pop()
    reader._make(function, args)


def _new_object(reader: PickleReader) -> None:
    args, cls = reader._stack.pop(), reader._stack.pop()
    reader._make(cls, args)


def _new_object_ex(reader: PickleReader) -> None:
    options, args, cls = reader._stack.pop(), reader._stack.pop(), reader._stack.pop()
    reader._make(cls, args if not options else (args, options))


def _inst(reader: PickleReader) -> None:
    _global(reader)
    cls = reader._stack.pop()
    reader._make(cls, tuple(reader._pop_mark()))


def _obj(reader: PickleReader) -> None:
    cls, *args = reader._pop_mark()
    reader._make(cls, tuple(args))


def _build(reader: PickleReader) -> None:
    state = reader._stack.pop()
    target = reader._top()
    if isinstance(target, Unread):
        target.state = state


def _persistent_line(reader: PickleReader) -> None:
    reader._push(reader._persistent(reader._line().decode("ascii")), _COST_CONTAINER)


def _persistent_object(reader: PickleReader) -> None:
    reader._push(reader._persistent(reader._stack.pop()), _COST_CONTAINER)


def _pop(reader: PickleReader) -> None:
    # As in Python's: a POP on a mark takes the mark.
    if reader._marks and reader._marks[-1] == len(reader._stack):
        reader._marks.pop()
    else:
        reader._stack.pop()


def _discard(operation: Callable[[PickleReader], Any]) -> _Operation:
    def run(reader: PickleReader) -> None:
        operation(reader)

    return run


def _unknown(reader: PickleReader) -> None:
    raise PickleError("its pickle is damaged")


def _table(operations: dict[str, _Operation]) -> list[_Operation]:
    table: list[_Operation] = [_unknown] * 256
    for code, operation in operations.items():
        table[ord(code)] = operation
    return table


# In the order of Python's pickletools.
_OPERATIONS = _table(
    {
        "I": _decimal,
        "J": _integer(_I4),
        "K": _integer(_U1),
        "M": _integer(_U2),
        "L": _decimal,
        "\x8a": _long(_U1),
        "\x8b": _long(_I4),
        "S": _quoted,
        "T": _text(_U4, "latin-1"),
        "U": _text(_U1, "latin-1"),
        "B": _text(_U4),
        "C": _text(_U1),
        "\x8e": _text(_U8),
        "\x96": _text(_U8),
        "N": _constant(None),
        "\x88": _constant(True),
        "\x89": _constant(False),
        "V": lambda reader: reader._push(reader._line().decode("raw_unicode_escape")),
        "\x8c": _text(_U1, "utf-8"),
        "X": _text(_U4, "utf-8"),
        "\x8d": _text(_U8, "utf-8"),
        "F": lambda reader: reader._push(float(reader._line())),
        "G": _integer(_F8),
        "]": lambda reader: reader._push([], _COST_CONTAINER),
        "a": _append,
        "e": _appends,
        "l": _sequence(list),
        ")": _constant(()),
        "t": _sequence(tuple),
        "\x85": _small_tuple(1),
        "\x86": _small_tuple(2),
        "\x87": _small_tuple(3),
        "}": lambda reader: reader._push({}, _COST_CONTAINER),
        "d": _dict,
        "s": _set_item,
        "u": _set_items,
        "\x8f": lambda reader: reader._push([], _COST_CONTAINER),  # a set, as a list
        "\x90": _appends,
        "\x91": _sequence(list),
        "0": _pop,
        "2": lambda reader: reader._stack.append(reader._top()),
        "(": lambda reader: reader._marks.append(len(reader._stack)),
        "1": _discard(PickleReader._pop_mark),
        "g": lambda reader: reader._stack.append(reader._memo[int(reader._line()[:18])]),
        "h": _get(_U1),
        "j": _get(_U4),
        "p": lambda reader: reader._remember(int(reader._line()[:18])),
        "q": _put(_U1),
        "r": _put(_U4),
        "\x94": lambda reader: reader._remember(len(reader._memo)),
        "c": _global,
        "\x93": _stack_global,
        "R": _reduce,
        "b": _build,
        "i": _inst,
        "o": _obj,
        "\x81": _new_object,
        "\x92": _new_object_ex,
        "\x80": _discard(lambda reader: reader._take(1)),  # PROTO
        "\x95": _frame,
        "P": _persistent_line,
        "Q": _persistent_object,
    }
)
