"""Translate WebAssembly's text format to bytes: folded instructions, with few opcodes.

The text and binary formats are those of https://webassembly.github.io/spec/core. Unknown words
raise KeyError.
"""

import re
import struct
from engine import refuse_to_run

refuse_to_run(__name__, "scripts/export.py --html")

TYPES = {"i32": 0x7F, "f32": 0x7D, "v128": 0x7B}
NO_RESULT = 0x40
OPCODES = {
    "loop": 0x03,
    "br_if": 0x0D,
    "call": 0x10,
    "local.get": 0x20,
    "local.set": 0x21,
    "local.tee": 0x22,
    "i32.const": 0x41,
    "f32.const": 0x43,
    "i32.lt_u": 0x49,
    "i32.add": 0x6A,
    "i32.sub": 0x6B,
    "i32.shr_u": 0x76,
    "f32.add": 0x92,
    "f32.div": 0x95,
    "f32.max": 0x97,
}
VECTOR = {  # after the byte 0xFD
    "v128.load": 0x00,
    "v128.load32_splat": 0x09,
    "v128.store": 0x0B,
    "i32x4.splat": 0x11,
    "f32x4.splat": 0x13,
    "f32x4.extract_lane": 0x1F,
    "f32x4.nearest": 0x6A,
    "i32x4.shl": 0xAB,
    "i32x4.add": 0xAE,
    "f32x4.add": 0xE4,
    "f32x4.sub": 0xE5,
    "f32x4.mul": 0xE6,
    "f32x4.div": 0xE7,
    "f32x4.min": 0xE8,
    "f32x4.max": 0xE9,
    "i32x4.trunc_sat_f32x4_s": 0xF8,
}
ALIGNMENT = {"v128.load": 4, "v128.load32_splat": 2, "v128.store": 4}  # log2 of bytes


def translate(text):
    """Return the bytes of a module in text format: one imported memory, functions with named
    parameters and locals.
    """
    words = re.findall(r'\(|\)|"[^"]*"|[^\s()"]+', re.sub(";;.*", "", text))
    _, (_, *place, (_, pages)), *functions = parse(iter(words[1:]))
    names = [next((part for part in own[1:] if str(part)[0] == "$"), None) for own in functions]
    numbers = {name: number for number, name in enumerate(names) if name}
    exports = [
        name(part[1]) + b"\0" + unsigned(number)
        for number, own in enumerate(functions)
        for part in own
        if part[0] == "export"
    ]
    memory = b"".join(map(name, place)) + b"\2\0" + unsigned(int(pages))
    # each function has its own type
    indices = [unsigned(number) for number in range(len(functions))]
    parts = {
        1: [signature(own) for own in functions],
        2: [memory],
        3: indices,
        7: exports,
        10: [sized(code(own, numbers)) for own in functions],
    }
    sections = (bytes([kind]) + sized(vector(items)) for kind, items in parts.items())
    return b"\0asm\1\0\0\0" + b"".join(sections)


def parse(words):
    """Return the nested lists of an expression whose opening parenthesis has been read."""
    found = []
    for word in words:
        if word == ")":
            break
        found.append(parse(words) if word == "(" else word)
    return found


def fields(function, kind):
    """Return the parts of a function such as ["param", "$x", "i32"]."""
    return [part for part in function if part[0] == kind]


def signature(function):
    params, results = (
        bytes(TYPES[part[-1]] for part in fields(function, kind)) for kind in ("param", "result")
    )
    return b"\x60" + sized(params) + sized(results)


def code(function, functions):
    """Return the locals and the body of a function."""
    own = [*fields(function, "param"), *fields(function, "local")]
    scope = {part[1]: number for number, part in enumerate(own)} | {
        ("call", name): n for name, n in functions.items()
    }
    local = vector([b"\1" + bytes([TYPES[part[-1]]]) for part in fields(function, "local")])
    heads = {"export", "param", "result", "local"}
    body = [part for part in function[1:] if isinstance(part, list) and part[0] not in heads]
    return local + b"".join(instruction(part, scope, []) for part in body) + b"\x0b"


def instruction(folded, scope, labels):
    """Return the bytes of a folded instruction, after those of its operands.

    labels: of the loops around it.
    """
    opcode = folded[0]
    rest = folded[1:]
    inner = [rest[0], *labels] if opcode == "loop" else labels
    words = [part for part in rest if isinstance(part, str)]
    operands = b"".join(instruction(part, scope, inner) for part in rest if isinstance(part, list))
    if opcode == "loop":
        return bytes([OPCODES[opcode], NO_RESULT]) + operands + b"\x0b"
    if opcode in OPCODES:
        return operands + bytes([OPCODES[opcode]]) + immediate(opcode, words, scope, labels)
    place = b""
    if opcode in ALIGNMENT:
        place = unsigned(ALIGNMENT[opcode]) + unsigned(
            int(words[0].removeprefix("offset=")) if words else 0
        )
    lane = bytes([int(words[0])]) if opcode.endswith("_lane") else b""
    return operands + b"\xfd" + unsigned(VECTOR[opcode]) + place + lane


def immediate(opcode, words, scope, labels):
    """Return the bytes after an opcode: a constant, or the number of a loop, function or local."""
    if opcode == "f32.const":
        return struct.pack("<f", float(words[0]))
    if opcode == "i32.const":
        return signed(int(words[0]))
    if opcode == "br_if":
        return unsigned(labels.index(words[0]))
    return (
        unsigned(scope["call", words[0]] if opcode == "call" else scope[words[0]]) if words else b""
    )


def unsigned(value):
    """LEB128: 7 bits per byte, the lowest first."""
    low = value & 127
    rest = value >> 7
    return bytes([low | 128]) + unsigned(rest) if rest else bytes([low])


def signed(value):
    low = value & 127
    rest = value >> 7
    return bytes([low]) if rest == -(low >> 6) else bytes([low | 128]) + signed(rest)


def sized(content):
    return unsigned(len(content)) + content


def vector(items):
    return unsigned(len(items)) + b"".join(items)


def name(quoted):
    return sized(quoted.strip('"').encode())
