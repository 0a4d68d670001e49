"""Operations on the 32 values of a group and unaligned memory words, as LLVM vector instructions.

LLVM does not find these patterns in scalar loops: a bit of each of 32 codes becomes one word (a code plane),
and back. Written as vectors they are a compare and a mask move on AVX-512, four of them on AVX2, and still
correct code on any other processor. Nothing here computes with floats.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

WORD = ir.IntType(32)
GROUP = ir.VectorType(WORD, 32)
MASK = ir.VectorType(ir.IntType(1), 32)
NO_CODES = ir.Constant(GROUP, [0] * 32)


def _splat(builder: Any, word: Any) -> Any:
    """The word in each of the 32 lanes."""
    undefined = ir.Constant(GROUP, ir.Undefined)
    lane = builder.insert_element(undefined, word, ir.Constant(WORD, 0))
    return builder.shuffle_vector(lane, undefined, NO_CODES)


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, kind: Any) -> Any:
    """Address of element ``arguments[1]`` of the array ``arguments[0]``, as a pointer to ``kind``."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.bitcast(builder.gep(array.data, [arguments[1]]), kind.as_pointer())


@intrinsic
def plane_word(typing: Any, codes: Any, at: Any, bit: Any) -> Any:
    """Word whose bit i is bit ``bit`` of ``codes[at + i]``; uint32 codes, 32 of them from ``at`` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments, GROUP)
        group = builder.load(pointer, align=4)
        probe = _splat(builder, builder.shl(ir.Constant(WORD, 1), arguments[2]))
        lanes = builder.icmp_unsigned("!=", builder.and_(group, probe), NO_CODES)
        return builder.bitcast(lanes, WORD)

    return types.uint32(codes, types.intp, types.uint32), generate


@intrinsic
def add_plane(typing: Any, codes: Any, at: Any, word: Any, bit: Any) -> Any:
    """Set bit ``bit`` of ``codes[at + i]`` where bit i of ``word`` is set: the inverse of ``plane_word``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments, GROUP)
        group = builder.load(pointer, align=4)
        value = _splat(builder, builder.shl(ir.Constant(WORD, 1), arguments[3]))
        lanes = builder.bitcast(arguments[2], MASK)
        group = builder.or_(group, builder.select(lanes, value, NO_CODES))
        builder.store(group, pointer, align=4)
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.uint32, types.uint32), generate


@intrinsic
def load_word(typing: Any, data: Any, at: Any) -> Any:
    """The four bytes from ``data[at]`` on as uint32; data is uint8, the address need not be aligned."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_pointer(context, builder, signature, arguments, WORD), align=1)

    return types.uint32(data, types.intp), generate


@intrinsic
def load_pair(typing: Any, data: Any, at: Any) -> Any:
    """The eight bytes from ``data[at]`` on as uint64; data is uint8, the address need not be aligned."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments, ir.IntType(64))
        return builder.load(pointer, align=1)

    return types.uint64(data, types.intp), generate


@intrinsic
def store_word(typing: Any, data: Any, at: Any, word: Any) -> Any:
    """Write the uint32 to the four bytes from ``data[at]`` on; the address need not be aligned."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments, WORD)
        builder.store(arguments[2], pointer, align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.uint32), generate
