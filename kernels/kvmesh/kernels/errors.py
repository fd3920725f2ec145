"""What can be wrong with a block, or with what should become one.

    BlockError               the bytes are not a block that this process can use
    ├── ShortBlock           fewer or more bytes than the header promises
    ├── BadMagic             not a block at all
    ├── WrongVersion         another format, codebook or rotation
    ├── WrongFingerprint     K and V of another model
    ├── WrongLayout          another codec or geometry
    └── ChecksumMismatch     some bit is not what was sealed
    CodecError(ValueError)   K or V hold a NaN or an infinity: nothing to encode

Messages name the value found and the value expected.
"""


class BlockError(Exception):
    """The bytes are not a block that this process can use."""


class ShortBlock(BlockError):
    """Fewer or more bytes than the header or the layout promises."""


class BadMagic(BlockError):
    """The bytes do not start as a block starts."""


class WrongVersion(BlockError):
    """Another format version, codebook version or rotation seed."""


class WrongFingerprint(BlockError):
    """K and V of another model."""


class WrongLayout(BlockError):
    """Another codec or geometry."""


class ChecksumMismatch(BlockError):
    """Some bit is not what was sealed."""


class CodecError(ValueError):
    """K or V hold a NaN or an infinity."""
